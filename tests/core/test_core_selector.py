"""The base of methods that only choose patches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from foveate.core import (
    Budget,
    Card,
    Grid,
    PatchSelector,
    Plane,
    ProjectorContext,
    Tokens,
    with_special,
)


@dataclass(frozen=True)
class Last(PatchSelector):
    card = Card("last", "Last", "test", ("projector",), "baseline", "Keeps the last patches.")

    def choose(self, tokens, context, patch_P, keep):
        # Falling order: the base puts them back in theirs.
        return torch.arange(len(patch_P)).flip(0)[:keep]


GRIDS = [
    Grid.image(3, 4),
    Grid.video(2, 3, 2, newlines_at_end=1),
    Grid((Plane(2, 3, row_newline=True),)),
    Grid((Plane(2, 2, prefix=1),) * 2, "video"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=["image", "video", "rows", "cls"])
@pytest.mark.parametrize("retain", [0.01, 0.3, 0.7])
def test_keeps_the_chosen_patches_and_what_belongs_to_them(grid, retain):
    tokens = Tokens.from_grid(torch.randn(grid.num_tokens, 4), grid)
    budget = Budget(retain=retain)
    reduction = Last().projector(tokens, ProjectorContext(budget, grid=grid))
    kept = reduction.anchor_BM[0]
    keep = max(1, budget.count(grid.num_patches))
    patches = grid.patch_index()
    assert kept.tolist() == with_special(patches[-keep:], grid).tolist() == sorted(kept.tolist())
    assert torch.isin(kept, patches).sum() == keep
    count = Last().count(grid, budget)
    assert len(kept) == count.tokens if count.exact else len(kept) <= count.tokens


def test_keeping_all_leaves_the_item_alone():
    grid = Grid.image(2, 2)
    tokens = Tokens.from_grid(torch.randn(4, 4), grid)
    assert Last().projector(tokens, ProjectorContext(Budget(retain=1.0), grid=grid)) is None
    assert Last().count(grid, Budget(retain=1.0)).tokens == 4


def test_special_tokens_are_counted():
    assert [grid.num_special for grid in GRIDS] == [0, 1, 0, 2]
