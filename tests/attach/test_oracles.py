"""Physically shorter prompts against full-length references: the same numbers, fewer slots."""

from __future__ import annotations

import pytest
import torch
from oracle_methods import (
    DropAll,
    EveryOther,
    EveryOtherAtEntry,
    EveryOtherSlot,
    KeepAll,
    Renumbers,
)

import foveate
from tiny import TINY_FAMILIES, Sample, tiny_inputs, tiny_modalities, tiny_model

TOLERANCE = 1e-5
CASES = [(f, m) for f in TINY_FAMILIES for m in tiny_modalities(f)]
#: Unequal counts, several items, a text-only row: padding everywhere.
BATCH = (
    Sample(text=(5, 7), items=("image",), seed=0),
    Sample(text=(3, 2, 9), items=("image", "image"), seed=1),
    Sample(text=(11,), items=(), seed=2),
)


def last_logits(model, inputs, recipe, **options):
    with torch.no_grad(), foveate.reduce(model, recipe, tokens=10**6, **options) as run:
        return model(**inputs).logits[:, -1], run.report


def generate(model, inputs, recipe, num=5, options=None, **settings):
    settings = {"do_sample": False, "max_new_tokens": num, **settings}
    with foveate.reduce(model, recipe, tokens=10**6, **(options or {})):
        out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **settings)
    return out


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_machinery_alone_changes_nothing(family, modality):
    model, inputs = tiny_model(family), tiny_inputs(family, modality=modality)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
    got, report = last_logits(model, inputs, KeepAll())
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert report.visual_before == report.visual_after > 0


@pytest.mark.parametrize(("family", "modality"), CASES)
@pytest.mark.parametrize(
    "method",
    [EveryOther((2,)), EveryOther((1, 3)), EveryOther((1, 2), merge=True), DropAll(2)],
    ids=["one_layer", "two_layers", "merge", "all"],
)
def test_decoder_stage_equals_masking(family, modality, method):
    model, inputs = tiny_model(family), tiny_inputs(family, modality=modality)
    expected, _ = last_logits(model, inputs, method, mask_only=True)
    got, report = last_logits(model, inputs, method)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    with torch.no_grad():
        untouched = model(**inputs).logits[:, -1]
    assert (got - untouched).abs().max() > 100 * TOLERANCE, "nothing was reduced"
    first = method.layers[0] if isinstance(method, EveryOther) else method.layer
    lengths = report.layer_lengths[0]
    assert lengths[first] < lengths[first - 1]
    assert report.cache_lengths[0] == lengths


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_entry_with_original_positions_equals_masking_from_layer_0(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    expected, _ = last_logits(model, inputs, EveryOther((0,)), mask_only=True)
    got, report = last_logits(model, inputs, EveryOtherAtEntry(), positions="original")
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert report.visual_after == report.visual_before // 2


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "recipe",
    [EveryOther((1, 2)), EveryOtherAtEntry(), EveryOtherSlot()],
    ids=["decoder", "projector", "cache"],
)
def test_padded_batch_equals_single_samples(family, attn, recipe):
    model = tiny_model(family, attn=attn)
    batch = tiny_inputs(family, samples=BATCH)
    together = generate(model, batch, recipe)
    for row, sample in enumerate(BATCH):
        alone = generate(model, tiny_inputs(family, samples=(sample,)), recipe)
        assert together.sequences[row, -5:].tolist() == alone.sequences[0, -5:].tolist()
        for step_together, step_alone in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step_together[row], step_alone[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("method", [EveryOther((1, 3)), EveryOtherSlot()], ids=["decoder", "cache"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_masking(family, method, beams):
    model, inputs = tiny_model(family), tiny_inputs(family, samples=BATCH)
    settings = {"num_beams": beams}
    expected = generate(model, inputs, method, options={"mask_only": True}, **settings)
    got = generate(model, inputs, method, **settings)
    assert got.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    lengths = [layer.length for layer in got.past_key_values.layers]
    full = [layer.length for layer in expected.past_key_values.layers]
    assert min(lengths) < min(full) and len(set(full)) == 1


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("method", [EveryOther((1, 3)), Renumbers((1, 3))], ids=["plain", "moved"])
def test_second_turn_on_the_returned_cache(family, method):
    """Several new tokens on a shortened cache: the mask must be causal at each layer's length."""
    model, inputs = tiny_model(family), tiny_inputs(family, samples=BATCH)
    more = torch.tensor([[11, 12, 13]] * 3)
    logits = []
    for mask_only in (True, False):
        with foveate.reduce(model, method, tokens=10**6, mask_only=mask_only):
            first = model.generate(
                **inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True
            )
            ids = torch.cat([first.sequences, more], dim=1)
            padding = inputs["attention_mask"]
            ones = torch.ones(3, ids.shape[1] - padding.shape[1], dtype=padding.dtype)
            second = model.generate(
                input_ids=ids,
                attention_mask=torch.cat([padding, ones], dim=1),
                past_key_values=first.past_key_values,
                do_sample=False,
                max_new_tokens=3,
                return_dict_in_generate=True,
                output_logits=True,
            )
        logits.append(torch.stack(second.logits))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "video_llama_3"])
def test_compact_positions_equal_a_prompt_that_was_always_short(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    seen = {}

    def spy(module, args, kwargs):
        seen.update(embeds=kwargs["inputs_embeds"])

    adapter = foveate.models.registry.adapter_for(model)
    text_model = adapter.language_model(model)
    with torch.no_grad():
        handle = text_model.register_forward_pre_hook(spy, with_kwargs=True)
        model(**inputs)
        handle.remove()
        token = adapter.placeholder_ids(model)["image"]
        visual = (inputs["input_ids"][0] == token).nonzero()[:, 0]
        keep = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        keep[visual] = False
        keep[visual[1::2]] = True
        hidden = text_model(inputs_embeds=seen["embeds"][:, keep]).last_hidden_state[:, -1]
        expected = model.get_output_embeddings()(hidden)
    got, _ = last_logits(model, inputs, EveryOtherAtEntry(), positions="compact")
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_text_only_calls_pass_untouched():
    model = tiny_model("llava_onevision")
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7, 8]])}
    with torch.no_grad():
        expected = model(**inputs).logits
        with foveate.reduce(model, EveryOther((1,)), retain=0.5) as run:
            out = model(**inputs)
        assert torch.equal(out.logits, expected)
    assert type(out.past_key_values.layers[0]).__name__ == "DynamicLayer"
    assert str(run.report) == "foveate: no visual tokens seen yet"
