"""M3: visual tokens at nested granularities, of which the budget picks one.

Legend: T planes (frames or tiles), P patches of one item, k side of the pooling kernel in patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from foveate.core import (
    Budget,
    Card,
    Count,
    Grid,
    Method,
    Plane,
    ProjectorContext,
    Reduction,
    Tokens,
    average_cells,
    merged_groups,
)


def nested_kernels(height: int, width: int) -> tuple[int, ...]:
    """Sides of the nested pooling kernels of a plane, from every patch to one token.

    Each is twice the one before, or three times where only that divides both sides; so every cell
    of a scale is a union of cells of the next finer one.

    Example:
        >>> nested_kernels(24, 24), nested_kernels(27, 27), nested_kernels(14, 14)
        ((1, 2, 4, 8, 24), (1, 3, 9, 27), (1, 2, 4, 8, 16))

    Source: M3, section 3.1 (arXiv 2405.17430) for 24 x 24; other grids are ours.
    """
    kernels = [1]
    while kernels[-1] < max(height, width):
        double, triple = 2 * kernels[-1], 3 * kernels[-1]
        halves = height % double == 0 and width % double == 0
        thirds = height % triple == 0 and width % triple == 0
        kernels.append(triple if thirds and not halves else double)
    return tuple(kernels)


@dataclass(frozen=True)
class M3(Method):
    """M3: average pooling of every frame or tile to one of a few nested sizes.

    The budget of a plane picks the largest size that fits into it; `count` tells which. Planes of
    24 x 24 have 576, 144, 36, 9 and 1 tokens.

    Args:
        kernels: sides of the kernels to choose from, in patches; None takes `nested_kernels`.
        strict: refuse a budget that is not exactly a size, instead of taking the largest below.
        rule: "fit" as above; "released" takes the one kernel that the official code derives from
            the budget s of a plane, `int(sqrt(patches / s))`, which may leave more than s tokens
            and drops rows and columns that fill no kernel.

    Raises:
        ValueError: a kernel is below 1 or the rule is unknown; with `strict`, when counting or
            reducing, a budget is no size of a plane.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> [M3().count(Grid.image(24, 24), Budget(tokens=s)).tokens for s in (576, 100, 9, 5)]
        [576, 36, 9, 1]
        >>> M3().count(Grid.video(32, 14, 14, newlines_at_end=1), Budget(retain=0.25))
        Count(tokens=1569, exact=True)

    Source: arXiv 2405.17430, section 3.1.
    """

    kernels: tuple[int, ...] | None = None
    strict: bool = False
    rule: Literal["fit", "released"] = "fit"

    card: ClassVar[Card] = Card(
        name="m3",
        title="M3",
        paper="Matryoshka Multimodal Models",
        arxiv="2405.17430",
        year=2024,
        url="https://github.com/mu-cai/matryoshka-mm",
        licence="Apache-2.0",
        stages=("projector",),
        kind="trained",
        summary="Averages the patches of every frame or tile on nested grids; the budget picks the "
        "grid.",
        defaults={
            "LLaVA-1.5 (24 x 24 patches)": "576, 144, 36, 9 or 1 tokens",
            "LLaVA-NeXT (tiles of 24 x 24)": "the same, per tile",
            "image grids for videos (5 grids)": "2880, 720, 180, 45 or 5 tokens",
            "SigLIP (27 x 27 patches), our choice": "729, 81, 9 or 1 tokens",
        },
        headline=(
            "LLaVA-1.5-M3 with 576 / 144 / 36 / 9 / 1 tokens: MMBench 65.9 / 66.4 / 64.8 / 63.1 / "
            "59.5, GQA 61.9 / 61.3 / 60.3 / 58.0 / 52.6 (LLaVA-1.5, 576 tokens: 64.8 and 62.0)",
            "LLaVA-NeXT-M3, the same per tile: TextVQA 63.13 / 62.61 / 58.71 / 51.97 / 38.92",
            "Videos with 2880 / 720 / 180 / 45 / 5 tokens: ActivityNet 53.9 / 55.0 / 55.0 / 53.2 / "
            "50.8",
        ),
        notes=(
            "The published figures need weights trained at all sizes; on other models this is "
            "plain average pooling.",
            "The released code does not check the size that is asked for: 49 of 576 gives 64 "
            "tokens. Here the largest size that fits is taken; rule='released' is that behaviour.",
            "Sizes of other grids are ours: kernels grow by 2, or by 3 where only that divides "
            "both sides, and cells at the right and lower edge may be smaller.",
            "Any-resolution images: thumbnail and unpadded mosaic are pooled on their own; the "
            "released code pools every tile before it removes the padding.",
            "One newline per pooled row, newlines at the end and [CLS] tokens come on top of the "
            "budget.",
        ),
        retain=0.25,
    )

    def __post_init__(self) -> None:
        if isinstance(self.kernels, list):  # JSON has no tuples, and frozen methods stay hashable.
            object.__setattr__(self, "kernels", tuple(self.kernels))
        if self.kernels is not None and (not self.kernels or min(self.kernels) < 1):
            raise ValueError(f"kernels are sides in patches, 1 or more, got {self.kernels}.")
        if self.rule not in ("fit", "released"):
            raise ValueError(f'rule must be "fit" or "released", got {self.rule!r}.')

    def scales(self, height: int, width: int) -> dict[int, int]:
        """Tokens of every size of a plane and the kernel that makes it, largest size first.

        Example:
            >>> M3().scales(24, 24)
            {576: 1, 144: 2, 36: 4, 9: 8, 1: 24}
        """
        kernels = self.kernels or nested_kernels(height, width)
        # Of kernels that give the same number of cells the smallest is taken.
        sizes = {_cells(height, width, k): k for k in sorted(kernels, reverse=True)}
        return dict(sorted(sizes.items(), reverse=True))

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Cells of all planes, a newline per pooled row and special tokens, exactly."""
        if budget.is_full:
            return Count(grid.num_tokens)
        total = grid.num_special
        for plane, kernel in zip(grid.planes, self._kernels(grid, budget), strict=True):
            rows, columns = self._shape(plane, kernel)
            total += rows * columns + (rows if plane.row_newline else 0)
        return Count(total)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Average the cells of every plane, weighted by token size. O(P D)."""
        if context.budget.is_full:
            return None
        grid, device = context.grid, tokens.device
        kernels = self._kernels(grid, context.budget)
        if max(kernels) == 1:
            return None
        plane_P, *place_P = grid.positions(device)[grid.patch_index(device)].unbind(1)
        cell_P2 = torch.stack(place_P, 1) // torch.tensor(kernels, device=device)[plane_P, None]
        if self.rule == "released":
            shapes = list(map(self._shape, grid.planes, kernels))
            inside_P2 = cell_P2 < torch.tensor(shapes, device=device)[plane_P]
            cell_P2 = cell_P2.where(inside_P2.all(1, keepdim=True), -1)
        reduction = average_cells(cell_P2, grid, tokens.size_BN)
        context.note("cells", lambda: merged_groups(reduction), "label", "each is one token")
        return reduction

    def _kernels(self, grid: Grid, budget: Budget) -> list[int]:
        """The kernel of every plane."""
        asked = budget.split([plane.num_patches for plane in grid.planes])
        return [self._kernel(plane, s) for plane, s in zip(grid.planes, asked, strict=True)]

    def _kernel(self, plane: Plane, asked: int) -> int:
        scales = self.scales(plane.height, plane.width)
        if self.rule == "released":
            ratio = plane.num_patches / asked
            kernel = min(int(ratio**0.5), plane.height, plane.width)
            size = (plane.height // kernel) * (plane.width // kernel)
        else:
            size = next((size for size in scales if size <= asked), min(scales))
            kernel = scales[size]
        if self.strict and size != asked:
            raise ValueError(
                f"m3 has no size of {asked} tokens for a plane of {plane.height} x {plane.width} "
                f"patches (strict=True); it has {', '.join(map(str, scales))}."
            )
        return kernel

    def _shape(self, plane: Plane, kernel: int) -> tuple[int, int]:
        """Rows and columns of a pooled plane."""
        if self.rule == "released":
            return plane.height // kernel, plane.width // kernel
        return -(-plane.height // kernel), -(-plane.width // kernel)


def _cells(height: int, width: int, kernel: int) -> int:
    return -(-height // kernel) * -(-width // kernel)
