"""KFFocus: key frames and fill-ins, condensing by relevance, counts and a needle."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from foveate.core import Budget, FramePlan, FramesContext, Grid, ProjectorContext, Tokens
from foveate.methods.kffocus import KFFocus, Shares, condensed, fill_in_times

from .helpers import LAYOUTS, item


def clip(keyframes: list[int], num: int = 250, fps: float = 25.0, frames: int = 64, **more):
    times = torch.arange(num, dtype=torch.float64) / fps
    made = FramesContext(Budget(retain=0.1), "kffocus", frames=frames, seconds_F=times)
    made.duration, made.stages = num / fps, ("frames", "projector")
    made.keyframe_F = torch.zeros(num, dtype=torch.bool)
    made.keyframe_F[keyframes] = True
    for name, value in more.items():
        setattr(made, name, value)
    return made


# -- frames ---------------------------------------------------------------------------------------


def test_a_clip_checked_by_hand() -> None:
    """Key frames of a real clip of 10 s: gaps of 2, 3, 4, 4 and 4 fill-ins, none in the tail."""
    keyframes = [0, 30, 76, 137, 187, 242]
    index = KFFocus().frames(clip(keyframes)).index_K.tolist()
    assert set(keyframes) <= set(index) and len(index) == 6 + 2 + 3 + 4 + 4 + 4
    between = [sum(a < i < b for i in index) for a, b in pairwise(keyframes)]
    assert between == [2, 3, 4, 4, 4] and max(index) == 242


def test_one_key_frame() -> None:
    plan = KFFocus().frames(clip([0], num=1000))
    assert plan.num_frames == 1 + 20
    assert fill_in_times(torch.zeros(1).double(), 77.7).shape == (20,)


@pytest.mark.parametrize("seed", range(5))
def test_no_gap_is_left(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    key_G = (100 * torch.rand(7, generator=generator, dtype=torch.float64)).sort().values
    times = torch.cat([key_G, fill_in_times(key_G, 100.0)]).sort().values
    edge = torch.cat([torch.zeros(1), times, torch.full((1,), 100.0)])
    assert float(edge.diff().max()) < 5.0 + 1e-9
    assert len(times) - 7 <= 20


def test_key_frames_alone_stay_unless_there_are_too_many() -> None:
    assert KFFocus().frames(clip(list(range(40)), num=40)).index_K.tolist() == list(range(40))
    thinned = KFFocus().frames(clip(list(range(250)), frames=16)).index_K
    assert len(thinned) == 16 and thinned[[0, -1]].tolist() == [0, 249]
    alone = KFFocus().frames(clip(list(range(250)), frames=20, stages=("frames",)))
    assert alone.num_frames == 2, "without the projector stage the budget counts frames"


def test_the_question_takes_no_part_in_the_choice() -> None:
    asked = clip([0, 50], relevance=lambda index_n: index_n.float())
    plan, plain = KFFocus().frames(asked), KFFocus().frames(clip([0, 50]))
    assert torch.equal(plan.index_K, plain.index_K)
    assert plan.score_K is not None and plan.score_K.tolist() == plan.index_K.tolist()
    assert plain.score_K is None


def test_needle() -> None:
    """One second behind a hard cut in 10 minutes: its key frame is shown and gets most tokens."""
    num, event = 6000, range(3313, 3323)
    keyframes = [*range(0, num, 600), 3313]
    even = set(clip(keyframes, num, 10.0).evenly(16).tolist())
    assert not even & set(event)
    relevant = clip(keyframes, num, 10.0, relevance=lambda index_n: (index_n == 3313).float())
    plan = KFFocus().frames(relevant)
    assert 3313 in plan.index_K.tolist()
    grid = Grid.video(plan.num_frames, 8, 8)
    budget = Budget(tokens=plan.num_frames * 4 + 12)
    context = ProjectorContext(budget, grid=grid, plan=plan)
    made = KFFocus().projector(item(grid), context)
    assert made is not None
    count_T = torch.bincount(grid.positions()[made.anchor_BM[0], 0])
    place = plan.index_K.tolist().index(3313)
    assert count_T[place] == 16 and (count_T == 4).sum() == plan.num_frames - 1


# -- projector ------------------------------------------------------------------------------------

GRID = Grid.video(6, 5, 7)


def run(method: KFFocus, grid: Grid, budget: Budget, score: torch.Tensor | None = None):
    score = torch.linspace(0, 1, len(grid.planes)) if score is None else score
    read = {"text.frame_similarity": score[None]}.get
    made = method.projector(item(grid), ProjectorContext(budget, grid=grid, read=read))
    assert made is not None
    return made


def per_frame(made, grid: Grid = GRID) -> list[int]:
    return torch.bincount(grid.positions()[made.anchor_BM[0], 0], minlength=6).tolist()


@pytest.mark.parametrize(("alpha", "fine"), [(0.0, 0), (0.25, 2), (0.5, 3), (1.0, 6)])
def test_published_counts(alpha, fine) -> None:
    method, budget = KFFocus(alpha=alpha), Budget(retain=0.1, published=True)
    counts = per_frame(run(method, GRID, budget))
    assert counts == [2 * 2] * (6 - fine) + [3 * 4] * fine
    assert method.count(GRID, budget).tokens == sum(counts)


@pytest.mark.parametrize(
    "name", [name for name in LAYOUTS if "video" in name or name == "one frame"]
)
@pytest.mark.parametrize("retain", [0.01, 0.05, 0.2, 0.4, 0.75, 0.97])
def test_counts_are_exact_and_within_the_budget(name, retain) -> None:
    grid, budget = LAYOUTS[name], Budget(retain=retain)
    made, counted = run(KFFocus(), grid, budget), KFFocus().count(grid, budget)
    assert counted.exact and made.num_out == counted.tokens
    patches = grid.kinds()[made.anchor_BM[0]] == 0
    assert 1 <= int(patches.sum()) <= max(1, budget.count(grid.num_patches))


def test_larger_budgets_keep_more() -> None:
    grid = Grid.video(8, 14, 14)
    counts = [KFFocus().count(grid, Budget(tokens=n)).tokens for n in range(1, 1568, 13)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] > 1400
    assert KFFocus().shares(grid, Budget(tokens=3)) == Shares(14, 14, 0, 3)


def test_pooling_is_the_mean_of_a_cell() -> None:
    grid = Grid.video(1, 4, 4)
    x = item(grid)
    made = run(KFFocus(alpha=1.0), grid, Budget(retain=0.1, published=True))
    expected = torch.nn.functional.avg_pool2d(x.x_BND.mT.view(1, 16, 4, 4), 2).flatten(2).mT
    torch.testing.assert_close(made.apply(x.x_BND), expected)
    assert condensed(grid.planes[0], 3) == (2, 2)


def test_scores_of_a_plan_come_first() -> None:
    plan = FramePlan(torch.arange(6), score_K=torch.tensor([9.0, 0, 0, 0, 0, 0]))
    read = {"text.frame_similarity": torch.linspace(0, 1, 6)[None]}.get
    context = ProjectorContext(Budget(tokens=6 * 4 + 8), grid=GRID, plan=plan, read=read)
    made = KFFocus().projector(item(GRID), context)
    assert per_frame(made) == [12, 4, 4, 4, 4, 4]


def test_images_stay() -> None:
    context = ProjectorContext(Budget(retain=0.5), grid=LAYOUTS["image"])
    assert KFFocus().projector(Tokens(torch.zeros(1, 48, 4)), context) is None


@pytest.mark.parametrize("arguments", [{"delta": 0}, {"alpha": 1.5}, {"d1": 4}, {"d1": 0}])
def test_bad_arguments(arguments) -> None:
    with pytest.raises(ValueError):
        KFFocus(**arguments)
