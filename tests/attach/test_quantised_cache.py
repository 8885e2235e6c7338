"""A cache stored in few bits: what it holds, what changes it, and what attention reads from it.

Legend: B samples, G key heads, T slots, d head channels.
"""

from __future__ import annotations

import copy

import pytest
import torch
from attach_suite import TOLERANCE, batch_of, greedy, logits_of, model_of, one_of
from transformers.cache_utils import DynamicCache

import foveate
from foveate.attach.cache import ReducedLayer
from foveate.attach.quantised import QuantisedLayer
from foveate.core import CacheStorage
from tiny import tiny_inputs

SMALL = CacheStorage(bits=2, group=4, recent=6)
FAMILIES = ("llava_onevision", "qwen3_vl", "internvl")
every_family = pytest.mark.parametrize("family", FAMILIES)


def states(batch: int, length: int, seed: int, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 2, length, d, generator=generator)
    return keys + 3, values


def feed(layer: ReducedLayer, keys, values, valid=None) -> None:
    layer.expect(valid, keys.shape[2])
    layer.update(keys, values)
    layer.settle()


def filled(storage: CacheStorage, length: int, steps: int = 0, batch: int = 2) -> QuantisedLayer:
    layer = QuantisedLayer(storage)
    keys, values = states(batch, length + steps, seed=0)
    feed(layer, keys[:, :, :length], values[:, :, :length])
    for step in range(length, length + steps):
        feed(layer, keys[:, :, step : step + 1], values[:, :, step : step + 1])
    return layer


@pytest.mark.parametrize("length", [3, 9, 10, 14, 29])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 13])
def test_old_tokens_are_rounded_and_new_ones_are_not(length, steps):
    layer = filled(SMALL, length, steps)
    keys, values = states(2, length + steps, seed=0)
    stored = max(0, (length + steps - SMALL.recent) // 4 * 4)
    assert (layer.packed[0].num_tokens if layer.packed else 0) == stored
    assert layer.length == layer.get_seq_length() == length + steps
    for got, exact, which in ((layer.keys, keys, 0), (layer.values, values, 1)):
        assert torch.equal(got[:, :, stored:], exact[:, :, stored:])
        if stored:
            error = (got - exact)[:, :, :stored].abs()
            step = layer.packed[which].step
            for dim in (2, 3):
                step = step.repeat_interleave(error.shape[dim] // step.shape[dim], dim)
            assert (error <= 0.51 * step).all() and (error > 0.1 * step).any()


def test_what_is_stored_is_never_rounded_again():
    layer, keys = filled(SMALL, 18), states(2, 60, seed=1)
    first = layer.keys[:, :, :12].clone()
    for step in range(40):
        feed(layer, *(x[:, :, step : step + 1] for x in keys))
        layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.packed[0].num_tokens == 52
    assert torch.equal(layer.keys[:, :, :12], first)


def test_only_recent_tokens_stay_in_full_precision():
    storage = CacheStorage()
    layer = QuantisedLayer(storage)
    keys, values = (x.half() for x in states(1, 4096 + 128, seed=0, d=128))
    feed(layer, keys, values)
    assert layer.recent[0].shape[2] == 128 and layer._whole == [None, None]
    recent = 2 * layer.recent[0].nbytes
    assert layer.full_nbytes == keys.nbytes + values.nbytes
    assert layer.nbytes - recent <= (layer.full_nbytes - recent) / 7
    # No view keeps more alive than it shows.
    assert layer.recent[0].untyped_storage().nbytes() == layer.recent[0].nbytes


def padded(lengths: list[int], total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = states(len(lengths), total, seed=0)
    valid = torch.arange(total) >= total - torch.tensor(lengths)[:, None]
    return keys, values, valid


@pytest.mark.parametrize("lengths", [[23, 11], [4, 23], [17, 17], [23, 2]])
def test_padding_changes_nothing(lengths):
    keys, values, valid = padded(lengths, 23)
    together = QuantisedLayer(SMALL)
    feed(together, keys, values, valid)
    more = states(2, 9, seed=3)
    for step in range(9):
        feed(together, *(x[:, :, step : step + 1] for x in more))
    for row, length in enumerate(lengths):
        alone = QuantisedLayer(SMALL)
        feed(alone, *(x[row : row + 1, :, 23 - length :] for x in (keys, values)))
        for step in range(9):
            feed(alone, *(x[row : row + 1, :, step : step + 1] for x in more))
        mine = together.valid_BT[row]
        assert torch.equal(together.keys[row, :, mine], alone.keys[0])
        assert torch.equal(together.values[row, :, mine], alone.values[0])


def both(lengths: list[int]) -> tuple[QuantisedLayer, ReducedLayer]:
    """A stored layer, and a plain one that holds what can be read from it."""
    keys, values, valid = padded(lengths, max(lengths))
    valid = None if len(set(lengths)) == 1 else valid
    layer = QuantisedLayer(SMALL)
    feed(layer, keys, values, valid)
    plain = ReducedLayer()
    plain.expect(valid, max(lengths))
    plain.update(layer.keys, layer.values)
    return layer, plain


CHANGES = {
    "reorder": lambda x: x.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda x: x.batch_repeat_interleave(3),
    "select": lambda x: x.batch_select_indices(torch.tensor([1])),
    "crop a little": lambda x: x.crop(-2),
    "crop into what is stored": lambda x: x.crop(-11),
    "crop all but one": lambda x: x.crop(-20),
    "keep the first": lambda x: x.keep(torch.arange(15).expand(2, -1), None),
    "keep others": lambda x: x.keep(torch.arange(0, 20, 2).expand(2, -1), None),
}


@pytest.mark.parametrize("lengths", [[21, 21], [21, 13]])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_cache_changes_what_is_stored(change, lengths):
    layer, plain = both(lengths)
    if change.startswith("keep") and lengths[1] < 21:
        first = torch.arange(21).expand(2, -1)
        for x in (layer, plain):
            valid = (first >= 8) & x.valid_BT if "others" in change else x.valid_BT
            x.keep(first, valid)
    else:
        CHANGES[change](layer)
        CHANGES[change](plain)
    real = torch.ones_like(plain.keys[:, 0, :, 0], dtype=torch.bool)
    real = real if plain.valid_BT is None else plain.valid_BT

    def compare(exact: bool) -> None:
        for ours, theirs in zip(layer.kv, plain.kv, strict=True):
            ours, theirs = ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
            assert torch.equal(ours, theirs) if exact else ours.shape == theirs.shape
        assert layer.length == plain.length and layer.seen == plain.seen

    compare(exact=True)
    layer.settle()
    # Only where stored tokens were taken away are the others stored anew.
    compare(exact="others" not in change)
    num = plain.keys.shape[0]
    more = states(num, 5, seed=9)
    real = torch.cat([real, real.new_ones(num, 5)], dim=1)
    for x in (layer, plain):
        x.expect(None, 5)
        x.update(*more)
    for ours, theirs in zip(layer.kv, plain.kv, strict=True):
        assert torch.equal(ours[:, :, -5:], theirs[:, :, -5:])
        assert ours.shape == theirs.shape
    layer.settle()
    assert layer._whole == [None, None]


def test_resetting_empties_it():
    layer = filled(SMALL, 20)
    layer.reset()
    assert layer.length == layer.get_seq_length() == layer.nbytes == 0 and layer.packed is None
    feed(layer, *states(2, 20, seed=0))
    assert torch.equal(layer.keys, filled(SMALL, 20).keys)


def test_a_copy_is_independent():
    layer = filled(SMALL, 20)
    other, before = copy.deepcopy(layer), layer.keys
    feed(other, *states(2, 8, seed=4))
    assert layer.length == 20 and torch.equal(layer.keys, before)


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_next_token_reads_what_is_stored(family, attn):
    """A plain cache with the restored keys and values gives the same next step."""
    model, inputs = model_of(family, attn=attn), one_of(family)
    expected = logits_of(model, inputs)
    with foveate.reduce(model, "intp(group=4, recent=8)") as run, torch.no_grad():
        out = model(**inputs)
        assert torch.equal(out.logits, expected)
        cache = out.past_key_values
        assert all(layer.packed is not None for layer in cache.layers)
        plain = DynamicCache()
        for number, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), number)
        (note,) = [note for note in run.report.notes if "bytes" in note]
        held, full = (int(word.replace(",", "")) for word in note.split() if word[0].isdigit())
        assert held == sum(layer.nbytes for layer in cache.layers) < full
        assert full == sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
        step = torch.tensor([[7]])
        got = model(input_ids=step, past_key_values=cache).logits
    with torch.no_grad():
        alone = model(input_ids=step, past_key_values=plain).logits
        exact = model(**inputs).past_key_values
        full = model(input_ids=step, past_key_values=exact).logits
    torch.testing.assert_close(got, alone, atol=TOLERANCE, rtol=0)
    assert (got - full).abs().max() > 100 * TOLERANCE


@every_family
def test_more_bits_are_closer(family):
    model, inputs = model_of(family), one_of(family)
    exact = greedy(model, inputs, 2).logits[1]
    gaps = {}
    for bits in (2, 4):
        with foveate.reduce(model, f"intp(kv_bits={bits}, group=4, recent=0)@cache"):
            gaps[bits] = float((greedy(model, inputs, 2).logits[1] - exact).abs().mean())
    assert 0 < gaps[4] < 0.5 * gaps[2]


def test_short_prompts_are_not_stored():
    """Defaults keep the last 128 tokens as they are."""
    model, inputs = model_of("llava_onevision"), batch_of("llava_onevision")
    expected = greedy(model, inputs, 6)
    with foveate.reduce(model, "intp") as run:
        got = greedy(model, inputs, 6)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(layer.packed is None for layer in got.past_key_values.layers)
    assert not any("bytes" in note for note in run.report.notes)


def test_with_a_method_that_chooses_once_for_all_layers():
    """The layers wait for its choice, and are stored when it is made."""
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    recipe = "safewatch(policies=((-4, -2), (-2, -1)))@cache + intp(group=4, recent=8)@cache"
    with foveate.reduce(model, recipe) as run:
        out = greedy(model, inputs, 3)
    lengths = run.report.cache_lengths[0]
    assert max(lengths) < inputs["input_ids"].shape[1]
    for layer, length in zip(out.past_key_values.layers, lengths, strict=True):
        assert layer.length == length + 2 and layer.packed is not None
        assert layer._whole == [None, None]


def test_long_prompts_with_the_published_settings():
    model = model_of("llava_onevision")
    inputs = tiny_inputs("llava_onevision", modality="video", frames=40)
    with foveate.reduce(model, "intp") as run:
        out = greedy(model, inputs, 70)
    length = inputs["input_ids"].shape[1]
    stored = {layer.packed[0].num_tokens for layer in out.past_key_values.layers}
    assert stored == {(length + 69 - 128) // 64 * 64} and run.report.prompt_lengths == [length]


def test_the_rest_of_a_recipe_can_be_left_out():
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    for recipe, kind in (("intp@cache", QuantisedLayer), ("intp@decoder", ReducedLayer)):
        with foveate.reduce(model, recipe):
            cache = model(**inputs).past_key_values
        assert {type(layer) for layer in cache.layers} == {kind}


def test_bad_storage_is_refused():
    for wrong, match in (({"bits": 3}, "2 or 4"), ({"group": 0}, "group"), ({"recent": -1}, "-1")):
        with pytest.raises(ValueError, match=match):
            CacheStorage(**wrong)
