"""Axes of the bench charts, and room for labels beside them.

Legend: x and y are in units of the drawing; accuracies and shares of tokens or FLOPs are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from foveate.bench.stats import Interval


@dataclass(frozen=True)
class Scale:
    """An axis of accuracies from `bottom` to `top` with a rule every `step`."""

    bottom: float
    top: float
    step: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Both ends."""
        return self.bottom, self.top

    @property
    def levels(self) -> list[float]:
        """Where the rules are."""
        return [
            self.bottom + number * self.step
            for number in range(round((self.top - self.bottom) / self.step) + 1)
        ]


@dataclass
class Frame:
    """A plot area with its scales; x is logarithmic and falls to the right."""

    low: float
    high: float
    scale: Scale
    width: float = 1080
    height: float = 470
    margins: tuple[float, float, float, float] = (14, 250, 46, 52)  # top, right, bottom, left
    ticks: Sequence[float] = field(default_factory=tuple)

    def x(self, share: float) -> float:
        left, right = self.margins[3], self.width - self.margins[1]
        ratio = math.log(self.high / share) / math.log(self.high / self.low)
        return left + (right - left) * ratio

    def y(self, accuracy: float) -> float:
        above, below = self.margins[0], self.height - self.margins[2]
        return below - (below - above) * (accuracy - self.scale.bottom) / (
            self.scale.top - self.scale.bottom
        )

    @property
    def left(self) -> float:
        return self.margins[3]

    @property
    def right(self) -> float:
        return self.width - self.margins[1]


def accuracy_scale(figures: Sequence[Interval], most: int = 8) -> Scale:
    """A round axis that holds all figures and their intervals, in at most `most` steps.

    Example:
        >>> scale = accuracy_scale([Interval(0.52, 0.47, 0.58), Interval(0.8)])
        >>> scale.bounds, scale.step
        ((0.45, 0.8), 0.05)
    """
    low = min((f.low if f.known else f.value for f in figures), default=0.0)
    high = max((f.high if f.known else f.value for f in figures), default=1.0)
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        last = max(last, first + 1)
        if last - first <= most:
            return Scale(round(first * step, 9), round(last * step, 9), step)
    return Scale(0.0, 1.0, 0.2)


def share_range(shares: Sequence[float]) -> tuple[float, float]:
    """Bounds of a logarithmic axis that holds all shares, with room for a single one."""
    low, high = min(shares, default=0.1), max(shares, default=1.0)
    return (low / 1.08, high * 1.08) if high > low * 1.01 else (low / 1.6, high * 1.6)


def share_ticks(low: float, high: float) -> list[float]:
    """Round shares within an axis, not so many that their labels touch."""
    wanted = (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
    inside = [tick for tick in (*wanted, 0.01, 0.005, 0.002, 0.001) if low <= tick <= high]
    kept: list[float] = []
    for tick in inside:
        if not kept or math.log(kept[-1] / tick) > 0.055 * math.log(high / low):
            kept.append(tick)
    return kept


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as possible to the wanted ones (ascending) and at least `gap` apart.

    Args:
        wanted: places in ascending order.
        gap: distance to keep, made smaller when the room does not suffice.
        low: least place.
        high: greatest place.

    Example:
        >>> spread([10, 11, 50], 10, 0, 100)
        [5.5, 15.5, 50.0]
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    # Without the gaps it is a monotone fit: blocks that would cross take their common mean.
    blocks: list[tuple[float, int]] = []
    for number, place in enumerate(wanted):
        mean, size = float(place - number * gap), 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    last = high - gap * (len(wanted) - 1)
    levels = [min(max(mean, low), last) for mean, size in blocks for _ in range(size)]
    return [level + number * gap for number, level in enumerate(levels)]
