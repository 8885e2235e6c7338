"""FasterVLM: keep the visual tokens that the encoder's [CLS] token attends to.

Legend: N tokens of one item, L patches of a plane (tile or frame), T planes, K kept patches of a
plane.
"""

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
    NewlinePolicy,
    ProjectorContext,
    Reduction,
    Tokens,
    with_newlines,
)


def anyres_order(kept_TK: torch.Tensor, side: int, grid_width: int) -> torch.Tensor:
    """Order kept patches as the released code does for an any-resolution image.

    The thumbnail (tile 0) first, then the patches of all other tiles in the raster order of the
    whole picture, in which rows run across tiles.

    Args:
        kept_TK: int64, kept patches of every tile, [1 + tiles, K].
        side: patches along a side of a tile.
        grid_width: tiles in a row of the picture.

    Returns:
        int64 [(1 + tiles) * K], flat indices `tile * side * side + patch`.

    Example:
        >>> anyres_order(torch.tensor([[0], [2], [1]]), side=2, grid_width=2).tolist()
        [0, 9, 6]

    Source: the released code of FasterVLM (arXiv 2412.01818) with LLaVA-NeXT.
    """
    tile_T1 = torch.arange(len(kept_TK), device=kept_TK.device)[:, None]
    flat_TK = tile_T1 * side * side + kept_TK
    place_T1 = tile_T1[1:] - 1
    row_TK = (place_T1 // grid_width) * side + kept_TK[1:] // side
    column_TK = (place_T1 % grid_width) * side + kept_TK[1:] % side
    raster_TK = row_TK * grid_width * side + column_TK
    order = raster_TK.flatten().argsort(stable=True)
    return torch.cat([flat_TK[0].sort().values, flat_TK[1:].flatten()[order]])


@dataclass(frozen=True)
class FasterVLM(Method):
    """FasterVLM: the top patches of every tile or frame by [CLS] attention, blind to the text.

    Args:
        newline: what happens to newline tokens; the released code has none ("remove").
        tokens_per_tile: patches kept per tile or frame, instead of a share of them.

    Raises:
        ValueError: `tokens_per_tile` is below 1 or the newline policy is unknown.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> FasterVLM().count(Grid.video(8, 16, 16), Budget(retain=0.1))
        Count(tokens=208, exact=True)

    Source: arXiv 2412.01818 (version 1).
    """

    newline: NewlinePolicy = "remove"
    tokens_per_tile: int | None = None

    card: ClassVar[Card] = Card(
        name="fastervlm",
        title="FasterVLM",
        paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM "
        "Inference Faster",
        arxiv="2412.01818",
        year=2024,
        url="https://github.com/Theia-4869/FasterVLM",
        licence="Apache-2.0",
        stages=("projector",),
        kind="training-free",
        summary="Ranks patches by the attention of the encoder's [CLS] token and keeps the top of "
        "every tile or frame.",
        defaults={
            "LLaVA-1.5 (576 patches)": "432, 288, 144, 58 or 29 patches",
            "LLaVA-NeXT (5 tiles of 576)": "432, 288, 144, 58 or 29 patches per tile",
            "Video-LLaVA (8 frames of 256)": "192, 128, 64, 26 or 13 patches per frame",
        },
        headline=(
            "LLaVA-1.5-7B, mean of 10 image sets relative to the full model at retain "
            "0.75 / 0.50 / 0.25 / 0.10 / 0.05: 100.18 / 100.12 / 98.75 / 94.24 / 89.41 %",
            "LLaVA-NeXT-7B, the same: 100.41 / 100.53 / 98.73 / 93.55 / 88.85 %",
            "Video-LLaVA, accuracy, the same: 101.16 / 100.14 / 97.73 / 93.76 / 89.28 %",
        ),
        notes=(
            "Encoders without [CLS] are ranked by the attention that patches receive, as the "
            "authors advise for the successor; the paper does not define it.",
            "Any-resolution images: one share for the thumbnail and one for the unpadded mosaic, "
            "in the mosaic's raster order. The released code keeps the same number in every tile "
            "and does not unpad; `anyres_order` reproduces its order.",
            "[CLS] tokens in the prompt are removed, as in the released Video-LLaVA branch.",
            "Users report that the ranking is weak on encoders whose [CLS] was not trained to "
            "summarise (InternVL2 at retain 0.05).",
        ),
        retain=0.25,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = (
        ("encoder.cls_attention", "encoder.received_attention"),
    )

    def __post_init__(self) -> None:
        if self.newline not in ("keep", "row", "end", "remove"):
            raise ValueError(
                f'newline must be "keep", "row", "end" or "remove", got {self.newline!r}.'
            )
        if self.tokens_per_tile is not None and self.tokens_per_tile < 1:
            raise ValueError(f"tokens_per_tile must be at least 1, got {self.tokens_per_tile}.")

    def count(self, grid: Grid, budget: Budget) -> Count:
        """The sum over planes; exact unless newline tokens depend on what is kept."""
        if budget.is_full:
            return Count(grid.num_tokens)
        kept = self._kept_per_plane(grid, budget)
        if self.newline == "remove":
            return Count(sum(kept))
        total = sum(kept) + grid.newlines_at_end
        if self.newline == "end" or not any(plane.row_newline for plane in grid.planes):
            return Count(total)
        rows = [plane.height if plane.row_newline else 0 for plane in grid.planes]
        if self.newline == "keep":
            return Count(total + sum(rows))
        return Count(total + sum(map(min, rows, kept)), exact=False)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep the top patches of every plane, in order."""
        if context.budget.is_full:
            return None
        grid = context.grid
        patch_P = grid.patch_index(tokens.device)
        score_P = context.signal("encoder.cls_attention", "encoder.received_attention")[0][patch_P]
        context.note("attention", score_P, caption="of [CLS], or received where there is none")
        sizes = [plane.num_patches for plane in grid.planes]
        kept = torch.tensor(self._kept_per_plane(grid, context.budget))
        # Planes of different sizes become rows of one padded table.
        table_TL = score_P.new_zeros(len(sizes), max(sizes))
        size_T1 = torch.tensor(sizes, device=tokens.device)[:, None]
        real_TL = torch.arange(max(sizes), device=tokens.device) < size_T1
        table_TL[real_TL] = score_P
        choice_TK = ops.top_k_ragged(table_TL, kept, mask=real_TL)
        first_T1 = size_T1.cumsum(0) - size_T1
        chosen_K = patch_P[(choice_TK + first_T1)[choice_TK >= 0]]
        return Reduction.select(with_newlines(chosen_K, grid, self.newline), tokens.num_tokens)

    def _kept_per_plane(self, grid: Grid, budget: Budget) -> list[int]:
        sizes = [plane.num_patches for plane in grid.planes]
        if self.tokens_per_tile is not None:
            return [min(self.tokens_per_tile, size) for size in sizes]
        return budget.split(sizes)
