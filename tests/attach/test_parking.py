"""Tokens that leave some layers and return, and positions that are renumbered inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracle_methods import EveryOtherAtEntry, Parks, Renumbers
from test_oracles import BATCH, TOLERANCE, generate, last_logits

import foveate
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from tiny import TINY_FAMILIES, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_parked_tokens_return_as_they_left(family):
    model, inputs = tiny_model(family), tiny_inputs(family, samples=BATCH)
    back = 3
    expected = generate(model, inputs, Parks((1,), back=back), options={"mask_only": True})
    got = generate(model, inputs, Parks((1,), back=back))
    assert got.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    lengths = [layer.length for layer in got.past_key_values.layers]
    assert lengths[1] == lengths[2] < lengths[0] == lengths[3]


def test_report_shows_that_tokens_came_back():
    model, inputs = tiny_model("llava_onevision"), tiny_inputs("llava_onevision")
    _, report = last_logits(model, inputs, Parks((1,), back=3))
    full, less = report.layer_lengths[0][0], report.layer_lengths[0][1]
    assert report.layer_lengths[0] == [full, less, less, full]
    assert report.items[0].alive[3].tolist() == list(range(report.items[0].after))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "video_llama_3"])
def test_renumbering_before_layer_0_equals_a_compact_prompt(family):
    model, inputs = tiny_model(family), tiny_inputs(family, samples=BATCH)
    expected = generate(model, inputs, EveryOtherAtEntry(), options={"positions": "compact"})
    got = generate(model, inputs, Renumbers((0,)))
    for row in (0, 2):  # one item or none: every other token of two items is another choice
        assert got.sequences[row].tolist() == expected.sequences[row].tolist()
        for a, b in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(a[row], b[row], atol=2e-5, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_deeper_layers_keep_counting_from_their_own_positions(beams):
    """Cached decoding must go on in each layer's numbering: as if the prompt were read anew."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", samples=BATCH)
    method = Renumbers((1, 3))
    cached = generate(model, inputs, method, num_beams=beams)
    again = generate(model, inputs, method, num_beams=beams, use_cache=False)
    assert cached.sequences.tolist() == again.sequences.tolist()
    for a, b in zip(cached.logits, again.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    masked = generate(model, inputs, method, num_beams=beams, options={"mask_only": True})
    assert masked.sequences.tolist() == cached.sequences.tolist()


def test_renumbering_is_not_idle():
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    moved, _ = last_logits(model, inputs, Renumbers((1,)))
    kept, _ = last_logits(model, inputs, Parks((1,), back=3))
    assert (moved - kept).abs().max() > 100 * TOLERANCE


@dataclass(frozen=True)
class Both(Parks):
    renumbers = True


@pytest.mark.parametrize(
    ("method", "message"),
    [(Parks((2,), back=2), "wants its tokens back"), (Both(), "only one of the two")],
)
def test_impossible_returns_are_refused(method, message):
    model = tiny_model("llava")
    with pytest.raises(AttachmentError, match=message):
        foveate.reduce(model, method, retain=0.5)
    layers = adapter_for(model).layers(model)
    assert not any(layer._forward_pre_hooks for layer in layers)
