"""VideoScan: carriers, eviction, what stays in the cache, and who sees whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.core import Budget, Grid, ProjectorContext, Tokens, get_method
from foveate.core.stream import RecentMemory
from foveate.methods.videoscan import (
    CarrierMemory,
    VideoScan,
    frame_carriers,
    kept_slots,
    most_redundant,
    pick_frame_tokens,
    stage2_allow,
)


def stream(memory: Any, x_TND: torch.Tensor, group: int) -> list[int]:
    """Frames remembered after all of them, pushed `group` at a time."""
    alive: list[int] = []
    for first in range(0, len(x_TND), group):
        part = x_TND[first : first + group]
        frame_L = torch.arange(len(part)).repeat_interleave(part.shape[1])
        step = memory.push(part.flatten(0, 1), frame_L, len(part))
        everyone = [*alive, *range(first, first + len(part))]
        alive = [everyone[place] for place in step.remains_K.tolist()]
    return alive


def test_groups_do_not_change_what_is_remembered() -> None:
    x_TND = torch.randn(37, 3, 8, generator=torch.Generator().manual_seed(0))
    results = [stream(CarrierMemory(6), x_TND, group) for group in (1, 5, 37)]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 5
    assert results[0][-1] == 36


def test_what_a_frame_sees_is_what_was_remembered_then() -> None:
    x_TND = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(1))
    one_by_one = CarrierMemory(4)
    whole = CarrierMemory(4).push(x_TND.flatten(0, 1), torch.arange(12).repeat_interleave(2), 12)
    for frame in range(12):
        assert whole.sees_TE[frame].nonzero()[:, 0].tolist() == stream(
            CarrierMemory(4), x_TND[:frame], 1
        )
    assert stream(one_by_one, x_TND, 1) == whole.remains_K.tolist()


def test_memory_is_bounded_for_any_length() -> None:
    memory = CarrierMemory(9)
    generator = torch.Generator().manual_seed(2)
    for count in range(1, 40):
        memory.add(torch.randn(4, generator=generator))
        assert len(memory.carriers_MD) == min(count, 8)


def test_of_two_identical_neighbours_the_older_goes() -> None:
    a, b, c = torch.eye(3)
    memory = CarrierMemory(4)
    for carrier in (a, b, b):
        assert memory.add(carrier) is None
    assert memory.add(c) == 1
    assert memory.carriers_MD.equal(torch.stack([a, b, c]))
    assert most_redundant(torch.stack([a, a, b, b])) == 0  # of equal pairs the first


def test_distinct_frame_stays_for_ever() -> None:
    generator = torch.Generator().manual_seed(3)
    static = torch.randn(16, generator=generator)
    memory = CarrierMemory(8)
    needle = torch.randn(16, generator=generator)
    for frame in range(10_000):
        noise = 0.01 * torch.randn(16, generator=generator)
        memory.add(needle if frame == 50 else static + noise)
    assert any(carrier.equal(needle) for carrier in memory.carriers_MD)


def test_recent_memory_forgets_it() -> None:
    assert stream(RecentMemory(3), torch.randn(10, 2, 4), 4) == [7, 8, 9]
    assert stream(RecentMemory(30), torch.randn(10, 2, 4), 4) == list(range(10))
    with pytest.raises(ValueError, match="capacity"):
        RecentMemory(0)


def test_mask_lets_raw_tokens_act_through_their_carrier_only() -> None:
    system, frames, size, text = 3, 4, 5, 2
    allowed = stage2_allow(system, frames, size, text)
    for frame in range(frames):
        first = system + frame * (size + 1)
        raw, carrier = slice(first, first + size), first + size
        outside = torch.ones(len(allowed), dtype=torch.bool)
        outside[first : carrier + 1] = False
        assert not allowed[outside, raw].any()
        assert allowed[carrier, first : carrier + 1].all()
        assert allowed[carrier + 1 :, carrier].all()
        assert allowed[first:, :system].all()
    assert not allowed.triu(1).any()


def test_mask_is_that_of_the_memory() -> None:
    # Without evictions the streaming rule is the training mask.
    frames, size = 5, 3
    x_TND = torch.randn(frames, size, 8)
    frame_L = torch.arange(frames).repeat_interleave(size)
    step = CarrierMemory(99).push(x_TND.flatten(0, 1), frame_L, frames)
    assert step.sees_TE.equal(torch.ones(frames, frames, dtype=torch.bool).tril(-1))
    own_LL = (step.frame_L[:, None] == step.frame_L).tril()
    seen_LL = step.sees_TE[step.frame_L][:, step.frame_L] & step.kept_L
    assert (own_LL | seen_LL).equal(stage2_allow(0, frames, size, 0))


def test_frames_of_different_sizes() -> None:
    x_LD = torch.arange(12.0).view(6, 2)
    frame_L = torch.tensor([0, 0, 0, 1, 2, 2])
    step = CarrierMemory(9).push(x_LD, frame_L, 3)
    assert step.frame_L.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert step.x_LD[step.kept_L].tolist() == [[2.0, 3.0], [6.0, 7.0], [9.0, 10.0]]


def test_picks() -> None:
    memory = CarrierMemory(9, add_kv=2, shared_layer=1)
    kept_S = torch.tensor([False, False, False, True])
    rows = [torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0.3, 0.1, 0.2, 0.4]])]
    assert memory.pick(0, rows[0], kept_S).tolist() == [1, 2]
    assert memory.pick(1, rows[1], kept_S).tolist() == [0, 2]
    assert memory.pick(2, rows[0], kept_S).tolist() == [0, 2]
    own = CarrierMemory(9, add_kv=9)
    assert own.pick(0, rows[0], kept_S).tolist() == [0, 1, 2]  # never more than there are
    assert pick_frame_tokens(torch.ones(2, 5), 3).tolist() == [0, 1, 2]
    assert kept_slots(1, 2, 3, [1]).tolist() == [0, 1, 2, 4, 6]


@pytest.mark.parametrize("newlines", [0, 1])
@pytest.mark.parametrize("row_newline", [False, True])
def test_prompt_of_carriers(newlines: int, row_newline: bool) -> None:
    grid = Grid.video(6, 2, 3, newlines_at_end=newlines, row_newline=row_newline)
    x_ND = torch.randn(grid.num_tokens, 8, generator=torch.Generator().manual_seed(4))
    method, budget = VideoScan(), Budget(retain=0.5)
    reduction = method.projector(
        Tokens.from_grid(x_ND, grid), ProjectorContext(budget, "videoscan", grid=grid)
    )
    assert reduction is not None
    out_MD = reduction.apply(x_ND[None])[0]
    assert len(out_MD) == method.count(grid, budget).tokens == 6 + newlines
    rows_TND = x_ND[: len(x_ND) - newlines].unflatten(0, (6, -1))
    # Newlines of rows are part of the mean, as in the released code.
    assert torch.allclose(out_MD[:6], frame_carriers(rows_TND), atol=1e-6)
    assert out_MD[6:].equal(x_ND[len(x_ND) - newlines :])


@pytest.mark.parametrize(("capacity", "tokens", "kept"), [(4, 50, 3), (64, 2, 2), (64, 1, 1)])
def test_prompt_evicts_like_a_stream(capacity: int, tokens: int, kept: int) -> None:
    grid = Grid.video(10, 3, 3)
    x_TND = torch.randn(10, 9, 8, generator=torch.Generator().manual_seed(5))
    method, budget = VideoScan(capacity=capacity), Budget(tokens=tokens)
    context = ProjectorContext(budget, "videoscan", grid=grid)
    reduction = method.projector(Tokens.from_grid(x_TND.flatten(0, 1), grid), context)
    assert reduction is not None
    frames = (reduction.anchor_BM[0] // 9).tolist()
    assert frames == stream(CarrierMemory(kept + 1), x_TND, 1)
    assert len(frames) == kept == method.count(grid, budget).tokens


def test_full_budget_leaves_everything() -> None:
    grid = Grid.video(3, 2, 2)
    context = ProjectorContext(Budget(retain=1.0), "videoscan", grid=grid)
    assert VideoScan().projector(Tokens.from_grid(torch.zeros(12, 4), grid), context) is None
    assert VideoScan().count(grid, Budget(retain=1.0)).tokens == 12


def test_only_methods_with_a_memory_have_one() -> None:
    assert get_method("divprune")().stream_memory() is None
    memory = VideoScan(capacity=5, add_kv=3).stream_memory()
    assert isinstance(memory, CarrierMemory)
    assert (memory.capacity, memory.picked, memory.renumbers) == (5, 3, False)
    assert VideoScan().stream_memory() is not VideoScan().stream_memory()


@pytest.mark.parametrize("options", [{"capacity": 1}, {"add_kv": -1}, {"shared_layer": -1}])
def test_bad_arguments(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VideoScan(**options)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="does not exist in a model with 4 layers"):
        VideoScan(shared_layer=4).check(None, 4)
    with pytest.raises(ValueError, match="pair"):
        most_redundant(torch.zeros(1, 3))
