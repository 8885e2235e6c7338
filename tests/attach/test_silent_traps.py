"""Six ways of shortening a prompt that give wrong numbers and no error; none may come back.

Legend: B samples, L padded tokens, S tokens of a sample, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attach_suite import TOLERANCE, attach, greedy, logits_of, model_of, same_steps
from oracle_methods import EveryOther, EveryOtherAtEntry, _card
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import foveate
from foveate.core import Method
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from tiny import Sample, tiny_encoder, tiny_inputs, tiny_model

FAMILIES = ("llava_onevision", "qwen3_vl")
on_both = pytest.mark.parametrize("family", FAMILIES)
METHODS = (EveryOther((1, 3)), EveryOtherAtEntry())
every_method = pytest.mark.parametrize("method", METHODS, ids=["decoder", "projector"])


def reduced(method, mask_only=False):
    def attach_to(model):
        return foveate.reduce(
            model, method, tokens=10**6, positions="original", mask_only=mask_only
        )

    return attach_to


@every_method
def test_1_static_cache(method):
    """Its mask says that all slots are valid; pruned layers leave slots of zeros."""
    model, inputs = model_of("llava_onevision"), tiny_inputs("llava_onevision")
    config = adapter_for(model).text_config(model)
    for length in (inputs["input_ids"].shape[1], 200):
        cache = StaticCache(config=config, max_cache_len=length)
        with (
            torch.no_grad(),
            reduced(method)(model),
            pytest.raises(AttachmentError, match="static cache"),
        ):
            model(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == 0


@on_both
@every_method
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_2_several_queries_on_a_longer_past(family, method, attn):
    """Without a mask, fused kernels are causal from the first key on and cut the others off."""
    model, inputs = model_of(family, attn=attn), tiny_inputs(family)
    new = torch.tensor([[21, 22, 23, 24]])
    results = []
    # One token at a time needs no mask, so that is the reference.
    for steps in (new.split(1, dim=1), (new,), new.split(2, dim=1)):
        with torch.no_grad(), reduced(method)(model):
            cache = model(**inputs).past_key_values
            logits = []
            for ids in steps:
                seen = cache.get_seq_length()
                position = torch.arange(seen, seen + ids.shape[1])
                rows = 3 if adapter_for(model).mrope else 1
                position = position.expand(rows, 1, -1) if rows > 1 else position[None]
                out = model(input_ids=ids, past_key_values=cache, position_ids=position)
                logits.append(out.logits)
        results.append(torch.cat(logits, dim=1))
        # The layers that came short are as long as they should be, and shorter than the first.
        assert cache.layers[3].length == cache.layers[3].keys.shape[-2]
        assert cache.layers[3].length < cache.get_seq_length()
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], atol=TOLERANCE, rtol=0)


@dataclass(frozen=True)
class ReadsAttention(Method):
    """Keeps all and stores the attention of every layer."""

    card = _card("reads_attention", "decoder")

    def decoder_layers(self, num_layers):
        return range(1, num_layers)

    def attention_layers(self, num_layers):
        return range(num_layers - 1)

    def decoder(self, tokens, context):
        view = context.attention(context.layer - 1)
        rows = torch.arange(view.q_BHSd.shape[2])
        SEEN.append(view.rows(rows))
        return None


SEEN: list[torch.Tensor] = []


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_3_scores_without_an_eager_layer(family):
    """An eager layer in a model without masks attends to the future."""
    inputs = tiny_inputs(family)
    eager, model = model_of(family, attn="eager"), model_of(family)
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).attentions
    names = [module.config._attn_implementation for module in model.modules() if is_set(module)]
    untouched = logits_of(model, inputs)
    SEEN.clear()
    with foveate.reduce(model, ReadsAttention(), retain=0.5):
        got = logits_of(model, inputs)
        during = [m.config._attn_implementation for m in model.modules() if is_set(m)]
    assert names == during and set(names) == {"sdpa"}
    torch.testing.assert_close(got, untouched, atol=TOLERANCE, rtol=0)
    assert len(SEEN) == 3
    for rows_1HSS, theirs_1HSS in zip(SEEN, expected, strict=False):
        torch.testing.assert_close(rows_1HSS, theirs_1HSS, atol=1e-5, rtol=0)
        assert (rows_1HSS.triu(1) == 0).all(), "the future was attended to"


def is_set(module: torch.nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation")


@pytest.fixture
def plain_attention():
    """An attention function that somebody registered; its mask function is the test's affair."""
    AttentionInterface.register("plain", sdpa_attention_forward)
    yield "plain"
    del ALL_ATTENTION_FUNCTIONS._global_mapping["plain"]
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("plain", None)


def test_4_attention_without_its_mask_function(plain_attention):
    """The model builds no mask for such a name, so that padded columns are attended to."""
    family = "llava_onevision"
    samples = (Sample(seed=0), Sample(text=(2, 3), items=("video",), seed=1))
    model = tiny_model(family)
    text = adapter_for(model).text_config(model)
    text._attn_implementation = plain_attention
    with pytest.raises(AttachmentError, match="has no mask function"):
        attach("divprune", model)
    AttentionMaskInterface.register(plain_attention, sdpa_mask)
    with attach("divprune", model):
        together = greedy(model, tiny_inputs(family, samples=samples))
        for row, sample in enumerate(samples):
            same_steps(together, row, greedy(model, tiny_inputs(family, samples=(sample,))))


def test_4_nothing_is_registered_or_patched():
    model, inputs = model_of("llava_onevision"), tiny_inputs("llava_onevision")
    tables = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    before = [dict(table.items()) for table in tables]
    with foveate.reduce(model, "tome + fastervlm + fastv + quickvideo", retain=0.5):
        greedy(model, inputs, 2)
        assert [dict(table.items()) for table in tables] == before
    assert [dict(table.items()) for table in tables] == before


def test_4_kernels_that_cannot_weigh_sizes_are_refused():
    encoder = tiny_encoder("vit")
    encoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AttachmentError, match="prop_attn=False"):
        foveate.reduce(encoder, "tome")
    with foveate.reduce(encoder, "tome", prop_attn=False) as run:
        assert run.attached


@on_both
@every_method
def test_5_gaps_in_positions_are_no_packed_sequences(family, method):
    """Without mask and cache, models read a jump of the positions as the start of a sequence."""
    model = model_of(family)
    inputs = {k: v for k, v in tiny_inputs(family).items() if k != "attention_mask"}
    whole = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    oracle = EveryOther((0,)) if isinstance(method, EveryOtherAtEntry) else method
    with reduced(oracle, mask_only=True)(model):
        expected = logits_of(model, whole)[:, -1]
    with reduced(method)(model):
        for given in (inputs, whole):
            for use_cache in (False, True):
                got = logits_of(model, given, use_cache=use_cache)[:, -1]
                torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@on_both
@pytest.mark.parametrize("recipe", ["divprune", "fastv", "quickvideo"])
@pytest.mark.parametrize("positions", ["original", "auto"])
def test_6_unequal_reduction_in_a_batch(family, recipe, positions):
    """The mask of generate() keeps the length and the padding of the unreduced prompt."""
    model = model_of(family)
    # Equal lengths, so that the incoming mask shows no padding at all; then unequal ones.
    for texts in (((5, 7), (5, 7)), ((5, 7), (1, 2))):
        samples = tuple(Sample(text=t, seed=3 * i) for i, t in enumerate(texts))
        inputs = tiny_inputs(family, samples=samples)
        assert bool(inputs["attention_mask"].all()) == (texts[0] == texts[1])
        with foveate.reduce(model, recipe, retain=[0.2, 0.9], positions=positions) as run:
            together = greedy(model, inputs)
        assert len(set(run.report.cache_lengths[0]) | set(run.report.cache_lengths[1])) > 1
        for row, retain in enumerate((0.2, 0.9)):
            with foveate.reduce(model, recipe, retain=retain, positions=positions):
                alone = greedy(model, tiny_inputs(family, samples=samples[row : row + 1]))
            same_steps(together, row, alone)
