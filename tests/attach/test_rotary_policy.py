"""Stretched rotary positions: what they are, when they are fixed, and what they go with.

Legend: B samples, P rows of position ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attach_suite import (
    TOLERANCE,
    batch_of,
    greedy,
    logits_of,
    model_of,
    one_of,
    same_steps,
    samples_of,
)
from oracle_methods import EveryOther, Parks, Renumbers, _card
from test_behaviour_calls import second_turn

import foveate
from foveate.core import Method, Recipe
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from foveate.ops import ntk_frequencies
from tiny import Sample, tiny_inputs, tiny_model

FAMILIES = ("llava_onevision", "qwen3_vl", "internvl")
every_family = pytest.mark.parametrize("family", FAMILIES)
#: Stretches, and leaves the cache alone.
STRETCH = "intp(window=16, answer=8, kv_bits=None)"


def stretched(family: str, scale: float, **config) -> torch.nn.Module:
    """A model of its own whose rotary embedding has the other frequencies for good."""
    model = tiny_model(family, **config)
    rotary = adapter_for(model).language_model(model).rotary_emb
    rotary.inv_freq = ntk_frequencies(rotary.inv_freq, scale)
    return model


def scales(out) -> list[float]:
    (found,) = {id(layer.rotary_B): layer.rotary_B for layer in out.past_key_values.layers}.values()
    return found.tolist()


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_inside_the_window_no_bit_changes(family, attn):
    model, inputs = model_of(family, attn=attn), batch_of(family)
    expected, out = logits_of(model, inputs), greedy(model, inputs)
    with foveate.reduce(model, "intp(kv_bits=None)") as run:
        assert run.active
        assert torch.equal(logits_of(model, inputs), expected)
        got = greedy(model, inputs)
    assert torch.equal(got.sequences, out.sequences)
    assert all(map(torch.equal, got.logits, out.logits))
    assert all(layer.rotary_B is None for layer in got.past_key_values.layers)


@every_family
@pytest.mark.parametrize("row", [0, 1])
def test_it_is_the_model_with_other_frequencies(family, row):
    inputs = one_of(family, row)
    model = model_of(family)
    before = adapter_for(model).language_model(model).rotary_emb.inv_freq
    kept = before.clone()
    with foveate.reduce(model, STRETCH):
        out = greedy(model, inputs, 6)
    (scale,) = scales(out)
    assert scale > 1.2
    expected = greedy(stretched(family, scale), inputs, 6)
    same_steps(out, 0, expected)
    plain = greedy(model, inputs, 6)
    assert (plain.logits[0] - out.logits[0]).abs().max() > 100 * TOLERANCE
    after = adapter_for(model).language_model(model).rotary_emb.inv_freq
    assert after is before and torch.equal(after, kept)


@every_family
def test_every_sample_has_its_own_scale(family):
    model = model_of(family)
    with foveate.reduce(model, STRETCH):
        together = greedy(model, batch_of(family), 6)
        alone = [greedy(model, one_of(family, row), 6) for row in range(3)]
        beams = greedy(model, batch_of(family), num_beams=3).sequences[:, -4:]
        for row in range(3):
            one = greedy(model, one_of(family, row), num_beams=3).sequences[0, -4:]
            assert beams[row].tolist() == one.tolist()
    assert len(set(scales(together))) == 3 and scales(together)[2] == 1
    for row in range(3):
        same_steps(together, row, alone[row])
        if row < 2:
            assert scales(alone[row]) == scales(together)[row : row + 1]


@every_family
def test_several_tokens_at_a_time_are_rotated_alike(family):
    model, inputs = model_of(family), one_of(family)
    with foveate.reduce(model, STRETCH):
        expected = greedy(model, inputs, 8).sequences
        got = model.generate(
            **inputs, do_sample=False, max_new_tokens=8, prompt_lookup_num_tokens=3
        )
    # The first guess is part of the prompt that fixes the scale, so only the shape must agree.
    assert got.shape == expected.shape


@every_family
def test_a_second_turn_keeps_the_first_scale(family):
    model, inputs = model_of(family), one_of(family)
    with foveate.reduce(model, STRETCH):
        first = greedy(model, inputs, 3)
        (scale,) = scales(first)
        turn = second_turn(model, inputs, first)
        second = greedy(model, {**turn, "past_key_values": first.past_key_values}, 3)
        assert scales(second) == [scale]
    oracle = stretched(family, scale)
    first = greedy(oracle, inputs, 3)
    expected = greedy(oracle, {**turn, "past_key_values": first.past_key_values}, 3)
    same_steps(second, 0, expected)


def test_a_second_image_says_that_the_scale_stays():
    family = "llava_onevision"
    model = model_of(family)
    more = tiny_inputs(family, samples=(Sample(text=(2, 4), items=("image",), seed=5),))
    length = more["input_ids"].shape[1]
    for row, kept in ((0, None), (2, 1.0)):
        with foveate.reduce(model, STRETCH) as run, torch.no_grad():
            cache = model(**one_of(family, row)).past_key_values
            before = cache.layers[0].rotary_B if row == 0 else None
            mask = torch.ones(1, cache.get_seq_length() + length, dtype=torch.long)
            model(**{**more, "attention_mask": mask, "past_key_values": cache})
            after = cache.layers[0].rotary_B
            assert (before is after) and (kept is None or after is None)
            note = next(note for note in run.report.notes if "stays" in note)
            assert "positions stretched by" in note and "would need" in note


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_generation_beyond_the_window(family):
    """A model of 24 positions reads more and answers; the slowest pair stays inside."""
    model = tiny_model(family)
    adapter_for(model).text_config(model).max_position_embeddings = 24
    inputs = tiny_inputs(family, samples=samples_of(family)[:2])
    seen: list[torch.Tensor] = []
    text = adapter_for(model).language_model(model)
    hook = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with foveate.reduce(model, "intp(answer=20)"):
        out = greedy(model, inputs, 20)
        hook.remove()
        seen.clear()
        hook = text.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        again = greedy(model, inputs, 20)
    hook.remove()
    assert torch.equal(out.sequences, again.sequences) and len(out.logits) == 20
    assert all(torch.isfinite(step).all() for step in out.logits)
    scale_B = torch.tensor(scales(out))
    top_B = torch.stack([p[-3:].reshape(-1, *p.shape[-2:]).amax((0, 2)) for p in seen]).amax(0)
    assert (top_B > 24).any() and (top_B / scale_B < 24).all()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_were_scaled_before_are_stretched_further(rope):
    rope = {"rope_theta": 10000.0, **rope}
    base = tiny_model("llava_onevision").config.to_dict()["text_config"]
    config = {"text_config": {**base, "rope_parameters": rope}}
    model, inputs = tiny_model("llava_onevision", **config), one_of("llava_onevision")
    with foveate.reduce(model, STRETCH):
        out = greedy(model, inputs, 4)
    expected = greedy(stretched("llava_onevision", scales(out)[0], **config), inputs, 4)
    same_steps(out, 0, expected)


def test_models_that_rescale_by_themselves_are_refused():
    base = tiny_model("llava_onevision").config.to_dict()["text_config"]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llava_onevision", text_config={**base, "rope_parameters": rope})
    with pytest.raises(AttachmentError, match=r"'dynamic'.*intp@cache"):
        foveate.reduce(model, "intp")
    with foveate.reduce(model, "intp@cache"):
        logits_of(model, one_of("llava_onevision"))


def test_the_scale_counts_what_the_recipe_leaves():
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    found = {}
    for recipe in (STRETCH, f"divprune + {STRETCH}", f"fastv + {STRETCH}"):
        with foveate.reduce(model, recipe, **({"retain": 0.3} if "+" in recipe else {})) as run:
            out = greedy(model, inputs, 2)
        found[recipe] = scales(out)[0]
        assert found[recipe] == (run.report.prompt_lengths[0] + 8) / 16
    whole, projector, decoder = found.values()
    assert projector < whole == decoder


@pytest.mark.parametrize(
    "reducer",
    [
        EveryOther((1, 3)),
        EveryOther((2,), merge=True),
        Parks((1,), back=3),
        Renumbers((1, 3)),
        "divprune",
        "quickvideo",
        "vista_llama",
        "safewatch(policies=((-4, -2), (-2, -1)))",
        "video_xl2(block_units=1, previous_blocks=1, chunk_units=1)",
    ],
    ids=lambda reducer: getattr(reducer, "name", str(reducer)[:9]),
)
@pytest.mark.parametrize(
    ("family", "storage"), [("llava_onevision", None), ("qwen3_vl", 2), ("internvl", 2)]
)
def test_with_reducers(family, reducer, storage):
    """Shorter sequences against full ones with masks: prefill, decoding, a padded batch, beams."""
    model, inputs = model_of(family), batch_of(family)
    intp = f"intp(window=16, answer=8, kv_bits={storage}, group=4, recent=8)"
    recipe = Recipe.of([reducer, intp])
    logits, ids = [], []
    for mask_only in (True, False):
        with foveate.reduce(model, recipe, mask_only=mask_only):
            logits.append(torch.stack(greedy(model, inputs, 3).logits))
            ids.append(greedy(model, inputs, 3, num_beams=3).sequences)
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)
    assert torch.equal(ids[0], ids[1])
    with foveate.reduce(model, recipe):
        for row in range(3):
            alone = torch.stack(greedy(model, one_of(family, row), 3).logits)[:, 0]
            torch.testing.assert_close(logits[1][:, row], alone, atol=TOLERANCE, rtol=0)
    with foveate.reduce(model, Recipe.of([reducer])):
        without = torch.stack(greedy(model, inputs, 3).logits)
    assert (without[0, :2] - logits[1][0, :2]).abs().max() > 100 * TOLERANCE


@dataclass(frozen=True)
class Wrong(Method):
    card = _card("wrong", "decoder")

    def rotary_scale(self, context):
        return 0.5


def test_bad_scales_and_foreign_caches_are_refused():
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    with foveate.reduce(model, Wrong()), pytest.raises(ValueError, match=r"at least 1: 0\.5"):
        logits_of(model, inputs)
    with foveate.reduce(model, STRETCH):
        cache = model(**inputs).past_key_values
    with pytest.raises(AttachmentError, match="without the recipe"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_the_report_says_what_became_of_the_frames():
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    with foveate.reduce(model, "intp") as run:
        logits_of(model, inputs)
    assert "this encoder works frame by frame, so the rearrangement is the identity" in (
        run.report.notes
    )
