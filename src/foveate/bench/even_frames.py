"""The baseline of the frames stage: fewer frames, taken evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import Card, FramePlan, FramesContext, Method


@dataclass(frozen=True)
class EvenFrames(Method):
    """Takes as many whole frames as there is room for, evenly from the first to the last.

    What every method that chooses frames has to beat at the same number of visual tokens. Only
    benchmarks know it: to take fewer frames, nobody needs a recipe.

    Example:
        >>> import torch
        >>> from foveate.core import Budget
        >>> seconds = torch.arange(9, dtype=torch.float64)
        >>> context = FramesContext(Budget(0.5), EvenFrames(), frames=6, seconds_F=seconds)
        >>> EvenFrames().frames(context).index_K.tolist()
        [0, 4, 8]
    """

    card: ClassVar[Card] = Card(
        name="even_frames",
        title="Even frames",
        paper="Baseline: fewer frames, evenly spaced",
        stages=("frames",),
        kind="baseline",
        summary="Takes fewer frames, evenly.",
        retain=0.25,
    )

    def frames(self, context: FramesContext) -> FramePlan:
        """As many as the budget has room for."""
        return FramePlan(context.evenly(context.num_frames))
