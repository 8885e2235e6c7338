"""FoPru: the patches, or the rows of patches, that matter most to the encoder's own attention.

Legend: I images of an item (frames, tiles), N patches of one of them; T planes (frames or tiles) of
one shape, h rows and w columns of patches, L = h w patches of a plane, K kept patches of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    EncoderAttentionView,
    Grid,
    Plane,
    PlaneSelector,
    ProjectorContext,
    Reduction,
    Tokens,
)


def significance(view: EncoderAttentionView) -> torch.Tensor:
    """How much every patch matters in a block, float32 [I, N].

    Of the attention that patches receive from patches and that they give to patches, both means
    over heads, whichever varies more inside the image; [CLS] is cut from both axes, not
    renormalised.

    Source: FoPru (arXiv 2411.14164), token significance; the choice by variance is that of a public
    re-implementation.
    """
    received_IN, given_IN = view.received(), view.given()
    received_wins_I = received_IN.var(dim=1) > given_IN.var(dim=1)
    return torch.where(received_wins_I[:, None], received_IN, given_IN)


def focal_choice(
    score_TL: torch.Tensor, width: int, keep: int, strategy: Literal["rank", "row"] = "rank"
) -> torch.Tensor:
    """The `keep` patches of largest score, or the best `keep // width` rows: int64 [T, K].

    Args:
        score_TL: significance of the patches of every plane.
        width: columns of patches, w.
        keep: K.
        strategy: "rank" takes single patches; "row" whole rows by the sum of their scores.

    Example:
        >>> score_TL = torch.tensor([[0.0, 5.0, 3.0, 3.0]])
        >>> focal_choice(score_TL, 2, 2).tolist(), focal_choice(score_TL, 2, 2, "row").tolist()
        ([[1, 2]], [[2, 3]])

    Source: FoPru (arXiv 2411.14164), token pruning.
    """
    if strategy == "rank":
        return ops.top_k(score_TL, keep)
    row_TR = ops.top_k(score_TL.unflatten(1, (-1, width)).sum(2), keep // width)
    return (row_TR[..., None] * width + torch.arange(width, device=row_TR.device)).flatten(1)


@dataclass(frozen=True)
class FoPru(PlaneSelector):
    """FoPru: ranks patches by the attention of the block that feeds the projector.

    Blind to the text. Every frame or tile keeps its share of the budget, rounded down.

    Args:
        strategy: "rank" keeps single patches, "row" whole rows of the image.

    Raises:
        ValueError: there is no such strategy.

    Example:
        >>> grid = Grid.image(24, 24)
        >>> FoPru().count(grid, Budget(retain=0.25)).tokens
        144
        >>> FoPru("row").count(grid, Budget(retain=0.3)).tokens     # 7 rows of 24
        168

    Source: arXiv 2411.14164.
    """

    strategy: Literal["rank", "row"] = "rank"

    card: ClassVar[Card] = Card(
        name="fopru",
        title="FoPru",
        paper="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
        arxiv="2411.14164",
        year=2024,
        stages=("projector",),
        kind="training-free",
        summary="Keeps the patches or the rows of patches that are most significant in the "
        "encoder's own attention.",
        defaults={"LLaVA family": "retain 0.25; both strategies are offered"},
        headline=(
            "A quarter of the visual tokens keeps accuracy within about 1 % on several sets; 0.2 % "
            "of them still reach about 60 % on AI2D and ScienceQA (from summaries of the paper)",
        ),
        notes=(
            "There is no official code; the choice between received and given attention by their "
            "variance follows a public re-implementation.",
            "Significance is read from the block whose output becomes the features; [CLS] is cut "
            "from queries and keys without renormalising.",
            "Tiles and video frames are chosen one by one. Rows are those of the tokens' grid, of "
            "any-resolution images those of the thumbnail and of the unpadded mosaic.",
            "Counts are rounded down, to at least one patch or one row of every plane.",
        ),
        retain=0.25,
    )

    def __post_init__(self) -> None:
        if self.strategy not in ("rank", "row"):
            raise ValueError(f'strategy must be "rank" or "row", got {self.strategy!r}.')

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """The block that makes the features."""
        return (feature_layer,)

    def kept_per_plane(self, grid: Grid, budget: Budget) -> Sequence[int]:
        """Patches that stay of every plane: the share rounded down, whole rows for "row"."""
        sizes = [plane.num_patches for plane in grid.planes]
        kept = budget.split(sizes, rounding="floor")
        if self.strategy == "rank":
            return kept
        widths = [plane.width for plane in grid.planes]
        return [max(1, count // w) * w for count, w in zip(kept, widths, strict=True)]

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Choose patches or rows in every plane of one item."""
        if context.budget.is_full:
            return None
        view = context.encoder_attentions()[0]
        context.state["significance"] = view.to_tokens(significance(view))[0]
        context.note("significance", context.state["significance"], caption="in encoder attention")
        return super().projector(tokens, context)

    def choose_in_planes(
        self,
        tokens: Tokens,
        context: ProjectorContext,
        source_TL: torch.Tensor,
        plane: Plane,
        keep: int,
    ) -> torch.Tensor:
        """The most significant patches or rows of every plane."""
        score_TL = context.state["significance"][source_TL]
        return focal_choice(score_TL, plane.width, keep, self.strategy)
