"""HoliTom: holistic token merging for video LLMs, before the language model and half-way inside it.

This file is longer than most: it holds two stages of one system, each usable without a model.

Legend: T frames, N patches per frame (in `inner`: visual tokens of a sample), C and D channels,
S segments, K kept tokens, M target tokens, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    DecoderContext,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    SearchRange,
    Tokens,
    frames_of,
    with_special,
)

StaticOutput = Literal["beta", "mean"]
InnerMerge = Literal["sequential", "mean"]


@dataclass(frozen=True, eq=False)
class OuterMerge:
    """What the outer stage does with T x N patches.

    Attributes:
        segmentation: the segments, their static places and the tokens that averaging them removes.
        effective_retain: the ratio applied after the temporal merge, corrected for what it removed.
        target_TN: flat index (frame * N + place) of the patch that absorbs each patch, itself when
            it is kept, -1 when it is dropped.
        weight_TN: weight of each patch in the patch that absorbs it; they add up to 1.
        static_TN: True where a patch belongs to a static place of its segment.
    """

    segmentation: ops.Segmentation
    effective_retain: float
    target_TN: torch.Tensor
    weight_TN: torch.Tensor
    static_TN: torch.Tensor


def outer(
    feat_TNC: torch.Tensor,
    attn_TN: torch.Tensor,
    retain: float,
    *,
    tau: float = 0.8,
    beta: float = 0.6,
    neighbours: int = 7,
    max_window: int = 1024,
    static_output: StaticOutput = "beta",
) -> OuterMerge:
    """Segment a video, average what stays the same, and thin out the rest at one common ratio.

    O(T N C + T^2) and, per segment, O(n^2 C) for its n static places.

    Args:
        feat_TNC: projected and pooled features.
        attn_TN: attention that each patch receives in the encoder, pooled alike.
        retain: fraction of all T * N patches that stays, in (0, 1].
        tau: cosine above which a patch repeats its predecessor.
        beta: share of the centre in a merged static token.
        neighbours: nearest patches that make the density of the clustering, itself included.
        max_window: longest segment, in frames.
        static_output: "beta" as above, or "mean" over centre and members.

    Returns:
        `OuterMerge`; turn it into token order with `HoliTom.projector`.

    Source: HoliTom, sections 3.2 and 3.3 (arXiv 2505.21334).
    """
    T, N, _ = feat_TNC.shape
    # Rounding can lift the cosine of equal vectors above 1, which tau = 1 must not see.
    redundant_TN = ops.adjacent_similarity(feat_TNC).clamp(max=1.0) > tau
    segmentation = ops.segment_by_gain(redundant_TN, max_window)
    effective = min(1.0, retain * T * N / (T * N - segmentation.removed))
    lengths_S = segmentation.lengths
    static_TN = segmentation.static.repeat_interleave(lengths_S, dim=0)

    # Dynamic patches: each frame keeps the same share of its own, by attention.
    count_S = [math.ceil(n * effective) for n in (~segmentation.static).sum(1).tolist()]
    count_T = torch.tensor(count_S).repeat_interleave(lengths_S.cpu())
    place_TK = ops.top_k_ragged(attn_TN.float(), count_T, mask=~static_TN)
    kept_TN = torch.zeros(T, N + 1, dtype=torch.bool, device=feat_TNC.device)
    kept_TN = kept_TN.scatter_(1, place_TK.where(place_TK >= 0, N), True)[:, :N]
    own_TN = torch.arange(T * N, device=feat_TNC.device).view(T, N)
    target_TN = own_TN.where(kept_TN, -1)
    weight_TN = kept_TN.float()

    for (first, last), static_N in zip(
        segmentation.bounds.tolist(), segmentation.static, strict=True
    ):
        place_P = static_N.nonzero()[:, 0]
        # The m-th multiple is rounded half to even, so few static places can vanish altogether.
        clusters = min(ops.round_half_even(len(place_P) * effective), len(place_P))
        if clusters == 0:
            continue
        # Averaging all places in one pass over the segment is faster than copying the static ones.
        mean_PC = feat_TNC[first : last + 1].mean(0, dtype=torch.float32)[place_P]
        centre_m, member_P = ops.dpc_knn(mean_PC, clusters, k=neighbours)
        share_P = _shares(centre_m, member_P, beta, static_output)
        target_P = first * N + place_P[centre_m][member_P]
        target_TN[first : last + 1, place_P] = target_P
        weight_TN[first : last + 1, place_P] = share_P / (last - first + 1)
    return OuterMerge(segmentation, effective, target_TN, weight_TN, static_TN)


def inner(
    hidden_ND: torch.Tensor,
    score_N: torch.Tensor,
    retain: float,
    *,
    merge: InnerMerge = "sequential",
) -> Reduction:
    """Fold visual tokens of low attention into the most similar ones of high attention.

    O(N K D). Kept tokens stay in order.

    Args:
        hidden_ND: hidden states that enter the layer.
        score_N: attention of the last token to each visual token, mean over heads.
        retain: fraction kept; `round(N * retain)` tokens, at least one.
        merge: "sequential" halves the target for every source in turn, so that later sources weigh
            more (the official code); "mean" averages target and sources (the paper's text).

    Source: HoliTom, section 3.4 (arXiv 2505.21334).
    """
    N, device = hidden_ND.shape[0], hidden_ND.device
    keep = max(1, ops.round_half_even(N * retain))
    ranked_K = ops.top_k_ranked(score_N, keep)
    kept_K = ranked_K.sort().values
    dropped_N = torch.ones(N, dtype=torch.bool, device=device).index_fill(0, ranked_K, False)
    dropped_R = dropped_N.nonzero()[:, 0]
    # Columns in rank order: among equally similar targets the one of higher attention wins.
    similarity_RK = ops.cosine_similarity_matrix(hidden_ND[dropped_R], hidden_ND[ranked_K])
    slot_N = torch.full((N,), -1, device=device)
    slot_N[kept_K] = torch.arange(keep, device=device)
    target_R = slot_N[ranked_K[similarity_RK.argmax(1)]]
    slot_N[dropped_R] = target_R
    if merge == "mean":
        return Reduction.merge(slot_N, keep, anchor_BM=kept_K)
    source_R, own_K = ops.halving_weights(target_R[None], keep)
    weight_N = torch.empty(N, device=device)
    weight_N[kept_K], weight_N[dropped_R] = own_K[0], source_R[0]
    return Reduction.merge(slot_N, keep, weight_N, kept_K, normalise=False)


@dataclass(frozen=True)
class HoliTom(Method):
    """HoliTom: temporal segments, merging over time and space, then one merge inside the LLM.

    Videos only; images pass untouched. The number of tokens depends on the video.

    Args:
        tau: similarity above which a patch repeats its predecessor; None takes the published value
            for the budget (0.65 up to retain 0.10, otherwise 0.80).
        beta: share of the cluster centre in a merged static token.
        neighbours: neighbours of the density estimate.
        max_window: longest segment, in frames.
        newline: "one_token" puts the static tokens of a segment first and keeps only newlines after
            the video; "grid" keeps raster order and the newline of every row that still holds a
            token; "auto" is "grid" exactly for layouts with row newlines.
        inner_layer: decoder layer before which the inner merge acts: an index, or a fraction of
            the depth.
        inner_retain: fraction of visual tokens that the inner merge keeps; 1 switches it off.
        inner_merge: "sequential" or "mean", see `inner`.
        static_output: "beta" or "mean", see `outer`.
        scores: which attention of the encoder ranks patches: "received" or "cls".

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> HoliTom().count(Grid.video(32, 14, 14, newlines_at_end=1), Budget(retain=0.15))
        Count(tokens=981, exact=False)

    Source: arXiv 2505.21334; settings and the deviations of `card.notes` from the official code.
    """

    tau: float | None = None
    beta: float = 0.6
    neighbours: int = 7
    max_window: int = 1024
    newline: Literal["auto", "one_token", "grid"] = "auto"
    inner_layer: int | float = 18 / 28
    inner_retain: float = 0.5
    inner_merge: InnerMerge = "sequential"
    static_output: StaticOutput = "beta"
    scores: Literal["received", "cls"] = "received"

    card: ClassVar[Card] = Card(
        name="holitom",
        title="HoliTom",
        paper="HoliTom: Holistic Token Merging for Fast Video Large Language Models",
        arxiv="2505.21334",
        year=2025,
        url="https://github.com/cokeshao/HoliTom",
        licence="Apache-2.0",
        stages=("projector", "decoder"),
        kind="training-free",
        summary="Cuts a video where merging over time removes most, averages static places, keeps "
        "attended patches, and folds tokens of low attention once more inside the LLM.",
        defaults={
            "LLaVA-OneVision-7B, retain 0.10": "32 frames, tau 0.65, inner layer 18 of 28, 0.5",
            "LLaVA-OneVision-7B, retain 0.15-0.25": "32 frames, tau 0.80, inner layer 18 of 28, "
            "0.5",
            "LLaVA-OneVision-72B, retain 0.15": "32 frames, tau 0.80, inner layer 60 of 80, 0.5",
            "LLaVA-Video-7B, retain 0.15": "64 frames, tau 0.80, inner layer 18 of 28, 0.5",
        },
        headline=(
            "LLaVA-OneVision-7B, 32 frames, retain 0.15: MVBench 58.1, EgoSchema 61.2, "
            "LongVideoBench 56.4, VideoMME 57.3 (99.7 % of the full model's average) at 10.5 % of "
            "its prefill FLOPs",
            "LLaVA-OneVision-7B, 32 frames, retain 0.10: 57.3, 61.2, 56.3, 56.8 (99.1 %) at 6.9 % "
            "of the prefill FLOPs; time to first token 2.28 times faster",
            "LLaVA-Video-7B, 64 frames, retain 0.15: 57.7, 54.8, 56.2, 62.1 (95.8 %)",
        ),
        notes=(
            "retain is relative to all patches of the video although it is applied after the "
            "temporal merge; newline tokens come on top.",
            "Static places become the average of their segment, placed first, and clusters are "
            "blended with beta, as in the official code; the paper's text says otherwise.",
            "The official density estimate adds noise to break ties; here ties go to the lowest "
            "index, so runs repeat.",
            "Defined by us: encoders with [CLS] (their received attention leaves [CLS] out; "
            "scores='cls' takes the [CLS] row), grids that are not square, several videos per "
            "prompt (each on its own), batches in the inner merge, [CLS] tokens in the prompt "
            "(kept).",
            "The inner layer is a fraction of the depth (18 of 28); for LLaVA-OneVision-72B give "
            "inner_layer=60. Kept tokens hold their positions.",
            "A sample that holds images and no video is left alone inside the LLM, too.",
        ),
        retain=0.15,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("encoder.received_attention",)

    def __post_init__(self) -> None:
        if self.tau is not None and not -1 <= self.tau <= 1.1:
            raise ValueError(f"tau is a cosine threshold in [-1, 1] (or None), got {self.tau}.")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}.")
        if self.neighbours < 1 or self.max_window < 1:
            raise ValueError(
                f"neighbours and max_window must be at least 1, got {self.neighbours} and "
                f"{self.max_window}."
            )
        if not 0 < self.inner_retain <= 1:
            raise ValueError(
                f"inner_retain is the fraction kept and must lie in (0, 1], got "
                f"{self.inner_retain}; 1 switches the inner merge off."
            )
        if self.inner_layer <= 0:
            raise ValueError(
                f"inner_layer = {self.inner_layer}: the merge reads the attention of the layer "
                "before it, so it must be at least 1 (or a fraction of the depth)."
            )
        choices = {
            "newline": ("auto", "one_token", "grid"),
            "inner_merge": ("sequential", "mean"),
            "static_output": ("beta", "mean"),
            "scores": ("received", "cls"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        if self.scores == "cls":
            object.__setattr__(self, "needs", ("encoder.cls_attention",))

    def search_space(self, share: float) -> Mapping[str, SearchRange]:
        """How alike repeated patches are, and what the centre of a merged one weighs."""
        return {"tau": SearchRange(0.5, 1.0), "beta": SearchRange(0.0, 1.0)}

    def count(self, grid: Grid, budget: Budget) -> Count:
        """A bound: rounding up per frame and per segment comes on top of `retain`."""
        if grid.modality == "image" or budget.is_full:
            return Count(grid.num_tokens)
        frames, patches = len(grid.planes), grid.num_patches
        most = math.floor(budget.fraction(patches) * patches + 1.25 * frames + 1e-6)
        special = grid.num_special
        if self._keeps_rows(grid):
            special += sum(plane.height for plane in grid.planes if plane.row_newline)
        return Count(min(min(most, patches) + special, grid.num_tokens), exact=False)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Reduce one video."""
        grid = context.grid
        if grid.modality == "image" or context.budget.is_full:
            return None
        feat_TNC = frames_of(tokens, grid, self.name)
        T, N, _ = feat_TNC.shape
        patch_P = grid.patch_index(tokens.device)
        retain = context.budget.fraction(T * N)
        attn_N = context.signal(*(str(name) for name in self.needs))[0]
        merged = outer(
            feat_TNC,
            attn_N[patch_P].view(T, N),
            retain,
            tau=self.tau if self.tau is not None else (0.65 if retain <= 0.10 else 0.80),
            beta=self.beta,
            neighbours=self.neighbours,
            max_window=self.max_window,
            static_output=self.static_output,
        )
        context.state["segments"] = [(a, b) for a, b in merged.segmentation.bounds.tolist()]
        context.state["static"] = merged.static_TN
        context.note("segments", merged.segmentation.bounds, "frames", "runs of similar frames")
        context.note("static patches", merged.static_TN, "mark", "averaged over their segment")
        context.note("attention", attn_N, caption="that patches receive in the encoder")
        return self._in_prompt_order(merged, grid, patch_P)

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The one layer before which tokens merge; none in a model of one layer."""
        if self.inner_retain == 1 or num_layers < 2:
            return ()
        layer = self.inner_layer
        if 0 < layer < 1:
            return (min(max(round(layer * num_layers), 1), num_layers - 1),)
        if layer >= num_layers:
            raise ValueError(
                f"inner_layer = {layer} does not exist in a model with {num_layers} layers; give "
                "an index below that or a fraction of the depth in (0, 1)."
            )
        return (int(layer),)

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer before it, for the last row of its attention."""
        return tuple(layer - 1 for layer in self.decoder_layers(num_layers))

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Merge the visual tokens of one sample before `context.layer`."""
        images_only = context.modalities == {"image"}
        if tokens.num_tokens == 0 or context.budget.is_full or images_only:
            return None
        score_N = context.last_token_attention(context.layer - 1)
        context.note("attention", score_N, caption="of the last token, in the layer before")
        return inner(tokens.x_BND[0], score_N, self.inner_retain, merge=self.inner_merge)

    def _keeps_rows(self, grid: Grid) -> bool:
        if self.newline == "auto":
            return any(plane.row_newline for plane in grid.planes)
        return self.newline == "grid"

    def _in_prompt_order(self, merged: OuterMerge, grid: Grid, patch_P: torch.Tensor) -> Reduction:
        """The reduction over all tokens of the item, targets in the order of the prompt."""
        T, N = merged.target_TN.shape
        device = patch_P.device
        target_P, weight_P = merged.target_TN.flatten(), merged.weight_TN.flatten()
        anchor_K = (target_P == torch.arange(T * N, device=device)).nonzero()[:, 0]
        raster = self._keeps_rows(grid)
        kept_K = with_special(patch_P[anchor_K], grid, "row" if raster else "end")
        if not raster:
            # Static tokens of a segment come before everything else of its first frame.
            static_N = torch.zeros(grid.num_tokens, dtype=torch.bool, device=device)
            static_N[patch_P] = merged.static_TN.flatten()
            frame_K = grid.positions(device)[kept_K, 0]
            rank_K = 2 * frame_K + (~static_N[kept_K]).long()
            kept_K = kept_K[rank_K.argsort(stable=True)]
        slot_N = torch.full((grid.num_tokens,), -1, device=device)
        slot_N[kept_K] = torch.arange(len(kept_K), device=device)
        weight_N = (slot_N >= 0).float()
        slot_N[patch_P] = slot_N[patch_P[target_P.clamp(min=0)]].where(target_P >= 0, -1)
        weight_N[patch_P] = weight_P
        return Reduction.merge(slot_N, len(kept_K), weight_N, kept_K, normalise=False)


def _shares(
    centre_m: torch.Tensor, member_P: torch.Tensor, beta: float, output: StaticOutput
) -> torch.Tensor:
    """Weight of each static place in its cluster, [P]."""
    size_m = torch.zeros(len(centre_m), device=member_P.device).index_add_(
        0, member_P, torch.ones(len(member_P), device=member_P.device)
    )
    if output == "mean":
        return (1 / size_m)[member_P]
    share_P = ((1 - beta) / (size_m - 1).clamp(min=1))[member_P]
    # A centre without members stays as it is.
    share_P[centre_m] = torch.where(size_m > 1, beta, 1.0)
    return share_P
