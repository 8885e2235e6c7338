"""F2C: anchors, lengths of clips, what they cost, a needle, and frames pooled to their scale."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from foveate.core import Budget, FramePlan, FramesContext, Grid, ProjectorContext, Tokens
from foveate.errors import MissingSignalError
from foveate.methods.f2c import F2C, anchors, choose_clips, clip_lengths, peaks

from .helpers import LAYOUTS, item


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- anchors --------------------------------------------------------------------------------------


def slow_peaks(r: list[float]) -> list[int]:
    last = len(r) - 1
    inner = [i for i in range(1, last) if r[i] <= r[i - 1] and r[i] <= r[i + 1]]
    ends = [0, *inner, last]
    found = set()
    for low, high in pairwise(ends):
        found.add(max(range(low, high + 1), key=lambda i: (r[i], -i)))
    return sorted(found)


@pytest.mark.parametrize("seed", range(8))
def test_peaks_are_the_maxima_of_basins(seed) -> None:
    r_M = (draw(40, seed=seed) * (6 if seed % 2 else 1000)).round()  # with and without ties
    assert peaks(r_M).tolist() == slow_peaks(r_M.tolist())


def test_simple_reliefs() -> None:
    assert peaks(torch.arange(5.0)).tolist() == [4]
    assert peaks(-torch.arange(5.0)).tolist() == [0]
    assert peaks(torch.ones(1)).tolist() == [0]
    assert peaks(torch.ones(6)).tolist() == slow_peaks([1.0] * 6)


def test_anchors_are_few_spread_and_repeat() -> None:
    r_M = draw(600)
    found = anchors(r_M, 8)
    assert 1 <= len(found) <= 8 and (found.diff() > 0).all()
    assert set(found.tolist()) <= set(peaks(r_M).tolist())
    assert torch.equal(found, anchors(r_M, 8))
    assert int(found.diff().max()) < 200, "they spread over time"
    assert torch.equal(anchors(r_M, 600), peaks(r_M))


# -- clips ----------------------------------------------------------------------------------------


def test_orthogonal_features_make_the_longest_clips() -> None:
    start_A, length_A = clip_lengths(torch.zeros(40), torch.eye(40), torch.tensor([0, 20, 39]), 4)
    assert length_A.tolist() == [4, 4, 4]
    assert start_A.tolist() == [0, 19, 36], "shifted inwards at the ends"


def test_alike_features_make_the_shortest() -> None:
    same = torch.ones(40, 3)
    assert clip_lengths(torch.zeros(40), same, torch.tensor([5, 9]), 4)[1].tolist() == [1, 1]


def test_without_weights_they_are_key_frames() -> None:
    r_M = torch.zeros(30)
    r_M[[4, 17, 25]] = torch.tensor([0.5, 0.9, 0.7])
    found = choose_clips(r_M, draw(30, 5), 3, redundancy=0.0, length=0.0)
    assert found.index_n.tolist() == [4, 17, 25] and found.scale_n.tolist() == [1, 1, 1]


@pytest.mark.parametrize("room", [0.3, 1, 2.5, 5, 16])
@pytest.mark.parametrize("redundancy", [0.0, 0.5])
def test_clips_cost_no_more_than_the_room(room, redundancy) -> None:
    for seed in range(6):
        found = choose_clips(
            draw(120, seed=seed), draw(120, 6, seed=seed), room, redundancy=redundancy
        )
        assert float(found.scale_n.square().sum()) <= room + 1e-6
        assert (found.index_n.diff() > 0).all() and (found.group_n.diff() != 0).sum() < 120
        assert float(found.scale_n.min()) >= 0.5 - 1e-9 or room < 1


def test_clips_that_neither_meet_nor_clip_cost_exactly_the_room() -> None:
    r_M = torch.zeros(60)
    r_M[[10, 30, 50]] = 1.0
    found = choose_clips(r_M, torch.eye(60), 3, redundancy=0.5, length=9.0)
    assert len(found.index_n) == 12 and found.group_n.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert float(found.scale_n.square().sum()) == pytest.approx(3)


def test_needle() -> None:
    """Two events of 3 s in 10 minutes: clips cover both, 8 even frames neither."""
    r_M = 0.2 + 0.02 * draw(600)
    events = ((211, 214), (467, 470))
    for low, high in events:
        r_M[low:high] = 0.4
    found = set(choose_clips(r_M, draw(600, 8), 8).index_n.tolist())
    even = set(torch.linspace(0, 599, 8).long().tolist())
    assert all(found & set(range(low, high)) for low, high in events)
    assert not all(even & set(range(low, high)) for low, high in events)


# -- frames ---------------------------------------------------------------------------------------


def context(seconds: int = 60, budget: Budget | None = None, **more) -> FramesContext:
    times = torch.arange(10 * seconds, dtype=torch.float64) / 10
    made = FramesContext(budget or Budget(retain=0.5), "f2c", frames=8, seconds_F=times)
    made.duration, made.stages = float(seconds), ("frames", "projector")
    made.relevance = lambda index_n: draw(10 * seconds, seed=1)[index_n]
    made.embeddings = lambda index_n: draw(10 * seconds, 6)[index_n]
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_frames_stage() -> None:
    plan = F2C().frames(context())
    assert (plan.index_K % 10 == 0).all(), "one candidate a second"
    assert plan.num_full_frames <= 4 + 1e-6 and plan.group_K is not None
    assert F2C().frames(context(budget=Budget(retain=0.5, published=True))).num_full_frames > 4
    alone = F2C().frames(context(stages=("frames",)))
    assert alone.num_frames <= 4 and (alone.scale_K == 1).all()
    short = F2C().frames(context(seconds=2))
    assert short.num_frames >= 1 and (short.index_K % 10 != 0).any()
    assert len(F2C(most_candidates=3).frames(context()).index_K) <= 3


def test_without_a_scorer() -> None:
    with pytest.raises(MissingSignalError, match="scorer"):
        F2C().frames(context(relevance=None, embeddings=None))


# -- projector ------------------------------------------------------------------------------------


def test_frames_are_pooled_to_their_scale() -> None:
    grid = Grid.video(3, 6, 8)
    plan = FramePlan(torch.tensor([2, 3, 9]), scale_K=torch.tensor([1.0, 0.5, 0.4]))
    x = item(grid)
    made = F2C().projector(x, ProjectorContext(Budget(retain=0.5), grid=grid, plan=plan))
    assert made is not None
    time_M = grid.positions()[made.anchor_BM[0], 0]
    assert torch.bincount(time_M).tolist() == [48, 12, 6]
    y_MD = made.apply(x.x_BND)[0]
    assert torch.equal(y_MD[:48], x.x_BND[0, :48])
    first = x.x_BND[0, 48:96].view(6, 8, -1)[:2, :2].mean((0, 1))
    torch.testing.assert_close(y_MD[48], first)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "video" in name])
@pytest.mark.parametrize("retain", [0.02, 0.2, 0.5, 0.9])
def test_without_a_plan_it_chooses_among_the_frames(name, retain) -> None:
    grid, budget = LAYOUTS[name], Budget(retain=retain)
    read = {"text.frame_similarity": draw(1, len(grid.planes))}.get
    made = F2C().projector(item(grid), ProjectorContext(budget, grid=grid, read=read))
    assert made is not None
    assert 1 <= made.num_out <= F2C().count(grid, budget).tokens


def test_images_stay() -> None:
    grid = LAYOUTS["image"]
    assert (
        F2C().projector(Tokens(torch.zeros(1, 48, 4)), ProjectorContext(Budget(0.5), grid=grid))
        is None
    )


@pytest.mark.parametrize("arguments", [{"fps": 0}, {"s_max": 0.5}, {"anchors": -1}])
def test_bad_arguments(arguments) -> None:
    with pytest.raises(ValueError):
        F2C(**arguments)
