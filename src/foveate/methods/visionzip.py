"""VisionZip: keep the patches that the encoder attends to, and merge the rest into a few.

Legend: T planes (frames or tiles), L patches of a plane, D dominant, C contextual and R remaining
patches of it, Q of these that are merged away, N tokens of one item, E channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    EncoderAttentionView,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    count_by_plane,
    merge_by_plane,
    merged_groups,
    take_planes,
)

Merge = Literal["mean", "add"]


def zip_planes(
    score_TL: torch.Tensor,
    metric_TLE: torch.Tensor,
    dominant: int,
    contextual: int,
    *,
    size_TL: torch.Tensor | None = None,
    merge: Merge = "mean",
) -> Reduction:
    """Keep the `dominant` best patches of every plane and merge the rest into `contextual` tokens.

    Contextual tokens stand evenly spaced among the patches that are left; each takes in those of
    the others that are most similar to it. Dominant tokens come first, both in raster order.
    O(T Q C E).

    Args:
        score_TL: attention that a patch receives.
        metric_TLE: what similarity (cosine) is measured on.
        dominant: D, patches kept as they are.
        contextual: C, merged tokens; with none the rest is dropped. D + C <= L.
        size_TL: weights of the patches in an average; None for ones.
        merge: "mean" over a contextual token and those it takes in; "add" their mean to it.

    Source: VisionZip, section 3.2 (arXiv 2412.04467); spacing and "add" are those of its code.
    """
    T, L = score_TL.shape
    device = score_TL.device
    dominant_TD = ops.top_k(score_TL, dominant)
    rest_TL = torch.ones(T, L, dtype=torch.bool, device=device).scatter_(1, dominant_TD, False)
    rest_TR = rest_TL.nonzero()[:, 1].view(T, L - dominant)
    step = max(1, rest_TR.shape[1] // max(contextual, 1))
    place_C = step * torch.arange(contextual, device=device)
    target_TC = rest_TR[:, place_C]
    slot_TL = torch.full((T, L), -1, device=device)
    slot_TL.scatter_(1, dominant_TD, torch.arange(dominant, device=device).expand(T, -1))
    slot_C = dominant + torch.arange(contextual, device=device)
    slot_TL.scatter_(1, target_TC, slot_C.expand(T, -1))
    anchor_TM = torch.cat([dominant_TD, target_TC], dim=1)
    merged_R = torch.ones(rest_TR.shape[1], dtype=torch.bool, device=device)
    source_TQ = rest_TR[:, merged_R.index_fill(0, place_C, False)]
    if contextual and source_TQ.shape[1]:
        # For all patches: that takes less time than copying those that are left.
        home_TL = ops.most_similar(metric_TLE, ops.gather_tokens(metric_TLE, target_TC))
        slot_TL.scatter_(1, source_TQ, dominant + home_TL.gather(1, source_TQ))
    if merge == "mean":
        return Reduction.merge(slot_TL, dominant + contextual, size_TL, anchor_TM)
    # The mean of those taken in, and the contextual token itself on top.
    is_source_TL = torch.zeros_like(rest_TL).scatter_(1, source_TQ, True)
    taken_TL = is_source_TL.float() if size_TL is None else is_source_TL * size_TL.float()
    total_TM = ops.scatter_sum(taken_TL[..., None], slot_TL, dominant + contextual)[..., 0]
    share_TL = taken_TL / total_TM.gather(1, slot_TL.clamp(min=0)).clamp_min(1e-12)
    weight_TL = share_TL.where(is_source_TL, 1.0)
    return Reduction.merge(slot_TL, dominant + contextual, weight_TL, anchor_TM, normalise=False)


def mean_keys(view: EncoderAttentionView) -> torch.Tensor:
    """Keys of an encoder block, mean over heads, for the language model's tokens, [1, N, d].

    They go the way of the features (pooling, merging, unpadding), one channel after the other.
    """
    return view.to_tokens(view.patch_keys().float().mean(1))


@dataclass(frozen=True)
class VisionZip(Method):
    """VisionZip: dominant patches by [CLS] attention, the rest merged into contextual tokens.

    Blind to the text. Every frame or tile keeps its share of the budget.

    Args:
        contextual: share of the kept tokens that are contextual; the published splits have 5/32.
        merge: "mean" averages a contextual token and the patches it takes in; "add" adds the mean
            of these to it, as the official code does in front of the projector.
        similarity: what tells how alike patches are: "keys" of the block that makes the features,
            mean over heads, or the projected "features".

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> [VisionZip().split(kept) for kept in (64, 128, 192)]
        [(54, 10), (108, 20), (162, 30)]
        >>> from foveate.core import Budget, Grid
        >>> VisionZip().count(Grid.image(24, 24), Budget(tokens=64))
        Count(tokens=64, exact=True)

    Source: arXiv 2412.04467, section 3.
    """

    contextual: float = 5 / 32
    merge: Merge = "mean"
    similarity: Literal["keys", "features"] = "keys"

    card: ClassVar[Card] = Card(
        name="visionzip",
        title="VisionZip",
        paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        arxiv="2412.04467",
        year=2024,
        url="https://github.com/dvlab-research/VisionZip",
        licence="Apache-2.0",
        stages=("projector",),
        kind="training-free",
        summary="Keeps the patches of highest [CLS] attention of every tile or frame and merges "
        "the others into a few contextual tokens.",
        defaults={
            "LLaVA-1.5 (576 patches)": "54 + 10, 108 + 20 or 162 + 30 dominant and contextual "
            "tokens",
            "LLaVA-NeXT (5 tiles of 576)": "320 tokens as 54 + 10 per tile, 640 as 108 + 20, 160 "
            "as 32 per tile",
            "Video-LLaVA (8 frames of 256)": "136 tokens, 17 per frame",
        },
        headline=(
            "About 10 % of the visual tokens keep nearly 95 % of the performance without training "
            "(the authors' repository)",
            "LLaVA-NeXT: prefill 8 times faster; the 13B model answers faster and better than the "
            "untouched 7B model (abstract)",
        ),
        notes=(
            "Keys are read as the block uses them (rotated, where it has rotary positions) and "
            "pooled or merged like the features; similarity='features' does without them.",
            "Acts after the projector, on what it made of the patches; the official code merges in "
            "front of it. It also keeps the encoder's [CLS] token as one of the dominant tokens, "
            "which transformers models do not pass on; here a patch takes its place.",
            "The official code adds the mean of the merged patches to a contextual token, which "
            "doubles its length; merge='add' is that, the default is their common mean.",
            "Encoders without [CLS] are ranked by the attention that patches receive.",
            "Splits for other budgets are ours: 5/32 of the tokens of a plane, rounded, are "
            "contextual, so that fewer than four tokens are all dominant.",
            "Contextual tokens follow the dominant ones of their plane, as published; where rows "
            "end in newlines, tokens are in raster order and rows that still hold one keep their "
            "newline.",
            "Any-resolution images: one share for the thumbnail and one for the unpadded mosaic, "
            "instead of one per tile.",
        ),
        retain=64 / 576,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = (
        ("encoder.cls_attention", "encoder.received_attention"),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.contextual < 1:
            raise ValueError(
                f"contextual is a share of the kept tokens in [0, 1), got {self.contextual}."
            )
        if self.merge not in ("mean", "add"):
            raise ValueError(f'merge must be "mean" or "add", got {self.merge!r}.')
        if self.similarity not in ("keys", "features"):
            raise ValueError(f'similarity must be "keys" or "features", got {self.similarity!r}.')

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """The block that makes the features, where its keys are read."""
        return (feature_layer,) if self.similarity == "keys" else ()

    def split(self, kept: int) -> tuple[int, int]:
        """Dominant and contextual tokens of a plane that keeps `kept`."""
        contextual = min(ops.round_half_even(kept * self.contextual), kept - 1)
        return kept - contextual, contextual

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Exact per plane; a bound where rows end in newlines."""
        if budget.is_full:
            return Count(grid.num_tokens)
        return count_by_plane(grid, budget.split([plane.num_patches for plane in grid.planes]))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep and merge the patches of every plane of one item."""
        if context.budget.is_full:
            return None
        grid = context.grid
        score_N = context.signal("encoder.cls_attention", "encoder.received_attention")[0]
        context.note("attention", score_N, caption="of [CLS], or received where there is none")
        keys = self.similarity == "keys"
        metric_NE = mean_keys(*context.encoder_attentions())[0] if keys else tokens.x_BND[0]
        size_N = None if tokens.size_BN is None else tokens.size_BN[0]

        def merge(source_TL: torch.Tensor, kept: int) -> Reduction:
            dominant, contextual = self.split(kept)
            made = zip_planes(
                score_N[source_TL],
                take_planes(metric_NE, source_TL),
                dominant,
                contextual,
                size_TL=None if size_N is None else size_N[source_TL],
                merge=self.merge,
            )
            dominant_TD = source_TL.gather(1, made.anchor_BM[:, :dominant])
            context.note("dominant", True, "mark", at=dominant_TD)
            return made

        kept = context.budget.split([plane.num_patches for plane in grid.planes])
        reduction = merge_by_plane(grid, kept, merge, tokens.device)
        context.note("contextual groups", lambda: merged_groups(reduction), "label")
        return reduction
