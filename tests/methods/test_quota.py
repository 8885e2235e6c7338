"""QuoTA: published numbers, shares, all five resamplings, its frames, and the parser."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.core import (
    Budget,
    FramePlan,
    FramesContext,
    Grid,
    ProjectorContext,
    Reduction,
    Tokens,
)
from foveate.errors import MissingSignalError
from foveate.methods._query import parse_objects
from foveate.methods.quota import (
    QuoTA,
    capped_weights,
    decouple_query,
    frame_weights,
    token_counts,
    unit_interval,
)

from .helpers import LAYOUTS, item

GRID = Grid.video(6, 5, 7)


def run(
    method: QuoTA,
    grid: Grid = GRID,
    budget: Budget | None = None,
    probability: list[float] | None = None,
    plan: FramePlan | None = None,
) -> Reduction:
    """The projector stage, on scores of frames or a plan."""
    T = len(grid.planes)
    score = torch.linspace(0.1, 0.9, T) if probability is None else torch.tensor(probability)
    read = {"text.frame_similarity": score[None]}.get
    if probability is not None:
        plan = FramePlan(torch.arange(T), weight_K=frame_weights(score))
    context = ProjectorContext(budget or Budget(retain=0.4), grid=grid, read=read, plan=plan)
    reduction = method.projector(item(grid), context)
    assert reduction is not None
    return reduction


def per_frame(reduction: Reduction, grid: Grid = GRID) -> list[int]:
    time_M = grid.positions()[reduction.anchor_BM[0], 0]
    return torch.bincount(time_M, minlength=len(grid.planes)).tolist()


# -- shares ---------------------------------------------------------------------------------------


def test_published_numbers() -> None:
    assert [QuoTA().num_frames(64, hours * 3600.0) for hours in (0, 1, 1.5, 2)] == [
        96,
        160,
        192,
        224,
    ]
    grid = Grid.video(96, 14, 14)
    assert QuoTA().count(grid, Budget(retain=QuoTA.card.retain)).tokens == 12544 == 64 * 196


def test_scaling_all_scores_changes_nothing_and_equal_ones_share_alike() -> None:
    p_T = torch.rand(9, generator=torch.Generator().manual_seed(0))
    assert token_counts(frame_weights(p_T), 500) == token_counts(frame_weights(p_T / 2), 500)
    assert token_counts(frame_weights(torch.full((5,), 0.3)), 57) == [11] * 5
    assert token_counts(frame_weights(torch.zeros(5)), 57) == [11] * 5
    assert sum(token_counts(frame_weights(p_T), 500)) <= 500


def test_needle() -> None:
    p_T = torch.full((96,), 0.05)
    p_T[41] = 0.9
    count_T = token_counts(frame_weights(p_T), 12544)
    others = [n for frame, n in enumerate(count_T) if frame != 41]
    assert count_T[41] >= 300 * max(others) > 0


def test_one_frame_alone_grows_or_is_capped() -> None:
    scores = [0.0, 0.0, 0.8, 0.0, 0.0, 0.0]
    grown = run(QuoTA(), probability=scores)
    assert per_frame(grown)[2] == grown.num_out > 35
    for version in ("v2", "v3", "v4", "v5"):
        capped = run(QuoTA(version=version), probability=scores)
        assert per_frame(capped) == [0, 0, 35, 0, 0, 0], version


def test_no_frame_is_ever_left_without_any() -> None:
    reduction = run(QuoTA(), budget=Budget(tokens=2))
    assert 1 <= reduction.num_out <= 2


def test_capped_shares_keep_their_order_and_sum() -> None:
    weight_T = frame_weights(torch.tensor([0.9, 0.2, 0.3, 0.25]))
    capped = capped_weights(weight_T, 0.4)
    assert float(capped.max()) <= 0.4 and float(capped.sum()) <= 1
    assert (capped[1:] > weight_T[1:]).all()
    assert capped.argsort().tolist() == weight_T.argsort().tolist()
    assert torch.equal(capped_weights(weight_T, 1.0), weight_T)


def test_cosines_are_stretched() -> None:
    assert unit_interval(torch.tensor([0.25, 0.75, 0.5])).tolist() == [0.0, 1.0, 0.5]
    assert unit_interval(torch.full((3,), -0.2)).tolist() == [1.0, 1.0, 1.0]


# -- resampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4", "v5"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if "video" in name])
def test_every_version_keeps_order_budget_and_averages(version, name) -> None:
    grid = LAYOUTS[name]
    method, budget = QuoTA(version=version), Budget(retain=0.4)
    reduction = run(method, grid, budget)
    assert 0 < reduction.num_out <= method.count(grid, budget).tokens
    matrix_MN = reduction.matrix()[0]
    torch.testing.assert_close(matrix_MN.sum(1), torch.ones(reduction.num_out))
    assert float(matrix_MN.min()) >= 0
    position = grid.positions()
    time_M = position[reduction.anchor_BM[0], 0]
    assert (time_M.diff() >= 0).all()
    is_same = position[:, 0][None] == time_M[:, None]
    assert (matrix_MN[~is_same] == 0).all(), "no token mixes frames"


def test_equal_scores_give_equal_grids() -> None:
    counts = per_frame(run(QuoTA(), probability=[0.3] * 6))
    assert len(set(counts)) == 1
    same = run(QuoTA(), plan=FramePlan(torch.arange(6), weight_K=torch.full((6,), 1 / 6)))
    assert per_frame(same) == counts


def test_newline_policies() -> None:
    rows, end = LAYOUTS["video, newline per row"], LAYOUTS["video, newline at end"]
    without = run(QuoTA(newlines="remove"), rows).num_out
    assert run(QuoTA(newlines="row"), rows).num_out > without
    assert run(QuoTA(newlines="end"), rows).num_out == without
    last = end.num_tokens - 1
    assert run(QuoTA(), end).anchor_BM[0, -1] == last
    assert last not in run(QuoTA(newlines="remove"), end).anchor_BM[0].tolist()


def test_room_of_a_plan_counts_frames_asked_for() -> None:
    plan = FramePlan(torch.arange(6), weight_K=torch.full((6,), 1 / 6), room=3.0)
    method = QuoTA()
    assert method.budget_of(GRID, Budget(retain=0.5), plan) == round(0.5 * 3 * 35)
    assert method.budget_of(GRID, Budget(retain=0.5, published=True), plan) == 3 * 35
    assert method.budget_of(GRID, Budget(tokens=40), plan) == 40


def test_images_and_full_budgets_stay() -> None:
    grid = Grid.image(6, 8)
    context = ProjectorContext(Budget(retain=0.5), grid=grid)
    assert QuoTA().projector(Tokens(torch.zeros(1, 48, 4)), context) is None
    assert QuoTA().count(grid, Budget(retain=0.5)).tokens == 48
    assert QuoTA().projector(item(GRID), ProjectorContext(Budget(), grid=GRID)) is None


# -- frames ---------------------------------------------------------------------------------------


def clip(num: int, fps: float, frames: int = 4, **more) -> FramesContext:
    times = torch.arange(num, dtype=torch.float64) / fps
    context = FramesContext(Budget(retain=0.5), "quota", seconds_F=times, duration=num / fps)
    context.frames, context.stages = frames, ("frames", "projector")
    context.relevance = lambda index_n: (index_n.float() + 1) / num
    context.probabilities = True
    for name, value in more.items():
        setattr(context, name, value)
    return context


def test_frames_by_length() -> None:
    assert QuoTA().frames(clip(100, 10)).num_frames == 6  # 1.5 times what is asked for
    few = QuoTA().frames(clip(50, 10))
    assert few.index_K.tolist() == [0, 10, 20, 30, 40], "no more than lie a second apart"
    assert QuoTA(force=True).frames(clip(50, 10)).num_frames == 6
    assert QuoTA().frames(clip(20, 10)).num_frames == 4, "never fewer than asked for"
    assert QuoTA().frames(clip(3, 10)).num_frames == 3
    hours = QuoTA().frames(clip(7200, 1))
    assert hours.num_frames == 6 + 8 and hours.room == 4


def test_frames_carry_their_shares() -> None:
    plan = QuoTA().frames(clip(100, 10))
    assert plan.score_K is not None and plan.weight_K is not None
    torch.testing.assert_close(plan.weight_K, frame_weights(plan.score_K))
    cosine = QuoTA().frames(clip(100, 10, probabilities=False))
    assert cosine.score_K is not None and cosine.score_K.tolist()[:: len(cosine.score_K) - 1] == [
        0,
        1,
    ]


def test_alone_the_frames_stage_takes_the_best() -> None:
    plan = QuoTA().frames(clip(100, 10, stages=("frames",)))
    assert plan.index_K.tolist() == [79, 99] and plan.room is None


def test_without_a_scorer() -> None:
    with pytest.raises(MissingSignalError, match="scorer"):
        QuoTA().frames(clip(100, 10, relevance=None))


# -- query ----------------------------------------------------------------------------------------


def test_query_decoupling() -> None:
    asked = []

    def generate(text: str) -> str:
        asked.append(text)
        return "Step 1: Yes.\nStep 2: a cup\nStep 3: ['Cup', 'red table', 'cup', 3]"

    assert decouple_query("Where is the cup?", generate) == ("cup", "red table")
    assert "Where is the cup?" in asked[0] and "Step 3" in asked[0]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "step 1: no\nstep 3: ['cup']",
        "step 1: yes\nstep 3: null",
        "step 1: yes\nstep 3: [",
        "step 1: yes\nstep 3: [__import__('os').getcwd()]",
        "step 1: yes\nstep 3: [1, 2]",
        "step 1: yes, ['cup']",
    ],
)
def test_answers_that_name_nothing(answer) -> None:
    assert parse_objects(answer) == ()


def test_many_objects_are_cut() -> None:
    assert len(parse_objects(f"step 1: yes step 3: {[f'o{i}' for i in range(99)]}")) == 32


@pytest.mark.parametrize(
    "arguments",
    [
        {"version": "v6"},
        {"exponent": 0},
        {"base": -1},
        {"newlines": "some"},
        {"per_hour": -math.inf},
    ],
)
def test_bad_arguments(arguments) -> None:
    with pytest.raises(ValueError):
        QuoTA(**arguments)
