"""Evenly spaced selection of visual tokens: the baseline without any score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    TokenKind,
    Tokens,
    with_newlines,
)


@dataclass(frozen=True)
class Uniform(Method):
    """Keeps evenly spaced patches: the middle one of equal stretches of the item's raster order.

    Frames and tiles therefore keep equal shares. Special tokens stay as in `Random`.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> Uniform().count(Grid.video(8, 14, 14), Budget(tokens=100))
        Count(tokens=100, exact=True)
    """

    card: ClassVar[Card] = Card(
        name="uniform",
        title="Uniform",
        paper="Baseline: evenly spaced patches",
        stages=("projector",),
        kind="baseline",
        summary="Keeps evenly spaced patches.",
        notes=(
            "Spacing is even along the raster order, so every frame and tile keeps its share.",
            "Newline tokens of rows that still hold a patch, newlines at the end and [CLS] tokens "
            "come on top of the budget.",
        ),
        retain=0.25,
    )

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Patches by the budget plus special tokens; a bound where rows end in newlines."""
        if budget.is_full:
            return Count(grid.num_tokens)
        patches = max(1, budget.count(grid.num_patches))
        rows = sum(plane.height for plane in grid.planes if plane.row_newline)
        special = grid.newlines_at_end + sum(plane.prefix for plane in grid.planes)
        return Count(patches + special + min(rows, patches), exact=rows == 0)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep evenly spaced patches of the item."""
        if context.budget.is_full:
            return None
        grid = context.grid
        patch_P = grid.patch_index(tokens.device)
        keep = max(1, context.budget.count(len(patch_P)))
        choice_K = ops.uniform_indices(len(patch_P), keep, tokens.device, endpoints=False)
        kept_K = with_newlines(patch_P[choice_K], grid, "row")
        cls_K = (grid.kinds(tokens.device) == TokenKind.CLS).nonzero()[:, 0]
        return Reduction.select(torch.cat([kept_K, cls_K]).sort().values, tokens.num_tokens)
