"""Random selection of visual tokens: the baseline that every method should beat."""

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
class Random(Method):
    """Keeps patches drawn at random, in order; equal seeds give equal draws on every device.

    The newline of every row that still holds a patch, newlines at the end and [CLS] tokens stay on
    top of the budget.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> Random().count(Grid.image(24, 24), Budget(retain=0.25))
        Count(tokens=144, exact=True)
    """

    card: ClassVar[Card] = Card(
        name="random",
        title="Random",
        paper="Baseline: patches drawn at random",
        stages=("projector",),
        kind="baseline",
        summary="Keeps patches drawn uniformly at random.",
        notes=(
            "The draw is made on the CPU from the seed of the call, so it is the same on every "
            "device.",
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
        """Keep a random choice of the item's patches."""
        if context.budget.is_full:
            return None
        grid = context.grid
        patch_P = grid.patch_index(tokens.device)
        keep = max(1, context.budget.count(len(patch_P)))
        choice_1K = ops.random_indices(
            1, len(patch_P), keep, seed=context.seed, device=tokens.device
        )
        kept_K = with_newlines(patch_P[choice_1K[0]], grid, "row")
        cls_K = (grid.kinds(tokens.device) == TokenKind.CLS).nonzero()[:, 0]
        return Reduction.select(torch.cat([kept_K, cls_K]).sort().values, tokens.num_tokens)
