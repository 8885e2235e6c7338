"""Average pooling of visual tokens: the baseline that keeps everything, blurred.

Legend: P patches of one item, h and w the pooled grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import (
    Budget,
    Card,
    Count,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    average_cells,
    merged_groups,
)


def pooled_shape(height: int, width: int, most: int) -> tuple[int, int]:
    """The largest grid of at most `most` cells whose shape is close to `height` x `width`.

    Close means that the aspect ratio changes by at most a factor of 2 (if any grid does that); of
    equally large grids the one of closest aspect wins. O(height).

    Example:
        >>> pooled_shape(14, 14, 49), pooled_shape(14, 14, 29), pooled_shape(1, 9, 3)
        ((7, 7), (4, 7), (1, 3))
    """

    def distortion(shape: tuple[int, int]) -> float:
        # Rounded, so that a grid and its transpose tie and the wider one is taken.
        return round(abs(math.log2(shape[0] * width / (shape[1] * height))), 9)

    rows = range(1, min(height, most) + 1)
    shapes = [(row, min(width, most // row)) for row in rows]
    close = [shape for shape in shapes if distortion(shape) <= 1.0] or shapes
    return max(close, key=lambda shape: (shape[0] * shape[1], -distortion(shape), -shape[0]))


@dataclass(frozen=True)
class Pool(Method):
    """Averages neighbouring patches of every frame or tile on a coarser grid.

    The cells partition the plane and differ by at most one row and column in size. A pooled row
    keeps the newline of the row at its middle; newlines at the end and [CLS] tokens stay.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> Pool().count(Grid.video(8, 14, 14), Budget(retain=0.25))
        Count(tokens=392, exact=True)
    """

    card: ClassVar[Card] = Card(
        name="pool",
        title="Average pooling",
        paper="Baseline: average pooling on a coarser grid",
        stages=("projector",),
        kind="baseline",
        summary="Averages neighbouring patches of every frame or tile.",
        notes=(
            "A grid has whole rows and columns, so fewer tokens than the budget may remain: the "
            "largest grid within the budget whose aspect ratio is within a factor of 2 is taken.",
            "One newline per pooled row, newlines at the end and [CLS] tokens come on top of the "
            "budget.",
        ),
        retain=0.25,
    )

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Cells of all planes plus special tokens, exactly."""
        if budget.is_full:
            return Count(grid.num_tokens)
        total = grid.num_special
        for plane, (h, w) in zip(grid.planes, self._shapes(grid, budget), strict=True):
            total += h * w + (h if plane.row_newline else 0)
        return Count(total)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Average the cells of every plane, weighted by token size."""
        if context.budget.is_full:
            return None
        grid, device = context.grid, tokens.device
        plane_P, *place_P = grid.positions(device)[grid.patch_index(device)].unbind(1)
        before_P2 = torch.tensor([(p.height, p.width) for p in grid.planes], device=device)[plane_P]
        after_P2 = torch.tensor(self._shapes(grid, context.budget), device=device)[plane_P]
        cell_P2 = torch.stack(place_P, dim=1) * after_P2 // before_P2
        reduction = average_cells(cell_P2, grid, tokens.size_BN)
        context.note("cells", lambda: merged_groups(reduction), "label", "each is one token")
        return reduction

    def _shapes(self, grid: Grid, budget: Budget) -> list[tuple[int, int]]:
        most = budget.split([plane.num_patches for plane in grid.planes], "floor")
        return [
            pooled_shape(plane.height, plane.width, count)
            for plane, count in zip(grid.planes, most, strict=True)
        ]
