"""GRT: embed what moved since the frame before, then keep as many tokens of every frame.

Legend: B images of a call, T frames, N patches of a frame, L tokens of a frame in the language
model, C channels, K key frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Grid,
    PatchesContext,
    PatchSelector,
    ProjectorContext,
    Tokens,
    frames_of,
)

Policy = Literal["motion", "all", "random", "uniform", "codec"]
Reference = Literal["previous", "last_kept"]


def motion_gate(
    pixels_T3HW: torch.Tensor,
    patch_size: tuple[int, int],
    tau: float,
    metric: Literal["l2", "ssim"] = "l2",
    reference: Reference = "previous",
    starts_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches moved, bool [T, N], and how far, float32 [T, N] (zero in first frames).

    O(pixels). Scores above `tau` pass; first frames of clips pass whole, and so does everything
    when `tau` is negative.

    Args:
        pixels_T3HW: normalised pictures.
        patch_size: (height, width) of a patch.
        tau: threshold.
        metric: see `foveate.ops.patch_change`.
        reference: compare with the frame before, or with each patch as it last passed, so that slow
            drift adds up until it passes.
        starts_T: first frames of clips, bool; None: only the first of all.

    Example:
        >>> clip = torch.zeros(3, 3, 8, 8)
        >>> clip[2, :, :4, :4] = 1
        >>> motion_gate(clip, (4, 4), tau=0.3)[0].int().tolist()
        [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]

    Source: arXiv 2509.14199; details from the released code.
    """
    x_TNV = ops.image_patches(pixels_T3HW, patch_size)
    T, N, _ = x_TNV.shape
    if starts_T is None:
        starts_T = torch.arange(T, device=x_TNV.device) == 0
    change_TN = x_TNV.new_zeros(T, N)
    always = tau < 0
    if reference == "previous":
        change_TN[1:] = ops.patch_change(x_TNV[1:], x_TNV[:-1], metric)
    else:
        # Each frame's reference depends on what passed before, so frames take turns.
        kept_NV = x_TNV[0].clone()
        for t in range(1, T):
            change_TN[t] = ops.patch_change(x_TNV[t][None], kept_NV[None], metric)[0]
            passed_N = (change_TN[t] > tau) | starts_T[t] | always
            kept_NV = x_TNV[t].where(passed_N[:, None], kept_NV)
    keep_TN = (change_TN > tau) | starts_T[:, None] | always
    return keep_TN, change_TN.masked_fill(starts_T[:, None], 0.0)


def motion_score(change_TN: torch.Tensor, starts_T: torch.Tensor | None = None) -> torch.Tensor:
    """Changes relative to the largest of their frame, in [0, 1]; one in first frames of clips."""
    score_TN = change_TN / change_TN.amax(1, keepdim=True).clamp_min(1e-6)
    if starts_T is None:
        starts_T = torch.arange(len(change_TN), device=change_TN.device) == 0
    return score_TN.masked_fill(starts_T[:, None], 1.0)


def reused_embeddings(
    fresh_TND: torch.Tensor, keep_TN: torch.Tensor, position_ND: torch.Tensor
) -> torch.Tensor:
    """The released mode: gated patches keep the embedding of the frame that last embedded them.

    All T x N tokens then go through the encoder; only projections of patches are saved.

    Args:
        fresh_TND: patch projections without positions; those that are not kept are not looked at.
        keep_TN: the gate; the first frame is whole.
        position_ND: spatial position embeddings, added afterwards.

    Example:
        >>> fresh, keep = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[True], [False]])
        >>> reused_embeddings(fresh, keep, torch.zeros(1, 1)).flatten().tolist()
        [1.0, 1.0]
    """
    place_N = torch.arange(keep_TN.shape[1], device=keep_TN.device)
    return fresh_TND[ops.last_true(keep_TN), place_N] + position_ND


def key_frames(
    keep_TN: torch.Tensor, scene_cut: float, starts_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Frames of which more than the share `scene_cut` passed the gate, and first ones, bool [T]."""
    key_T = keep_TN.sum(1) > scene_cut * keep_TN.shape[1]
    if starts_T is None:
        starts_T = torch.arange(len(key_T), device=key_T.device) == 0
    return key_T | starts_T


def scene_divergences(
    mean_KC: torch.Tensor,
    vocabulary: Callable[[torch.Tensor], torch.Tensor],
    released: bool = False,
) -> torch.Tensor:
    """Jensen-Shannon divergence of consecutive key frames over the vocabulary, float32 [K - 1].

    Args:
        mean_KC: mean projected token of every key frame.
        vocabulary: the language model's head, [K, C] -> [K, W] logits.
        released: the released code's formula, with the arguments of KL swapped.
    """
    logits_KW = vocabulary(mean_KC)
    return ops.jensen_shannon(logits_KW[:-1], logits_KW[1:], swapped=released)


def merge_scenes(key_T: torch.Tensor, divergence_K: torch.Tensor, delta: float) -> torch.Tensor:
    """Key frames that stay key frames, bool [T]: those less than `delta` from the one before go.

    Example:
        >>> merge_scenes(torch.tensor([True, False, True]), torch.tensor([0.1]), 0.4).tolist()
        [True, False, False]
    """
    stays_T = key_T.clone()
    stays_T[key_T.nonzero()[1:, 0]] = divergence_K >= delta
    return stays_T


def packed_indices(
    x_TLC: torch.Tensor, score_TL: torch.Tensor, key_T: torch.Tensor, counts_T: torch.Tensor
) -> torch.Tensor:
    """Tokens that every frame keeps, ascending, int64 [T, k], -1 beyond a frame's count.

    Those of largest norm in key frames, those that moved most in all others. O(T L (C + log L)).
    """
    norm_TL = torch.linalg.vector_norm(x_TLC.float(), dim=-1)
    return ops.top_k_ragged(norm_TL.where(key_T[:, None], score_TL), counts_T)


@dataclass(frozen=True)
class GRT(PatchSelector):
    """GRT: only patches that moved enter the encoder; every frame then keeps as many tokens.

    The gate keeps what its threshold lets pass, whatever the budget (a budget of 1 switches it
    off); the rest have the output of the latest frame that computed theirs. The budget is what is
    packed behind the projector: the same number per frame, the largest of key frames and those that
    moved most elsewhere. Videos only; images pass untouched. In an encoder alone, all images of a
    call are frames of one clip.

    Args:
        metric: "l2", the distance of normalised pixels, or "ssim", 1 - SSIM in [0, 2].
        tau: patches that change by more pass; negative: all do.
        reference: "previous" frame, as released (slow drift never passes), or "last_kept", each
            patch as it last passed.
        policy: "motion"; or, for comparison, "all", as many patches per frame drawn at "random" or
            taken "uniform"-ly; "codec" lets every `gop`-th frame pass whole on top of motion.
        gop: frames between whole frames of the "codec" policy.
        scene_cut: a frame is a key frame when more than this share of it passes.
        delta: consecutive key frames whose divergence is below are one scene; 0: none are merged.
        released_divergence: the released code's formula instead of Jensen-Shannon's.
        min_tokens: least number of tokens per frame.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> GRT().count(Grid.video(8, 14, 14), Budget(retain=0.5))
        Count(tokens=784, exact=True)

    Source: arXiv 2509.14199; details from the released code.
    """

    metric: Literal["l2", "ssim"] = "l2"
    tau: float = 0.3
    reference: Reference = "previous"
    policy: Policy = "motion"
    gop: int = 8
    scene_cut: float = 0.8
    delta: float = 0.4
    released_divergence: bool = False
    min_tokens: int = 1

    card: ClassVar[Card] = Card(
        name="grt",
        title="GRT",
        paper="Dense Video Understanding with Gated Residual Tokenization",
        arxiv="2509.14199",
        year=2025,
        url="https://github.com/Hai-chao-Zhang/DenseVideoUnderstand",
        licence="BSD-3-Clause",
        stages=("patches", "projector"),
        kind="training-free",
        summary="Lets only patches that changed since the frame before enter the encoder, merges "
        "scenes that mean the same, and keeps as many tokens of every frame.",
        defaults={
            "LLaVA-OneVision (code)": "l2, tau 0.3, scene_cut 0.8, delta 0.4, retain 0.5, "
            "min_tokens 16",
            "LLaVA-OneVision-0.5B (profile)": "ssim, tau 0.001, 8 frames of 384 pixels, gate only",
            "Qwen2.5-VL-3B (profile)": "l2, tau 0.3, 8 frames, gate only",
            "Qwen2.5-VL-7B (profile)": "l2, tau 30 (3 for questions about subtitles)",
        },
        headline=(
            "DIVE: tokens and time grow less than linearly with the frame rate (abstract)",
            "LLaVA-OneVision-0.5B, eight frames of high motion: grid accuracy 0.0469 to 0.0495, "
            "token F1 0.0419 to 0.0451; accuracy on transitions falls (README)",
        ),
        notes=(
            "The released code sends all tokens through the encoder and saves patch projections "
            "only. Here, as the paper says, gated patches skip the encoder; they attend to nothing "
            "and nothing attends to them, and behind it they have their latest output. Patch "
            "projection itself, a small share, still runs on all of them.",
            "A frame of which nothing passes skips the encoder whole, [CLS] included. Frames share "
            "rows of the encoder's batch, without seeing each other, so that padding is small.",
            "A patch that drifts by less than tau per frame stays as it was; "
            "reference='last_kept' bounds that. Thresholds are in units of the processor's "
            "normalised pixels and depend on resolution and noise.",
            "Merging relabels key frames, as released: tokens are not averaged, and the reduction "
            "comes from packing. Divergence is Jensen-Shannon's; the released code swaps the "
            "arguments of KL. Without a language model scenes are not merged.",
            "The released floor of 16 tokens per frame is min_tokens=16; by default the budget "
            "alone counts. retain rounds up per frame; tokens is shared exactly.",
            "Qwen-VL and VideoLLaMA 3 pack their frames into one row, which the gate refuses; the "
            "released gate there zeroes residuals without skipping work. 'codec' with a fixed "
            "distance of whole frames is ours: the attachment does not see the file's I-frames.",
        ),
        retain=0.5,
    )

    def __post_init__(self) -> None:
        named = (("metric", ("l2", "ssim")), ("reference", ("previous", "last_kept")))
        named += (("policy", ("motion", "all", "random", "uniform", "codec")),)
        for name, known in named:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        for name, least in (("gop", 1), ("min_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")
        if not 0 <= self.scene_cut <= 1:
            raise ValueError(f"scene_cut is a share in [0, 1], got {self.scene_cut}.")
        if self.delta < 0 or math.isnan(self.delta) or math.isnan(self.tau):
            raise ValueError(f"delta must be >= 0 and tau a number, got {self.delta}, {self.tau}.")

    # -- before the encoder ---------------------------------------------------------------------

    def patches(self, context: PatchesContext) -> torch.Tensor:
        """Which patches of every image enter the encoder, bool [B, P]."""
        starts_B = context.clip_starts()
        keep_BP, change_BP = motion_gate(
            context.pixels_B3HW,
            context.patch_size,
            self.tau,
            self.metric,
            self.reference,
            starts_B,
        )
        keep_BP = self._by_policy(keep_BP, starts_B, context)
        score_BP = motion_score(change_BP, starts_B)
        context.note("motion", change_BP, caption="change since the frame before")
        context.note("enters the encoder", keep_BP, "mark")
        key_B = key_frames(keep_BP, self.scene_cut, starts_B)
        context.carry("motion", score_BP)
        context.carry("key", key_B[:, None].expand_as(score_BP).float())
        return keep_BP

    def _by_policy(
        self, keep_BP: torch.Tensor, starts_B: torch.Tensor, context: PatchesContext
    ) -> torch.Tensor:
        """What passes under the policy; controls let as many pass of every frame."""
        if self.policy == "motion":
            return keep_BP
        if self.policy == "all":
            return torch.ones_like(keep_BP)
        if self.policy == "codec":
            order_B = torch.arange(len(starts_B), device=starts_B.device)
            rank_B = order_B - order_B.where(starts_B, 0).cummax(0).values
            return keep_BP | (rank_B % self.gop == 0)[:, None]
        count_B1, P = keep_BP.sum(1, keepdim=True), keep_BP.shape[1]
        if self.policy == "random":
            draw_BP = torch.rand(keep_BP.shape, generator=context.generator())
            rank_BP = draw_BP.argsort(1).argsort(1).to(keep_BP.device)
            return rank_BP < count_B1
        # Patch p is taken where p * count / P passes a whole number.
        place_P = torch.arange(P, device=keep_BP.device)
        return (place_P + 1) * count_B1 // P > place_P * count_B1 // P

    # -- behind it ------------------------------------------------------------------------------

    def kept_per_frame(self, grid: Grid, budget: Budget) -> list[int]:
        """Tokens of every frame that stay: the same number under a fraction.

        Example:
            >>> GRT(min_tokens=16).kept_per_frame(Grid.video(3, 5, 5), Budget(retain=0.5))
            [16, 16, 16]
        """
        sizes = [plane.num_patches for plane in grid.planes]
        kept = budget.split(sizes, "ceil")
        return [min(n, max(k, self.min_tokens)) for n, k in zip(sizes, kept, strict=True)]

    def num_kept(self, grid: Grid, budget: Budget) -> int:
        """The sum over frames; images keep all."""
        if grid.modality == "image":
            return grid.num_patches
        return sum(self.kept_per_frame(grid, budget))

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """The packed tokens of every frame.

        Raises:
            ValueError: the frames differ in size, or the patches stage did not act.
        """
        x_TLC = frames_of(tokens, context.grid, self.name)
        T, L, _ = x_TLC.shape
        score_TL = context.carried_from_encoder("motion")[patch_P].view(T, L)
        key_T = context.carried_from_encoder("key")[patch_P].view(T, L)[:, 0] > 0.5
        if context.vocabulary is not None and self.delta > 0 and int(key_T.sum()) > 1:
            mean_KC = x_TLC[key_T].float().mean(1)
            divergence_K = scene_divergences(
                mean_KC.to(x_TLC.dtype), context.vocabulary, self.released_divergence
            )
            key_T = merge_scenes(key_T, divergence_K, self.delta)
        context.note("scenes", lambda: _scenes(key_T), "frames", "from key frame to key frame")
        counts_T = torch.tensor(self.kept_per_frame(context.grid, context.budget))
        chosen_TK = packed_indices(x_TLC, score_TL, key_T, counts_T.to(x_TLC.device))
        first_T1 = torch.arange(T, device=chosen_TK.device)[:, None] * L
        return (chosen_TK + first_T1)[chosen_TK >= 0]


def _scenes(key_T: torch.Tensor) -> list[tuple[int, int]]:
    """First and last frame of every scene."""
    starts = [*key_T.nonzero()[:, 0].tolist(), len(key_T)]
    return [(first, after - 1) for first, after in pairwise(starts)]
