"""Random selection of visual tokens: the baseline that every method should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import Card, PatchSelector, ProjectorContext, Tokens


@dataclass(frozen=True)
class Random(PatchSelector):
    """Keeps patches drawn at random, in order; equal seeds give equal draws on every device.

    The newline of every row that still holds a patch, newlines at the end and [CLS] tokens stay on
    top of the budget.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> Random().count(Grid.image(24, 24), Budget(retain=0.25))
        Count(tokens=144, exact=True)
    """

    card: ClassVar[Card] = Card(
        name="random",
        title="Random",
        paper="Baseline: patches drawn at random",
        stages=("projector",),
        kind="baseline",
        summary="Keeps patches drawn uniformly at random.",
        notes=(
            "The draw is made on the CPU from the seed of the call, so it is the same on every "
            "device.",
            "Newline tokens of rows that still hold a patch, newlines at the end and [CLS] tokens "
            "come on top of the budget.",
        ),
        retain=0.25,
    )

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """A random choice of the item's patches."""
        return ops.random_indices(1, len(patch_P), keep, seed=context.seed, device=tokens.device)[0]
