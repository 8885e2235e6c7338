"""Which values of a method's arguments are worth trying."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SearchRange:
    """Where an argument of a method is searched, both ends included.

    Args:
        low, high: ends of the range.
        integer: only whole numbers.
        log: search on a logarithmic scale.

    Raises:
        ValueError: the ends are not finite, not in order, not whole where they must be, or not
            positive on a logarithmic scale.

    Example:
        >>> SearchRange(0, 8).at(0.25), SearchRange(2, 8, integer=True).at(0.3)
        (2.0, 4)
        >>> round(SearchRange(1, 100, log=True).at(0.5), 6)
        10.0
    """

    low: float
    high: float
    integer: bool = False
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range needs finite low < high, got {self.low} and {self.high}.")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError(f"an integer range has whole ends, got {self.low} and {self.high}.")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above 0, got {self.low}.")

    def at(self, unit: float) -> float:
        """The value at a place in [0, 1] of the range.

        Whole numbers have equal shares of it.
        """
        low, high = self._ends()
        value = low + unit * (high - low)
        value = math.exp(value) if self.log else value
        if self.integer:
            return int(min(max(round(value), self.low), self.high))
        if not 0 < unit < 1:  # logarithms do not come back exactly
            return float(self.low if unit <= 0 else self.high)
        return min(max(value, self.low), self.high)

    def place(self, value: float) -> float:
        """Where in the range a value lies, in [0, 1]: the inverse of `at`.

        Example:
            >>> SearchRange(0, 8).place(2.0), SearchRange(1, 3, integer=True).place(2)
            (0.25, 0.5)
        """
        low, high = self._ends()
        value = math.log(value) if self.log else value
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def _ends(self) -> tuple[float, float]:
        low, high = self.low, self.high
        if self.integer:
            # Half a step beyond both ends, so that these are met as often as the others.
            low, high = low - 0.5, high + 0.5
        return (math.log(low), math.log(high)) if self.log else (low, high)
