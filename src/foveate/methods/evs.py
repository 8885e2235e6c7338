"""EVS: keep the patches of a video that changed since the frame before.

Legend: T frames, L patches of a frame, K kept patches, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Grid,
    PatchSelector,
    ProjectorContext,
    Tokens,
    frames_of,
)


@dataclass(frozen=True)
class EVS(PatchSelector):
    """EVS: the first frame whole, then the patches least like the same place one frame earlier.

    All frames after the first share one ranking over the whole clip. Videos only; images pass
    untouched. The first frame stays whole even when the budget is smaller, so a clip of T frames
    never keeps less than 1/T of its patches; `count` says so.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> EVS().count(Grid.video(32, 14, 14), Budget(retain=0.25))
        Count(tokens=1568, exact=True)
        >>> EVS().count(Grid.video(4, 14, 14), Budget(retain=0.1))
        Count(tokens=196, exact=True)

    Source: arXiv 2510.14624.
    """

    card: ClassVar[Card] = Card(
        name="evs",
        title="EVS",
        paper="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM "
        "Inference",
        arxiv="2510.14624",
        year=2025,
        url="https://github.com/vllm-project/vllm/blob/main/vllm/multimodal/evs.py",
        licence="Apache-2.0 (the file in vLLM carries NVIDIA's copyright)",
        stages=("projector",),
        kind="training-free",
        summary="Keeps the first frame whole and, over the whole clip, the patches that differ "
        "most from the same place in the frame before.",
        defaults={
            "Qwen2.5-VL, Qwen3-VL and Cosmos-Reason1 in vLLM": "chosen by the user; its example "
            "is retain 0.25",
            "Nemotron Nano V2 VL (trained with it)": "retain 0.30",
        },
        headline=(
            "Up to 4 times less time to first token with minimal loss of accuracy (abstract)",
        ),
        notes=(
            "Patches are compared by the cosine of their projected features, as in vLLM; the paper "
            "also describes differences of pixels.",
            "round(retain * patches) tokens stay, at least the first frame; vLLM rounds down.",
            "Newline tokens of rows that still hold a patch, newlines at the end and [CLS] tokens "
            "come on top of the budget.",
            "With encoders that join two frames into one temporal patch, these take the place of "
            "frames.",
        ),
        positions="original",
        retain=0.25,
    )

    def num_kept(self, grid: Grid, budget: Budget) -> int:
        """`round(retain * patches)`, at least the first frame; images keep all."""
        if grid.modality == "image":
            return grid.num_patches
        return max(grid.planes[0].num_patches, budget.count(grid.num_patches))

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """The first frame and the patches that changed most. O(T L D).

        Raises:
            ValueError: the frames differ in size.
        """
        x_TLD = frames_of(tokens, context.grid, self.name)
        first = x_TLD.shape[1]
        change_K = -ops.adjacent_similarity(x_TLD).flatten()
        context.note("change", change_K, caption="from the frame before", at=patch_P[first:])
        later_K = first + ops.top_k(change_K, keep - first)
        return torch.cat([torch.arange(first, device=tokens.device), later_K])
