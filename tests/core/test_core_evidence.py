"""What a method may note, and what is said when it does not fit."""

from __future__ import annotations

import pytest
import torch

from foveate.core import (
    Budget,
    Context,
    Evidence,
    Grid,
    Notebook,
    Plane,
    ProjectorContext,
    Reduction,
    merged_groups,
)
from foveate.core.report import ItemReport

GRID = Grid((Plane(2, 2, row_newline=True), Plane(1, 3)), "image", newlines_at_end=1)  # 10 tokens


def noting(grid: Grid = GRID) -> tuple[ProjectorContext, list[Evidence]]:
    seen: list[Evidence] = []
    book = Notebook("projector", (grid.num_tokens,), seen.append, grid=grid, patches=True)
    return ProjectorContext(Budget(0.5), "thin", notebook=book, grid=grid), seen


def test_nothing_is_computed_when_nobody_draws() -> None:
    Context(Budget(0.5)).note("saliency", lambda: pytest.fail("it was asked for"))
    context, seen = noting()
    context.note("saliency", lambda: torch.arange(10.0), caption="a sentence")
    (noted,) = seen
    assert (noted.method, noted.stage, noted.caption) == ("thin", "projector", "a sentence")
    assert noted.value.tolist() == list(range(10))


def test_every_kind_has_its_form() -> None:
    context, seen = noting()
    heat_N = torch.tensor([[1.0, torch.inf, -torch.inf, torch.nan, *range(6)]]).to(torch.bfloat16)
    context.note("heat", heat_N)
    context.note("label", torch.arange(10) - 1, "label")
    context.note("mark", torch.arange(10) > 8, "mark")
    context.note("frames", torch.tensor([[0, 0], [0, 1]]), "frames")
    context.note("boxes", [(0, 0, 1, 2, 2), (1, 0, 0, 1, 3)], "boxes")
    values = {noted.kind: noted.value for noted in seen}
    assert values["heat"].dtype == torch.float32 and values["heat"].isnan().sum() == 3
    assert values["label"].dtype == torch.int32 and values["label"].tolist()[:2] == [-1, 0]
    assert values["mark"].sum() == 1
    assert values["frames"] == ((0, 0), (0, 1))
    assert values["boxes"] == ((0, 0, 1, 2, 2), (1, 0, 0, 1, 3))
    assert not any(noted.is_blank for noted in seen)


def test_a_note_keeps_nothing_of_the_method_alive() -> None:
    context, seen = noting()
    value_N = torch.zeros(10)
    context.note("heat", value_N)
    value_N += 1
    assert seen[0].value.sum() == 0


def test_a_value_per_patch_skips_the_newlines() -> None:
    context, seen = noting()
    context.note("per patch", torch.arange(7.0))
    assert seen[0].value.nan_to_num(-1).tolist() == [0, 1, -1, 2, 3, -1, 4, 5, 6, -1]


def test_values_of_some_tokens_fill_in() -> None:
    context, seen = noting()
    context.note("order", range(3), "label", at=torch.tensor([4, 0, 2]))
    context.note("order", [7], "label", at=torch.tensor([[9]]))
    context.note("pivot", True, "mark", at=torch.tensor([4, 6]))
    report = ItemReport(0, "image", GRID)
    for noted in seen:
        report.add_evidence(noted)
    order, pivot = report.evidence
    assert order.value.tolist() == [1, -1, 2, -1, 0, -1, -1, -1, -1, 7]
    assert pivot.value.nonzero()[:, 0].tolist() == [4, 6]
    with pytest.raises(ValueError, match="not the same evidence"):
        order.over(pivot)


@pytest.mark.parametrize(
    ("value", "kind", "at", "words"),
    [
        (torch.zeros(9), "heat", None, r"thin: note\('x'\).*\(10,\), or one per patch, \(7,\)"),
        (torch.zeros(9), "heat", None, r"got \(9,\)"),
        (torch.zeros(10), "label", None, "takes integers, got torch.float32"),
        (torch.zeros(10), "mark", None, "takes bool, got torch.float32"),
        (torch.zeros(10).bool(), "label", None, "takes integers, got torch.bool"),
        (torch.zeros(10, dtype=torch.complex64), "heat", None, "takes numbers"),
        (torch.zeros(10), "warmth", None, "has the kind 'warmth'; known: heat, label"),
        ([(0, 2)], "frames", None, r"entries \(first, last\) within 2 planes .*got \(0, 2\)"),
        ([(1, 0)], "frames", None, r"got \(1, 0\)"),
        ([(0, 0, 0, 2, 3)], "boxes", None, r"got \(0, 0, 0, 2, 3\)"),
        ([(0, 0, 0, 2)], "boxes", None, r"entries \(plane, top, left, bottom, right\)"),
        (torch.zeros(2), "heat", torch.tensor([1]), r"got \(2,\) for \(1,\)"),
        (torch.zeros(1), "heat", torch.tensor([10]), "out of range"),
    ],
)
def test_what_does_not_fit_is_refused(value, kind, at, words) -> None:
    context, _ = noting()
    with pytest.raises(ValueError, match=words):
        context.note("x", value, kind, at=at)


def test_stages_without_an_item_know_no_frames() -> None:
    book = Notebook("decoder", (4,), [].append, layer=2)
    context = Context(Budget(0.5), "thin", notebook=book)
    with pytest.raises(ValueError, match="which the decoder stage does not know; note a label"):
        context.note("x", [(0, 0)], "frames")
    with pytest.raises(ValueError, match=r"\(4,\); got \(3,\)"):
        context.note("x", torch.zeros(3))


def test_taking_follows_tokens() -> None:
    mark = Evidence("a", "mark", torch.tensor([True, False]))
    assert mark.take(torch.tensor([1, 0, -1])).value.tolist() == [False, True, False]
    heat = Evidence("b", "heat", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    taken = heat.take(torch.tensor([[0, -1, 1], [1, 1, 0]])).value
    assert taken.nan_to_num(-1).tolist() == [[1, -1, 2], [4, 4, 3]]
    assert heat.take(torch.tensor([[-1], [-1]])).is_blank
    frames = Evidence("c", "frames", ((0, 1),))
    assert frames.take(torch.tensor([0])) is frames


def test_merged_groups_leave_single_tokens_out() -> None:
    select = Reduction.select(torch.tensor([[0, 2], [1, 2]]), 3)
    assert merged_groups(select).eq(-1).all()
    merge = Reduction.merge(torch.tensor([[0, 1, 1, -1], [0, 0, -1, 1]]), 2)
    assert merged_groups(merge).tolist() == [[-1, 1, 1, -1], [0, 0, -1, -1]]
