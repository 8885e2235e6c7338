"""SafeWatch inside models: what the order of policies, other policies and pruning may change.

Legend: S tokens of a sample, M policies.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attach_suite import TOLERANCE, greedy, logits_of, model_of
from transformers import DynamicCache

import foveate
from foveate.errors import RecipeError
from foveate.methods.safewatch import SafeWatch
from tiny import Sample, tiny_inputs

FAMILIES = ("llava_onevision", "qwen3_vl", "internvl")
every_family = pytest.mark.parametrize("family", FAMILIES)
POLICIES = ((21, 22, 23), (31, 32, 33, 34, 35), (41, 42))
QUERY = (51, 52, 53)


def prompt(family: str, policies: Any = POLICIES) -> tuple[dict[str, torch.Tensor], SafeWatch]:
    """[some text][visual][more text][policies][query], and the method that knows where."""
    tail = [token for policy in policies for token in policy] + list(QUERY)
    inputs = tiny_inputs(family, samples=(Sample(text=(4, 2), seed=0),))
    length = inputs["input_ids"].shape[1]
    added = torch.tensor([tail])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], added], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(tail)))
    spans, start = [], length
    for policy in policies:
        spans.append((start, start + len(policy)))
        start += len(policy)
    return inputs, SafeWatch(policies=tuple(spans))


def parallel(model, inputs, method):
    """Everything at the decoder, nothing at the cache."""
    return foveate.reduce(
        model, foveate.Recipe.of("safewatch@decoder").with_arguments(policies=method.policies)
    )


def states(model, inputs, method) -> torch.Tensor:
    with parallel(model, inputs, method), torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[-1][0]


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_order_of_policies_does_not_matter(family, attn):
    model = model_of(family, attn=attn)
    inputs, method = prompt(family)
    one = states(model, inputs, method)
    with parallel(model, inputs, method):
        answer = torch.stack(greedy(model, inputs).logits)
    order = (2, 0, 1)
    swapped, swapped_method = prompt(family, [POLICIES[i] for i in order])
    other = states(model, swapped, swapped_method)
    for place, policy in enumerate(order):
        (a, b), (c, d) = method.policies[policy], swapped_method.policies[place]
        torch.testing.assert_close(other[c:d], one[a:b], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(other[-len(QUERY) :], one[-len(QUERY) :], atol=1e-4, rtol=0)
    with parallel(model, swapped, swapped_method):
        again = torch.stack(greedy(model, swapped).logits)
    torch.testing.assert_close(again, answer, atol=1e-4, rtol=0)
    plain, plain_swapped = (logits_of(model, given)[0, -1] for given in (inputs, swapped))
    assert (plain - plain_swapped).abs().max() > 1e-2, "without the rule the order matters"


@every_family
def test_another_policy_changes_no_policy(family):
    model = model_of(family)
    inputs, method = prompt(family)
    more, more_method = prompt(family, [*POLICIES, (61, 62, 63)])
    one, other = states(model, inputs, method), states(model, more, more_method)
    end = method.policies[-1][1]
    torch.testing.assert_close(other[:end], one[:end], atol=TOLERANCE, rtol=0)
    assert (other[-1] - one[-1]).abs().max() > 1e-3


@every_family
def test_one_policy_is_ordinary_encoding(family):
    model = model_of(family)
    inputs, method = prompt(family, POLICIES[:1])
    expected = greedy(model, inputs).logits
    with parallel(model, inputs, method):
        got = greedy(model, inputs).logits
    assert torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize("family", ["llava_onevision", "internvl", "llava"])
def test_masked_and_batched_forms_agree(family):
    """Every policy alone behind the shared prefix, and the caches joined, on the bare model."""
    model = model_of(family)
    inputs, method = prompt(family)
    with parallel(model, inputs, method):
        expected = logits_of(model, inputs)[0, -1]
    first, end = method.policies[0][0], method.policies[-1][1]
    ids = inputs["input_ids"]
    prefix = {**inputs, "input_ids": ids[:, :first], "attention_mask": ids[:, :first] * 0 + 1}
    run = partial(_continue, model)
    with torch.no_grad():
        base = model(**prefix).past_key_values
        joined = [(layer.keys, layer.values) for layer in base.layers]
        for a, b in method.policies:
            cache = DynamicCache()
            for number, layer in enumerate(base.layers):
                cache.update(layer.keys.clone(), layer.values.clone(), number)
            run(ids[:, a:b], cache, first)
            joined = [
                (torch.cat([k, x.keys[:, :, first:]], 2), torch.cat([v, x.values[:, :, first:]], 2))
                for (k, v), x in zip(joined, cache.layers, strict=True)
            ]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(joined):
            cache.update(keys, values, number)
        longest = max(b - a for a, b in method.policies)
        got = run(ids[:, end:], cache, first + longest).logits[0, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def _continue(model, ids, cache, start):
    """More tokens on a cache, numbered from `start`."""
    positions = torch.arange(start, start + ids.shape[1])[None]
    mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, position_ids=positions)


@every_family
@pytest.mark.parametrize("recipe", ["safewatch", "safewatch@cache"])
@pytest.mark.parametrize("beams", [1, 3])
def test_pruned_cache_equals_masked_keys(family, recipe, beams):
    """The prefill is whole; only the answer's rows do not see what was dropped."""
    model = model_of(family)
    inputs, method = prompt(family)
    made = foveate.Recipe.of(recipe).with_arguments(policies=method.policies)
    logits, lengths = [], []
    for mask_only in (True, False):
        with foveate.reduce(model, made, retain=0.25, mask_only=mask_only) as run:
            out = greedy(model, inputs, num_beams=beams)
            logits.append(torch.stack(out.logits))
            cache = model(**inputs).past_key_values
            lengths.append([layer.keys.shape[-2] for layer in cache.layers])
            report = run.report
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)
    S, N = inputs["input_ids"].shape[1], report.visual_before
    # Peak keys while decoding: everything but the visual tokens beyond the budget, in all layers.
    assert len(set(lengths[1])) == 1 and lengths[1] == report.cache_lengths[0]
    assert S - N < lengths[1][0] <= S - N + round(0.25 * N)
    assert set(lengths[0]) == {S} and report.layer_lengths[0] == [S] * len(lengths[0])
    kept = {tuple(stage.after) for stage in report.stages}
    assert kept == {(lengths[1][0] - (S - N),)}


@every_family
def test_keeping_every_token_changes_nothing(family):
    model = model_of(family)
    inputs, method = prompt(family)
    with foveate.reduce(model, method, tokens=10**6):
        got = torch.stack(greedy(model, inputs).logits)
    with parallel(model, inputs, method):
        torch.testing.assert_close(got, torch.stack(greedy(model, inputs).logits), atol=0, rtol=0)


@every_family
def test_with_reducers_before_it(family):
    """Spans speak of the unreduced prompt, whatever the projector and the decoder took."""
    model = model_of(family)
    inputs, method = prompt(family)
    for reducer in ("divprune(retain=0.5)", "fastv(retain=0.5)"):
        recipe = foveate.Recipe.of([reducer, method])
        logits = []
        for mask_only in (True, False):
            with foveate.reduce(model, recipe, mask_only=mask_only) as run:
                logits.append(torch.stack(greedy(model, inputs).logits))
                logits_of(model, inputs)
        torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)
        assert len({stage.method for stage in run.report.stages}) == 2
        assert run.report.cache_lengths[0][-1] < run.report.layer_lengths[0][-1]


def test_pairs_that_cannot_be():
    model = model_of("llava_onevision")
    _, method = prompt("llava_onevision")
    with pytest.raises(RecipeError, match="chooses once for the caches of all layers"):
        foveate.reduce(model, foveate.Recipe.of(["quickvideo(retain=0.5)", method]), retain=0.5)
    with pytest.raises(ValueError, match="where the policies are"):
        foveate.reduce(model, "safewatch", retain=0.5)
