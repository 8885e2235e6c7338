"""HiPrune: objects from a middle encoder block with their neighbours, the rest from a deep block.

Legend: T planes (frames or tiles) of one shape, h rows and w columns of patches, L = h w patches of
a plane, A anchors of it, K kept patches of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from foveate import ops
from foveate.core import (
    Card,
    EncoderAttentionView,
    Plane,
    PlaneSelector,
    ProjectorContext,
    Reduction,
    Tokens,
    relative_layer,
)

Neighbours = Literal["adjacent", "index"]
#: Published object blocks, counted from 1, by depth of the encoder: CLIP ViT-L and Qwen2.5-VL.
OBJECT_LAYERS = {24: 9, 32: 16}
#: An anchor and its four neighbours.
GROUP = 5


def hierarchical_choice(
    object_TL: torch.Tensor,
    deep_TL: torch.Tensor,
    width: int,
    keep: int,
    *,
    alpha: float = 0.1,
    neighbours: Neighbours = "adjacent",
) -> torch.Tensor:
    """Anchors, buffers and registers of every plane, int64 [T, K], ascending.

    Anchors are the `round(alpha * keep / 5)` patches that score best in the object block, buffers
    their four neighbours; registers fill up by the score of the deep block. Where anchors and
    buffers exceed `keep`, buffers of low object score go first. O(T L log L).

    Args:
        object_TL: attention that a patch receives in the object block.
        deep_TL: the same in the deep block.
        width: columns of patches, w.
        keep: K, at most L.
        alpha: share of anchors and buffers.
        neighbours: "adjacent" stays inside the picture; "index" takes the patches one before,
            after, above and below in raster order, whatever their row, clamped to the plane.

    Raises:
        ValueError: `keep` exceeds L.

    Example:
        >>> object_TL = torch.tensor([[0.0, 0, 0, 0, 1, 0, 0, 0, 0]])
        >>> deep_TL = torch.tensor([[0.9, 0, 0, 0, 0, 0, 0, 0, 0.8]])
        >>> hierarchical_choice(object_TL, deep_TL, width=3, keep=6, alpha=0.8).tolist()
        [[0, 1, 3, 4, 5, 7]]

    Source: HiPrune, section 3 (arXiv 2508.00553).
    """
    anchor_TL, near_TL = anchors_and_buffers(
        object_TL, width, keep, alpha=alpha, neighbours=neighbours
    )
    return fill_with_registers(object_TL, deep_TL, anchor_TL, near_TL, keep)


def anchors_and_buffers(
    object_TL: torch.Tensor,
    width: int,
    keep: int,
    *,
    alpha: float = 0.1,
    neighbours: Neighbours = "adjacent",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors, and anchors with their neighbours, bool [T, L] each; `hierarchical_choice`."""
    L = object_TL.shape[1]
    anchor_TA = ops.top_k(object_TL, min(ops.round_half_even(alpha * keep / GROUP), L))
    is_anchor_TL = torch.zeros_like(object_TL, dtype=torch.bool).scatter_(1, anchor_TA, True)
    near_TL = is_anchor_TL.clone()
    if neighbours == "index":
        steps = torch.tensor([-1, 1, -width, width], device=anchor_TA.device)
        near_TL.scatter_(1, (anchor_TA[..., None] + steps).flatten(1).clamp(0, L - 1), True)
    else:
        anchor_Thw, near_Thw = (x.unflatten(1, (-1, width)) for x in (is_anchor_TL, near_TL))
        near_Thw[:, 1:] |= anchor_Thw[:, :-1]
        near_Thw[:, :-1] |= anchor_Thw[:, 1:]
        near_Thw[:, :, 1:] |= anchor_Thw[:, :, :-1]
        near_Thw[:, :, :-1] |= anchor_Thw[:, :, 1:]
    return is_anchor_TL, near_TL


def fill_with_registers(
    object_TL: torch.Tensor,
    deep_TL: torch.Tensor,
    is_anchor_TL: torch.Tensor,
    near_TL: torch.Tensor,
    keep: int,
) -> torch.Tensor:
    """Anchors, then buffers, then the best of the deep block, int64 [T, K], ascending."""
    L = object_TL.shape[1]
    # Ranks instead of scores: anchors above buffers above the rest, whatever the scores' scale.
    priority_TL = torch.where(near_TL, L * (1 + is_anchor_TL.long()), 0)
    priority_TL -= torch.where(near_TL, ops.ranks(object_TL), ops.ranks(deep_TL))
    return ops.top_k(priority_TL, keep)


@dataclass(frozen=True)
class HiPrune(PlaneSelector):
    """HiPrune: anchors and buffers from a middle encoder block, registers from a deep one.

    Blind to the text, and needs no [CLS] token. Every frame or tile keeps its share of the budget.

    Args:
        alpha: share of the kept patches that are anchors and buffers, in [0, 1].
        object_layer: encoder block that looks at objects, counted from 1 as published, or a
            fraction of the depth in (0, 1); None: 9 of 24, 16 of 32, else 3/8 of the depth.
        neighbours: "adjacent", the four neighbours inside the picture, or "index", those of the
            released code: one before and after in raster order (across the edge of a row) and a row
            above and below, clamped to the picture.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> HiPrune().count(Grid.image(24, 24), Budget(tokens=192))
        Count(tokens=192, exact=True)
        >>> HiPrune().encoder_layers(24, 22), HiPrune().encoder_layers(32, 31)
        ((8, 22), (15, 31))

    Source: arXiv 2508.00553.
    """

    alpha: float = 0.1
    object_layer: int | float | None = None
    neighbours: Neighbours = "adjacent"

    card: ClassVar[Card] = Card(
        name="hiprune",
        title="HiPrune",
        paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in "
        "Vision-Language Models",
        arxiv="2508.00553",
        year=2025,
        url="https://github.com/Danielement321/HiPrune",
        licence="MIT",
        stages=("projector",),
        kind="training-free",
        summary="Keeps patches that a middle encoder block attends to with their neighbours, and "
        "fills up with those that a deep block attends to.",
        defaults={
            "LLaVA-1.5 (576 patches)": "192, 128 or 64 tokens; alpha 0.1, object block 9",
            "LLaVA-NeXT (5 tiles of 576)": "640, 320 or 160 tokens, the same for every tile; "
            "alpha 0.1, object block 9",
            "Qwen2.5-VL-3B": "retain 0.334, 0.223 or 0.112; alpha 0.1, object block 16",
        },
        headline=(
            "Up to 99.3 % of the task accuracy with 33.3 % of the tokens and 99.5 % with 11.1 % "
            "(abstract)",
            "FLOPs and latency down by up to 9 times (abstract)",
        ),
        notes=(
            "The released code takes index neighbours: an anchor at the edge of a row has one on "
            'the other side of the picture. neighbours="index" is that; the default keeps to the '
            "paper's spatially adjacent patches.",
            "The deep block is the one whose output becomes the features (the last of Qwen2.5-VL).",
            "On Qwen2.5-VL windows are respected, as in the released code under eager attention; "
            "both published blocks attend to the whole image.",
            "Any-resolution images: one share for the thumbnail and one for the unpadded mosaic; "
            "the released code keeps the same number in every tile, does not unpad and has no "
            "newline tokens. Here rows that still hold a patch keep theirs, on top of the budget.",
            "Several images and video frames are chosen one by one, each with its own width.",
            "Where anchors and buffers exceed the budget the released code fails; here buffers of "
            "low object score go first.",
        ),
        retain=192 / 576,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share of the kept patches in [0, 1], got {self.alpha}.")
        if self.neighbours not in ("adjacent", "index"):
            raise ValueError(f'neighbours must be "adjacent" or "index", got {self.neighbours!r}.')
        if self.object_layer is not None and self.object_layer <= 0:
            raise ValueError(
                f"object_layer counts encoder blocks from 1, or is a fraction of the depth in "
                f"(0, 1); got {self.object_layer}."
            )

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, int]:
        """The object block and the block that makes the features, counted from 0.

        Raises:
            ValueError: the object block does not exist.
        """
        layer = self.object_layer
        if layer is None:
            layer = OBJECT_LAYERS.get(num_layers, max(1, round(3 / 8 * num_layers)))
        if layer < 1:
            layer = max(1, round(layer * num_layers))
        return relative_layer(layer - 1, num_layers, "object_layer - 1"), feature_layer

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Choose patches in every plane of one item."""
        if context.budget.is_full:
            return None
        views = context.encoder_attentions()
        context.state["object_attention"] = global_attention(views[0])
        context.state["deep_attention"] = global_attention(views[-1])
        context.note("object attention", context.state["object_attention"], caption="middle block")
        context.note("deep attention", context.state["deep_attention"], caption="last block")
        return super().projector(tokens, context)

    def choose_in_planes(
        self,
        tokens: Tokens,
        context: ProjectorContext,
        source_TL: torch.Tensor,
        plane: Plane,
        keep: int,
    ) -> torch.Tensor:
        """Anchors, buffers and registers of every plane."""
        object_TL = context.state["object_attention"][source_TL]
        deep_TL = context.state["deep_attention"][source_TL]
        anchor_TL, near_TL = anchors_and_buffers(
            object_TL, plane.width, keep, alpha=self.alpha, neighbours=self.neighbours
        )
        place_TK = fill_with_registers(object_TL, deep_TL, anchor_TL, near_TL, keep)
        kept_TL = torch.zeros_like(near_TL).scatter_(1, place_TK, True)
        context.note("anchors", kept_TL & anchor_TL, "mark", at=source_TL)
        context.note("buffers", kept_TL & near_TL & ~anchor_TL, "mark", at=source_TL)
        context.note("registers", kept_TL & ~near_TL, "mark", at=source_TL)
        return place_TK


def global_attention(view: EncoderAttentionView) -> torch.Tensor:
    """Attention that every token of an item receives from all queries, [CLS] too, float32 [N]."""
    return view.to_tokens(view.received(queries="all"))[0]
