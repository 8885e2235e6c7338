"""Video-XL-2: units, pooling, counts, what stays whole, and the needle that pooling blurs."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, CacheContext, Recipe
from foveate.core.blocks import PrefillContext
from foveate.errors import RecipeError
from foveate.methods.video_xl2 import (
    VideoXL2,
    cache_length,
    number_units,
    pool_units,
    pooled_length,
    relevance,
)

SIZE = 12


def context_of(kind, frames: int, retain: float = 0.5, size: int = SIZE, **fields):
    N = frames * size
    time_N = torch.arange(frames).repeat_interleave(size)
    position_N3 = torch.stack([time_N, torch.zeros(N).long(), torch.arange(N) % size], dim=1)
    return kind(
        Budget(retain=retain),
        position_N3=position_N3,
        item_N=torch.zeros(N, dtype=torch.long),
        **fields,
    )


def reduce(method: VideoXL2, frames: int, retain: float = 0.5, size: int = SIZE, keys=None):
    context = context_of(CacheContext, frames, retain, size)
    if keys is None:
        keys = torch.randn(1, 2, frames * size, 4)
    return method.cache(keys, keys, context)


# -- units and pooling ------------------------------------------------------------------------


def test_units_are_frames_of_one_item_in_prompt_order() -> None:
    time_N = torch.tensor([0.0, 0.4, 1.0, 2.0, 0.0, 1.0])
    position_N3 = torch.stack([time_N, time_N, time_N], dim=1)
    item_N = torch.tensor([0, 0, 0, 0, 1, 1])
    assert number_units(position_N3, item_N).tolist() == [0, 0, 1, 2, 3, 4]
    assert number_units(position_N3, item_N, unit_frames=2).tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("drop_tail", [False, True])
def test_windows(drop_tail: bool) -> None:
    unit_N = torch.tensor([0] * 9 + [1] * 3 + [2] * 2)
    reduction = pool_units(unit_N, torch.tensor([False, True, False]), 4, drop_tail=drop_tail)
    x_1N1 = torch.arange(14.0).view(1, -1, 1)
    got = reduction.apply(x_1N1)[0, :, 0].tolist()
    second = 5.5 if drop_tail else 6.0  # the ninth token joins, or is gone
    assert got == [1.5, second, 9.0, 10.0, 11.0, 12.5]
    assert len(got) == cache_length([9, 3, 2], [False, True, False], 4)


def test_constants_stay_constant_and_dense_entries_exact() -> None:
    keys = torch.full((1, 2, 16 * SIZE, 4), 0.3)
    reduction = reduce(VideoXL2(), 16, keys=keys)
    pooled = reduction.apply(keys.transpose(1, 2))
    torch.testing.assert_close(pooled, torch.full_like(pooled, 0.3), atol=1e-6, rtol=0)
    keys = torch.randn(1, 2, 16 * SIZE, 4)
    reduction = reduce(VideoXL2(chunk_units=1, chunks=(3,)), 16, keys=keys)
    mine = reduction.groups_BN[0, 3 * SIZE : 4 * SIZE]
    rows = reduction.apply(keys.transpose(1, 2))[0, mine]
    assert torch.equal(rows.transpose(0, 1), keys[0, :, 3 * SIZE : 4 * SIZE])


# -- how many ---------------------------------------------------------------------------------


def test_published_count() -> None:
    """256 frames: 64 units of 144 tokens, 16 chunks, 4 retrieved ones beside the ends."""
    method = VideoXL2(chunk_units=4, compression=4, chunks=(2, 5, 6, 11))
    dense = method.dense_units([144] * 64, Budget(retain=0.5))
    assert sum(dense) == 6 * 4
    assert cache_length([144] * 64, dense, 4) == 24 * 144 + 40 * 36
    assert cache_length([144] * 64, dense, 4, num_text=64 * 10) == 24 * 144 + 40 * 36 + 640


@pytest.mark.parametrize("frames", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("retain", [0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_budget_is_kept(frames: int, retain: float) -> None:
    reduction = reduce(VideoXL2(), frames, retain, size=196)
    most = Budget(retain=retain).count(frames * 196)
    # What is missing is less than a whole chunk or a narrower window would have taken.
    assert 0.75 * min(most, frames * 98) <= reduction.num_out <= most


def test_a_window_that_is_given_binds_and_one_token_per_unit_stays() -> None:
    assert reduce(VideoXL2(compression=4), 16, 0.05).num_out == 16 * pooled_length(SIZE, 4)
    assert reduce(VideoXL2(), 16, 0.01).num_out == 16
    assert VideoXL2(compression=7).window(Budget(retain=0.9)) == 7


def test_full_budget_no_tokens_and_windows_of_one_change_nothing() -> None:
    assert reduce(VideoXL2(), 8, 1.0) is None
    assert reduce(VideoXL2(compression=1), 8, 0.2) is None
    assert reduce(VideoXL2(chunks=()), 8, 0.2) is None
    empty = torch.zeros(1, 2, 0, 4)
    assert VideoXL2().cache(empty, empty, context_of(CacheContext, 0)) is None
    assert VideoXL2().prefill(context_of(PrefillContext, 8, 1.0)) is None


def test_blocks() -> None:
    context = context_of(PrefillContext, 9, x_ND=torch.randn(9 * SIZE, 5))
    blocks = VideoXL2(block_units=4, previous_blocks=3).prefill(context)
    assert blocks.previous == 3
    assert blocks.block_N.tolist() == [0] * 4 * SIZE + [1] * 4 * SIZE + [2] * SIZE


# -- what stays whole -------------------------------------------------------------------------


def test_order_of_preference() -> None:
    score_U = torch.zeros(16)
    score_U[9] = 1.0
    method = VideoXL2(chunk_units=1)

    def dense(retain: float, **changes) -> list[int]:
        found = method.with_arguments(**changes).dense_units([16] * 16, Budget(retain), score_U)
        return [unit for unit, whole in enumerate(found) if whole]

    assert dense(0.14) == [9]
    assert dense(0.23) == [0, 9]
    assert dense(0.3) == [0, 9, 15]
    assert dense(0.5) == [0, 1, 2, 9, 15]
    assert dense(0.5, top_k=1) == [0, 9, 15]
    assert dense(0.5, top_k=1, ends=False) == [9]
    assert dense(0.01, chunks=(4,)) == [0, 4, 15]
    assert dense(0.01, chunks=(4, 6), ends=False) == [4, 6]


def test_relevance_finds_the_unit_that_the_question_speaks_of() -> None:
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(12, 32, generator=generator)
    common = 5 * torch.randn(32, generator=generator)
    unit_N = torch.arange(12).repeat_interleave(SIZE)
    x_ND = topics[unit_N] + common + 0.3 * torch.randn(12 * SIZE, 32, generator=generator)
    for unit in range(12):
        text_TD = topics[unit] + common + 0.5 * torch.randn(6, 32, generator=generator)
        assert int(relevance(x_ND, unit_N, text_TD).argmax()) == unit
    assert relevance(x_ND, unit_N, x_ND[:0]).tolist() == [0.0] * 12


def test_needle() -> None:
    """One token of unit 6 answers the query when its chunk is whole, and fades when pooled."""
    frames, d = 16, 32
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 1, frames * SIZE, d, generator=generator)
    values = torch.zeros(1, 1, frames * SIZE, 1)
    needle = 6 * SIZE + 5
    query = 3 * torch.randn(d, generator=generator)
    keys[..., needle, :] = query / query.norm() * 6
    values[..., needle, :] = 1.0

    def answer(method: VideoXL2) -> float:
        reduction = method.cache(keys, values, context_of(CacheContext, frames))
        k, v = (reduction.apply(x.transpose(1, 2))[0, :, 0] for x in (keys, values))
        return float(((k @ query) * d**-0.5).softmax(0) @ v[:, 0])

    assert answer(VideoXL2(chunk_units=1, chunks=(6,))) > 0.9
    assert answer(VideoXL2(chunk_units=1, chunks=(9,))) < 0.2


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_units": 0}, "block_units must be at least 1"),
        ({"unit_frames": 0}, "unit_frames"),
        ({"compression": 0}, "compression"),
        ({"previous_blocks": -1}, "previous_blocks must be 0 or more"),
        ({"top_k": -1}, "top_k"),
        ({"chunks": (-1,)}, "whole numbers from 0"),
        ({"chunks": (0.5,)}, "whole numbers from 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoXL2(**arguments)


def test_chunks_that_do_not_exist_and_scores_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"names \[16\], but the video has 16 chunks"):
        reduce(VideoXL2(chunk_units=1, chunks=(2, 16)), 16)
    method = VideoXL2(scorer=lambda context, unit_N: torch.zeros(3))
    with pytest.raises(ValueError, match=r"one score per unit, \[8\], got \(3,\)"):
        method.prefill(context_of(PrefillContext, 8))


def test_recipes() -> None:
    recipe = Recipe.parse("video_xl2(chunks=(2, 3), compression=4)")
    assert Recipe.from_json(recipe.to_json()) == recipe
    scored = Recipe.of(VideoXL2(scorer=lambda context, unit_N: unit_N))
    with pytest.raises((RecipeError, TypeError)):
        scored.to_json()
