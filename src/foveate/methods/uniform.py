"""Evenly spaced selection of visual tokens: the baseline without any score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import Card, PatchSelector, ProjectorContext, Tokens


@dataclass(frozen=True)
class Uniform(PatchSelector):
    """Keeps evenly spaced patches: the middle one of equal stretches of the item's raster order.

    Frames and tiles therefore keep equal shares. Special tokens stay as in `Random`.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> Uniform().count(Grid.video(8, 14, 14), Budget(tokens=100))
        Count(tokens=100, exact=True)
    """

    card: ClassVar[Card] = Card(
        name="uniform",
        title="Uniform",
        paper="Baseline: evenly spaced patches",
        stages=("projector",),
        kind="baseline",
        summary="Keeps evenly spaced patches.",
        notes=(
            "Spacing is even along the raster order, so every frame and tile keeps its share.",
            "Newline tokens of rows that still hold a patch, newlines at the end and [CLS] tokens "
            "come on top of the budget.",
        ),
        retain=0.25,
    )

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """Evenly spaced patches of the item."""
        return ops.uniform_indices(len(patch_P), keep, tokens.device, endpoints=False)
