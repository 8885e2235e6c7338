"""A figure of the report, with its interval where single answers are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from foveate.bench import stats


class Answered(Protocol):
    """What an interval needs to know of an answer."""

    @property
    def clip(self) -> str: ...
    @property
    def correct(self) -> bool: ...


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, or with none (None, None).

    Example:
        >>> Estimate(-0.1, -0.2, -0.05).excludes_zero, Estimate(0.5).half
        (True, None)
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def accuracy_of(answers: Mapping[str, Answered], counted: float) -> Estimate:
    """Fraction right with its interval; `counted` alone where single answers are missing."""
    if not answers:
        return Estimate(counted)
    given = list(answers.values())
    found = stats.accuracy([a.correct for a in given], [a.clip for a in given])
    return Estimate(found.value, found.low, found.high)


def difference_of(one: Mapping[str, Answered], other: Mapping[str, Answered]) -> Estimate | None:
    """Accuracy of `one` minus that of `other` over the questions that both answered."""
    shared = [key for key in one if key in other]
    if not shared:
        return None
    found = stats.difference(
        [one[key].correct for key in shared],
        [other[key].correct for key in shared],
        [one[key].clip for key in shared],
    )
    return Estimate(found.value, found.low, found.high)
