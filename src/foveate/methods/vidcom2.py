"""VidCom2: give distinctive frames more of the budget, and keep the distinctive tokens of each.

Legend: T frames, L patches of a frame, C channels, K kept patches.
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
    Grid,
    PatchSelector,
    ProjectorContext,
    Tokens,
    frames_of,
)

#: Widths of the Gaussian kernels that are added up.
_ALPHAS = tuple(2.0**power for power in range(-3, 2))


def steady_channels(x_TLC: torch.Tensor, share: float) -> torch.Tensor:
    """The `share` of the channels whose variance over the video is lowest, at least one.

    Returns:
        [T, L, C'] in float32.
    """
    C = x_TLC.shape[-1]
    count = max(1, int(C * share))
    if count == C:
        return x_TLC.float()
    x_PC = x_TLC.flatten(0, 1).float()
    # Three times as fast as `var`, which walks down the columns.
    variance_C = (x_PC - x_PC.mean(0)).square_().mean(0)
    return x_TLC[..., ops.top_k(-variance_C, count)].float()


def similarity_to_means(
    x_TLC: torch.Tensor, measure: Literal["gaussian", "cosine"] = "gaussian"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity of every patch to the mean of the video and to the mean of its frame. O(T L C).

    Patches are scaled to unit length before they are averaged.

    Args:
        x_TLC: features, float32.
        measure: "gaussian" adds up kernels exp(-|x - mean|^2 / (2 a)) for a = 1/8 .. 2; "cosine".

    Returns:
        Both [T, L].

    Source: VidCom2, section 3.2 and 3.3 (arXiv 2505.14454); the kernels are those of its code.
    """
    length_TL = torch.linalg.vector_norm(x_TLC, dim=-1).clamp_min(1e-12)
    # Unit vectors are never formed: their means and products are weighted products with x.
    share_T1L = (1 / length_TL / length_TL.shape[1])[:, None]
    frame_T1C = share_T1L @ x_TLC
    video_11C = frame_T1C.mean(0, keepdim=True)
    return (
        _similarity(x_TLC, video_11C, length_TL, measure),
        _similarity(x_TLC, frame_T1C, length_TL, measure),
    )


def _similarity(
    x_TLC: torch.Tensor, mean_T1C: torch.Tensor, length_TL: torch.Tensor, measure: str
) -> torch.Tensor:
    dot_TL = (x_TLC @ mean_T1C.transpose(1, 2))[..., 0] / length_TL
    square_T1 = mean_T1C.square().sum(-1)
    if measure == "cosine":
        return dot_TL / square_T1.sqrt().clamp_min(1e-12)
    distance_TL = (1 - 2 * dot_TL + square_T1).clamp_min(0)
    return torch.stack([torch.exp(-distance_TL / (2 * alpha)) for alpha in _ALPHAS]).sum(0)


def frame_ratios(video_TL: torch.Tensor, retain: float, temperature: float) -> torch.Tensor:
    """Fraction of every frame that stays, [T], the larger the less the frame is like the video.

    `retain * (1 + softmax(-mean similarity / temperature) - 1 / T)`, at most 1.

    Example:
        >>> similarity_TL = torch.tensor([[2.0], [2.0], [1.9], [2.0]])
        >>> [round(ratio, 2) for ratio in frame_ratios(similarity_TL, 0.2, 0.01).tolist()]
        [0.15, 0.15, 0.35, 0.15]

    Source: VidCom2, section 3.2 (arXiv 2505.14454).
    """
    share_T = torch.softmax(-video_TL.mean(1) / temperature, dim=0)
    return (retain * (1 + share_T - share_T.mean())).clamp(max=1.0)


@dataclass(frozen=True)
class VidCom2(PatchSelector):
    """VidCom2: budgets by how distinctive a frame is, then its most distinctive patches.

    A frame is distinctive when its patches are unlike the mean of the video; a patch when it is
    unlike that and unlike the mean of its frame. Videos only; images pass untouched.

    Args:
        temperature: of the softmax over frames.
        channels: share of the channels, those of lowest variance, that similarities are made from.
        measure: "gaussian" (the official code) or "cosine".
        rounding: "exact" shares exactly round(retain * patches) tokens over the frames; "frame"
            rounds every frame on its own, as the official code does.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> VidCom2().count(Grid.video(32, 14, 14, newlines_at_end=1), Budget(retain=0.25))
        Count(tokens=1569, exact=True)

    Source: arXiv 2505.14454.
    """

    temperature: float = 0.01
    channels: float = 0.5
    measure: Literal["gaussian", "cosine"] = "gaussian"
    rounding: Literal["exact", "frame"] = "exact"

    card: ClassVar[Card] = Card(
        name="vidcom2",
        title="VidCom2",
        paper="Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large "
        "Language Models",
        arxiv="2505.14454",
        year=2025,
        url="https://github.com/xuyang-liu16/VidCom2",
        licence="Apache-2.0",
        stages=("projector",),
        kind="training-free",
        summary="Gives frames that are unlike the rest of the video more of the budget and keeps "
        "the patches of each that are least like the video and the frame.",
        defaults={
            "LLaVA-OneVision-7B (32 frames of 196)": "retain 0.25, temperature 0.01",
            "LLaVA-Video-7B (64 frames of 169)": "retain 0.25, temperature 0.01",
            "Qwen2-VL, Qwen2.5-VL, Qwen3-VL": "retain 0.25, temperature 0.01",
        },
        headline=(
            "LLaVA-OneVision-7B, retain 0.25: 99.6 % of the full model's average at 70.8 % less "
            "generation time of the LLM (abstract)",
        ),
        notes=(
            "Similarities follow the official code (Gaussian kernels on the steadier half of the "
            "channels), which made the published figures; measure='cosine' with channels=1 is the "
            "simpler reading of the text. A patch that is odd only in the livelier half of the "
            "channels is not seen unless channels=1.",
            "The official code rounds every frame on its own, so totals vary by half a token per "
            "frame, and gives every frame at least one; rounding='frame' is that. Here the total "
            "is exact, and every frame has a token where the budget holds that many.",
            "Newline tokens of rows that still hold a patch stay; the official code keeps all of "
            "them for LLaVA-Video (832 tokens for 64 frames). Like newlines at the end and [CLS] "
            "tokens they come on top of the budget.",
        ),
        retain=0.25,
    )

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")
        if not 0 < self.channels <= 1:
            raise ValueError(f"channels is a share in (0, 1], got {self.channels}.")
        if self.measure not in ("gaussian", "cosine"):
            raise ValueError(f'measure must be "gaussian" or "cosine", got {self.measure!r}.')
        if self.rounding not in ("exact", "frame"):
            raise ValueError(f'rounding must be "exact" or "frame", got {self.rounding!r}.')

    def num_kept(self, grid: Grid, budget: Budget) -> int:
        """`round(retain * patches)`, at least one; images keep all."""
        if grid.modality == "image":
            return grid.num_patches
        return super().num_kept(grid, budget)

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Exact unless every frame is rounded on its own or rows end in newlines."""
        counted = super().count(grid, budget)
        if self.rounding == "exact" or counted.tokens == grid.num_tokens:
            return counted
        # A frame rounds up by less than one token, which may save a newline.
        slack = sum(2 if plane.row_newline else 1 for plane in grid.planes)
        return Count(min(counted.tokens + slack, grid.num_tokens), exact=False)

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """The most distinctive patches of every frame; frames' shares go to `context.state`.

        O(T L C) and, for the budgets, O(T^2) at worst.

        Raises:
            ValueError: the frames differ in size.
        """
        x_TLC = steady_channels(frames_of(tokens, context.grid, self.name), self.channels)
        T, L, _ = x_TLC.shape
        video_TL, frame_TL = similarity_to_means(x_TLC, self.measure)
        context.note("likeness to the video", video_TL, caption="the least alike stay")
        context.note("likeness to the frame", frame_TL, caption="the least alike stay")
        ratio_T = frame_ratios(video_TL, keep / (T * L), self.temperature)
        counts = self._counts(ratio_T.tolist(), L, keep)
        context.state["kept"] = counts
        chosen_TK = ops.top_k_ragged(-video_TL - frame_TL, torch.tensor(counts))
        first_T1 = torch.arange(T, device=chosen_TK.device)[:, None] * L
        return (chosen_TK + first_T1)[chosen_TK >= 0]

    def _counts(self, ratios: list[float], size: int, keep: int) -> list[int]:
        """Patches that every frame keeps."""
        if self.rounding == "frame":
            return [max(1, ops.round_half_even(ratio * size)) for ratio in ratios]
        least = 1 if keep >= len(ratios) else 0
        return ops.proportional(keep, ratios, minimum=least, maximum=[size] * len(ratios))
