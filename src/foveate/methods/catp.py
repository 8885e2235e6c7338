"""CATP: prune the images of an in-context prompt by their own text, then by what the query needs.

Legend: P patches of an image, K kept patches of it, N visual tokens of one sample (C of them in
demonstrations, Q in the query), S tokens of its sequence, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    DecoderContext,
    Grid,
    PatchSelector,
    ProjectorContext,
    Reduction,
    Tokens,
    relative_layer,
)


def aligned_coverage(
    x_PD: torch.Tensor, text_D: torch.Tensor | None, keep: int, weight: float
) -> torch.Tensor:
    """Patches that cover the image and are close to its text, in the order of choice, int64 [K].

    Greedy on `sum_x max_y sim(y, x) + weight sum_y sim(y, text)`, sim = (cosine + 1) / 2.
    O(P^2 D) for the similarities.

    Args:
        x_PD: patches of one image.
        text_D: mean embedding of its text; None: coverage alone.
        keep: K.
        weight: of the text, lambda 1 in the paper.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> aligned_coverage(x, torch.tensor([0.0, -1.0]), 2, weight=0.1).tolist()
        [1, 2]
        >>> aligned_coverage(x, torch.tensor([0.0, -1.0]), 2, weight=9.0).tolist()
        [0, 1]

    Source: CATP, stage 1 (arXiv 2508.07871).
    """
    # Exact cosines reach 1; rounded ones exceed it, and a similarity must not be negative.
    similarity_PP = ((ops.cosine_similarity_matrix(x_PD) + 1) / 2).clamp_(min=0)
    bonus_P = None
    if text_D is not None:
        cosine_P = ops.cosine_similarity_matrix(x_PD, text_D[None].to(x_PD.dtype))[:, 0]
        bonus_P = weight * (cosine_P + 1) / 2
    return ops.facility_location(similarity_PP, keep, bonus_N=bonus_P)


def query_start(segment_S: torch.Tensor, visual_N: torch.Tensor) -> int:
    """The first item of the query: the last item, with those that no text parts from it.

    Args:
        segment_S: which item every token belongs to or follows; -1 before the first.
        visual_N: positions of the visual tokens.

    Example:
        >>> segment_S = torch.tensor([-1, 0, 0, 1, 2, 2])      # text, image, text, 2 images, text
        >>> query_start(segment_S, torch.tensor([1, 3, 4]))
        1
    """
    text_S = torch.ones_like(segment_S, dtype=torch.bool)
    text_S[visual_N] = False
    earlier = text_S & (segment_S < segment_S[visual_N].max())
    return int(segment_S[earlier].max()) + 1 if bool(earlier.any()) else 0


@dataclass(frozen=True)
class CATP(PatchSelector):
    """CATP: each image by coverage and its text, then demonstrations as one pool by the query.

    `retain` is the share of the patches that is left in the end; each stage removes half of the
    rest. A prompt of one image has no demonstrations: only its own two cuts are made.

    Args:
        layer: K, the layer whose attention and output rank the demonstrations: an index, or a
            fraction of the depth.
        text_weight: of an image's own text before the LLM (lambda 1).
        query_weight: of likeness to the query inside the LLM (lambda 2).

    Raises:
        ValueError: a weight is negative.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> CATP().count(Grid.image(24, 24), Budget(retain=0.222)).tokens
        351
        >>> CATP().attention_layers(32), CATP().decoder_layers(32)
        ((5, 6), (7, 8))

    Source: arXiv 2508.07871.
    """

    layer: int | float = 6 / 32
    text_weight: float = 0.7
    query_weight: float = 0.6

    card: ClassVar[Card] = Card(
        name="catp",
        title="CATP",
        paper="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal "
        "In-Context Learning",
        arxiv="2508.07871",
        year=2025,
        stages=("projector", "decoder"),
        kind="training-free",
        summary="Prunes the images of an in-context prompt by coverage and their own text, then "
        "all demonstrations together by what the query attends to and resembles.",
        defaults={
            "LLaVA-NeXT-7B": "K 6, lambda 0.7 and 0.6, retain 0.333, 0.222 or 0.101",
            "InternVL2.5-8B, Qwen2.5-VL-7B": "K 6, retain 0.222",
            "LLaVA-NeXT-13B": "K 10, retain 0.222",
        },
        headline=(
            "LLaVA-NeXT-7B, 4-shot, 8 sets relative to the full model: 100.7 % at retain 0.333, "
            "100.1 % at 0.222, 98.6 % at 0.101 (random choice: 90.5, 85.4, 79.9 %)",
            "LLaVA-NeXT-7B at retain 0.222: 79.0 % fewer FLOPs, 3.19 instead of 3.82 s, 0.35 "
            "instead of 1.12 GB of keys and values",
        ),
        notes=(
            "There is no public code. Ours: layer K is the index from 0, its hidden states are its "
            "output; K is 6/32 of the depth by default.",
            "Counts are rounded down, the demonstrations' share too; the query image has what is "
            "left of the total. Every image keeps a patch at first, and demonstrations and query "
            "one each in the end.",
            "What the query image is compared with are demonstration image tokens that are left, "
            "or, without any, the mean of the query.",
            "The last image and the text behind it are the query; images that no text parts from "
            "it (tiles) belong to it, too. A video is one image; where a model takes its frames "
            "for images, the earlier ones are demonstrations.",
            "Newline tokens of rows that still hold a patch pass the first cut on top of the "
            "budget, and compete with the patches in the later ones.",
        ),
        positions="original",
        retain=0.222,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("text.segment",)

    def __post_init__(self) -> None:
        for name in ("text_weight", "query_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")

    # -- before the LLM -------------------------------------------------------------------------

    def num_kept(self, grid: Grid, budget: Budget) -> int:
        """Half of what goes in the end goes here: `floor(P (1 + retain) / 2)`, at least one."""
        P = grid.num_patches
        return max(1, _floor(P * (1 + budget.fraction(P)) / 2))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Choose patches of one image, and tell the LLM how many of them are meant to stay."""
        if context.budget.is_full:
            return None
        P = context.grid.num_patches
        share = torch.tensor(P * context.budget.fraction(P), dtype=torch.float64)
        context.carry("share", share.to(tokens.device).expand(tokens.num_tokens))
        return super().projector(tokens, context)

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """Patches that cover the image and resemble its text."""
        segment_TD = context.signal("text.segment")[0].float()
        text_D = segment_TD.mean(0) if len(segment_TD) else None
        order_K = aligned_coverage(tokens.x_BND[0, patch_P], text_D, keep, self.text_weight)
        context.note(
            "order of choice",
            range(keep),
            caption="0 covers most of the image and its text",
            at=patch_P[order_K],
        )
        return order_K

    # -- inside it ------------------------------------------------------------------------------

    def deep_layer(self, num_layers: int) -> int:
        """K.

        Raises:
            ValueError: it does not exist, or has no layer before it or fewer than two after it.

        Example:
            >>> CATP().deep_layer(32), CATP().deep_layer(28), CATP().deep_layer(4)
            (6, 5, 1)
        """
        if num_layers < 4:
            raise ValueError(f"catp needs four decoder layers at least, got {num_layers}.")
        layer = relative_layer(self.layer, num_layers)
        if 0 < self.layer < 1:
            return min(max(layer, 1), num_layers - 3)
        if not 1 <= layer <= num_layers - 3:
            raise ValueError(
                f"layer = {layer} of {num_layers}: catp compares it with the layer before and "
                f"prunes before the two layers after it, so it lies in 1 .. {num_layers - 3}."
            )
        return layer

    def decoder_layers(self, num_layers: int) -> tuple[int, int]:
        """The two layers after K: before them demonstrations and the query are pruned."""
        layer = self.deep_layer(num_layers)
        return layer + 1, layer + 2

    def attention_layers(self, num_layers: int) -> tuple[int, int]:
        """K and the layer before."""
        layer = self.deep_layer(num_layers)
        return layer - 1, layer

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Keep what the query needs of the demonstrations, then what they leave of the query."""
        if context.budget.is_full or tokens.num_tokens == 0:
            return None
        segment_S = context.segment_S
        start = query_start(segment_S, context.visual_N)
        is_query_N = segment_S[context.visual_N] >= start
        hidden_SD = context.hidden()[0].float()
        query_D = hidden_SD[segment_S >= start].mean(0)
        hidden_ND = hidden_SD[context.visual_N]
        first, second = self.decoder_layers(context.num_layers)
        if context.layer == first:
            context.state["kept"] = self._counts(context, is_query_N)
            if bool(is_query_N.all()):
                return None
            rise_N = context.last_token_attention(first - 1)
            rise_N = (rise_N - context.last_token_attention(first - 2)).clamp_(min=0)
            context.note("rise of attention", rise_N, caption="of the last token, over one layer")
            score_N = rise_N + self.query_weight * cosine_similarity(hidden_ND, query_D[None])
            return _keep_best(score_N, ~is_query_N, context.state["kept"][0])
        if context.layer != second:
            return None
        left_CD = hidden_ND[~is_query_N]
        target_D = left_CD.mean(0) if len(left_CD) else query_D
        score_N = cosine_similarity(hidden_ND, target_D[None])
        context.note("similarity to what is left", score_N, caption="of the demonstrations")
        return _keep_best(score_N, is_query_N, context.state["kept"][1])

    def _counts(self, context: DecoderContext, is_query_N: torch.Tensor) -> tuple[int, int]:
        """Tokens that stay of the demonstrations and of the query."""
        share_N, item_N = context.carried("share"), context.item_N
        # One value per item, that of its first token.
        first_N = torch.ones_like(item_N, dtype=torch.bool)
        first_N[1:] = item_N[1:] != item_N[:-1]
        demonstrations = float(share_N[first_N & ~is_query_N].sum())
        total = _floor(demonstrations + float(share_N[first_N & is_query_N].sum()))
        if demonstrations == 0:
            return 0, max(1, total)
        context_kept = max(1, _floor(demonstrations))
        return context_kept, max(1, total - context_kept)


def _floor(exact: float) -> int:
    """Rounded down; what is whole but for a rounding error stays whole."""
    return math.floor(exact + 1e-6)


def _keep_best(score_N: torch.Tensor, pool_N: torch.Tensor, keep: int) -> Reduction | None:
    """Keep the best of a pool, and everything outside it."""
    num_pool = int(pool_N.sum())
    if keep >= num_pool:
        return None
    score_N = score_N.masked_fill(~pool_N, torch.inf)
    N = len(score_N)
    return Reduction.select(ops.top_k(score_N, keep + N - num_pool), N)
