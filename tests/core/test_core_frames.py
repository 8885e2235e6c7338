"""Plans of frames, and what the frames stage may know."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, FramePlan, FramesContext, Recipe
from foveate.errors import MissingSignalError, RecipeError

INDEX = torch.tensor([0, 4, 9])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"index_K": torch.empty(0, dtype=torch.long)}, "ascending"),
        ({"index_K": torch.tensor([0.0, 1.0])}, "int64"),
        ({"index_K": torch.tensor([-1, 2])}, "ascending"),
        ({"index_K": torch.tensor([1, 1])}, "each frame once"),
        ({"scale_K": torch.ones(2)}, "speaks of"),
        ({"scale_K": torch.tensor([1.0, 0.0, 1.0])}, r"\(0, 1\]"),
        ({"weight_K": torch.tensor([0.5, 0.1, 0.1])}, "add up to 1"),
        ({"room": 0.0}, "room"),
    ],
)
def test_plans_are_checked(values, match) -> None:
    with pytest.raises(ValueError, match=match):
        FramePlan(**{"index_K": INDEX, **values})


def test_frames_of_full_size() -> None:
    assert FramePlan(INDEX).num_full_frames == 3
    halves = FramePlan(INDEX, scale_K=torch.tensor([1.0, 0.5, 0.5]))
    assert halves.num_frames == 3 and halves.num_full_frames == 1.5


def test_planes_of_several_frames() -> None:
    plan = FramePlan(
        torch.tensor([1, 2, 5, 6, 8]),
        scale_K=torch.tensor([1.0, 0.5, 0.5, 0.5, 0.25]),
        weight_K=torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]).double(),
        group_K=torch.tensor([0, 0, 1, 1, 2]),
        score_K=torch.tensor([-0.5, -0.2, 0.1, 0.3, 0.2]),
        room=4.0,
    )
    joined = plan.for_planes(3)
    assert joined.index_K.tolist() == [1, 5, 8] and joined.group_K.tolist() == [0, 1, 2]
    torch.testing.assert_close(joined.weight_K, torch.tensor([0.3, 0.5, 0.2]).double())
    assert joined.scale_K.tolist() == [1.0, 0.5, 0.25]
    torch.testing.assert_close(joined.score_K, torch.tensor([-0.2, 0.3, 0.2]))
    assert joined.room == 2 and plan.for_planes(5) is plan
    for wrong in (0, 4, 6):
        with pytest.raises(ValueError, match="planes"):
            plan.for_planes(wrong)


def context(budget: Budget, **more) -> FramesContext:
    times = torch.arange(50, dtype=torch.float64) / 10
    return FramesContext(budget, "example", frames=8, seconds_F=times, duration=5.0, **more)


def test_room_of_a_budget() -> None:
    assert context(Budget(retain=0.5)).num_frames == 4
    assert context(Budget(retain=0.01)).num_frames == 1
    assert context(Budget(tokens=120), tokens_per_frame=40.0).num_frames == 3
    assert context(Budget(tokens=9999), tokens_per_frame=40.0).num_frames == 8
    with pytest.raises(ValueError, match="tokens_per_frame"):
        _ = context(Budget(tokens=120)).num_frames


def test_frames_by_time() -> None:
    made = context(Budget(retain=0.5))
    assert made.at_rate(1.0).tolist() == [0, 10, 20, 30, 40]
    assert made.at_rate(1000.0).tolist() == list(range(50))
    assert made.evenly(3).tolist() == [0, 24, 49] and len(made.evenly(99)) == 50
    with pytest.raises(ValueError, match="fps"):
        made.at_rate(0.0)
    with pytest.raises(MissingSignalError, match="scorer"):
        made.scores(torch.arange(2))


def test_one_method_chooses_frames() -> None:
    recipe = Recipe.parse("quota@frames + divprune")
    assert recipe.stages == ("frames", "projector")
    with pytest.raises(RecipeError, match="both choose the frames"):
        Recipe.parse("quota + quota").budgets(Budget(retain=0.5))
