"""What every method at the projector must do, whatever the layout of the item."""

from __future__ import annotations

import pytest
import torch

from foveate.core import (
    Budget,
    Grid,
    Method,
    ProjectorContext,
    TokenKind,
    get_method,
    list_methods,
)
from foveate.errors import MissingSignalError

from .helpers import LAYOUTS, context_for, item, reduce_item

NAMES = [
    name for name in list_methods(stage="projector") if "projector" in get_method(name).stages()
]
BUDGETS = [Budget(retain=0.1), Budget(retain=0.37), Budget(tokens=11)]

VIDEOS_ONLY = {
    *("dycoke", "evs", "f2c", "free_video_llm", "grt", "holitom", "kffocus", "quota"),
    *("tdc", "ts_llava", "vidcom2", "video_streaming"),
}
#: A frame may stand in several paths.
REPEATS = {"free_video_llm"}
#: Centres and the summary are sums.
SUMS = {"recoverable"}
#: A carrier is the mean of all rows of its frame, newlines included, as published.
MIXES_SPECIAL = {"videoscan"}

every_method = pytest.mark.parametrize("name", NAMES)
every_layout = pytest.mark.parametrize("grid", LAYOUTS.values(), ids=LAYOUTS)


def acts_on(name: str, grid: Grid) -> bool:
    if name in ("dycoke", "evs") and len(grid.planes) == 1:
        return False  # the first frame stays whole
    return name not in VIDEOS_ONLY or grid.modality == "video"


def test_names() -> None:
    assert {"aim", "divprune", "fastervlm", "holitom", "pool", "random", "uniform"} <= set(NAMES)


@every_method
@every_layout
@pytest.mark.parametrize("budget", BUDGETS, ids=["0.1", "0.37", "11 tokens"])
def test_count_is_what_is_kept(name: str, grid: Grid, budget: Budget) -> None:
    method = get_method(name)()
    counted = method.count(grid, budget)
    reduction = method.projector(item(grid), context_for(grid, budget))
    if not acts_on(name, grid):
        assert reduction is None and counted.tokens == grid.num_tokens
        return
    assert reduction is not None
    assert reduction.num_in == grid.num_tokens and reduction.batch == 1
    assert 1 <= reduction.num_out <= grid.num_tokens
    if counted.exact:
        assert reduction.num_out == counted.tokens
    else:
        assert reduction.num_out <= counted.tokens


@every_method
@every_layout
def test_the_reduction_is_sound(name: str, grid: Grid) -> None:
    if not acts_on(name, grid):
        return
    reduction = reduce_item(get_method(name)(), grid, Budget(retain=0.3))
    anchors = reduction.anchor_BM[0].tolist()
    assert min(anchors) >= 0
    assert name in REPEATS or len(set(anchors)) == len(anchors)
    # Every target is an average: its weights are not negative and add up to 1.
    matrix_MN = reduction.matrix()[0]
    assert bool((matrix_MN >= 0).all())
    if name not in SUMS:
        torch.testing.assert_close(matrix_MN.sum(1), torch.ones(reduction.num_out))
    if name in MIXES_SPECIAL:
        return
    # Special tokens are never mixed with others.
    special_N = grid.kinds() != TokenKind.PATCH
    for row_N in matrix_MN[matrix_MN[:, special_N].sum(1) > 0]:
        assert (row_N > 0).sum() == 1 and row_N.max() == 1


@every_method
@every_layout
def test_a_full_budget_changes_nothing(name: str, grid: Grid) -> None:
    method = get_method(name)()
    for budget in (Budget(retain=1.0), Budget()):
        assert method.count(grid, budget).tokens == grid.num_tokens
        reduction = method.projector(item(grid), context_for(grid, budget))
        assert reduction is None or reduction.is_identity


@every_method
def test_repeats_exactly(name: str) -> None:
    grid = LAYOUTS["video, newline at end"]
    first, second = (
        reduce_item(get_method(name)(), grid, Budget(retain=0.3), seed=3) for _ in range(2)
    )
    assert first.anchor_BM.equal(second.anchor_BM)
    assert first.matrix().equal(second.matrix())


@every_method
def test_half_precision(name: str) -> None:
    grid = LAYOUTS["video, newline at end"]
    tokens = item(grid)
    half = item(grid).x_BND.bfloat16()
    tokens = type(tokens).from_grid(half, grid)
    reduction = reduce_item(get_method(name)(), grid, Budget(retain=0.3), tokens)
    out = reduction.apply(half)
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


@every_method
def test_a_larger_budget_keeps_no_fewer(name: str) -> None:
    grid = LAYOUTS["video"]
    kept = []
    for retain in (0.01, 0.05, 0.2, 0.5, 0.9):
        context = context_for(grid, Budget(retain=retain))
        reduction = get_method(name)().projector(item(grid), context)
        kept.append(grid.num_tokens if reduction is None else reduction.num_out)
    assert kept == sorted(kept) and kept[0] < kept[-1]


@every_method
def test_the_tiniest_budget_keeps_something(name: str) -> None:
    grid = LAYOUTS["one frame"]
    if acts_on(name, grid):
        assert reduce_item(get_method(name)(), grid, Budget(retain=0.001)).num_out >= 1
    assert get_method(name)().count(grid, Budget(retain=0.001)).tokens >= 1


@pytest.mark.parametrize("name", [name for name in NAMES if get_method(name).needs])
def test_a_missing_signal_is_named(name: str) -> None:
    grid = LAYOUTS["video"]
    context = ProjectorContext(Budget(retain=0.3), method=name, grid=grid)
    missing = rf"{name} needs the signal (encoder|text|paired)\."
    with pytest.raises(MissingSignalError, match=missing):
        get_method(name)().projector(item(grid), context)


@pytest.mark.parametrize("name", list_methods())
def test_cards(name: str) -> None:
    method = get_method(name)
    card = method.card
    assert card.name == name and card.stages == method.stages()
    assert card.paper and card.summary.endswith(".") and 0 < card.retain < 1
    assert card.arxiv or card.kind == "baseline"
    assert method() == method() and hash(method()) == hash(method())
    assert method.__doc__ and isinstance(method(), Method)
