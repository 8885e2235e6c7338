"""Norm: rank patches by the length of their features, the cheapest score there is.

Legend: N tokens of one item, P patches among them, K kept patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import Card, PatchSelector, ProjectorContext, Tokens


@dataclass(frozen=True)
class Norm(PatchSelector):
    """Keeps the patches with the longest features, or with the shortest. O(N D).

    Args:
        largest: keep the longest; otherwise the shortest.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> Norm().count(Grid.image(24, 24), Budget(tokens=64))
        Count(tokens=64, exact=True)
    """

    largest: bool = True

    card: ClassVar[Card] = Card(
        name="norm",
        title="Norm",
        paper="Baseline: length of the features",
        stages=("projector",),
        kind="baseline",
        summary="Keeps the patches with the longest features.",
        notes=(
            "Encoders may hold global information in a few patches of large norm in places without "
            "detail (registers, arXiv 2309.16588); how much of that the projector lets through "
            "differs, so try largest=False, too.",
        ),
        retain=0.25,
    )

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """The patches of extreme norm."""
        norm_P = tokens.x_BND[0, patch_P].float().norm(dim=-1)
        context.note("norm", norm_P, caption="length of the features")
        return ops.top_k(norm_P if self.largest else -norm_P, keep)
