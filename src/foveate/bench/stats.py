"""Accuracy with intervals that respect that several questions share one clip.

Legend: G clips, R resamples, K columns of figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
#: Largest matrix of resamples, in entries, that is made (and kept) at once.
_MOST_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence interval; NaN ends where there is no interval.

    Example:
        >>> print(Interval(0.5, 0.25, 0.75))
        50.0 % [25.0, 75.0]
        >>> Interval(-0.1, -0.2, -0.05).excludes_zero, Interval(0.5).known
        (True, False)
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        ends = f" [{100 * self.low:.1f}, {100 * self.high:.1f}]" if self.known else ""
        return f"{100 * self.value:.1f} %{ends}"

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def in_points(self, sign: str = "", places: int = 1) -> str:
        """Without the unit, ends with so many places; `sign` "+" for differences.

        Example:
            >>> Interval(-0.031, -0.05, 0.01).in_points("+")
            '-3.1 [-5.0, +1.0]'
        """
        # Adding zero turns -0.0 into 0.0.
        value, low, high = (100 * part + 0.0 for part in (self.value, self.low, self.high))
        ends = f" [{low:{sign}.{places}f}, {high:{sign}.{places}f}]" if self.known else ""
        return f"{value:{sign}.1f}{ends}"

    def as_list(self) -> list[float | None]:
        """[value, low, high], ends None where there is no interval."""
        return [self.value, *((self.low, self.high) if self.known else (None, None))]


def wilson(correct: float, total: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion of independent answers.

    Args:
        correct: right answers (or their effective number), at most `total`.
        total: answers, at least 1.
        confidence: coverage aimed at, in (0, 1).

    Raises:
        ValueError: there are no answers, or more right ones than answers.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.

    Example:
        >>> print(wilson(9, 10))
        90.0 % [59.6, 98.2]
    """
    if not 0 <= correct <= total or total <= 0:
        raise ValueError(f"{correct} of {total} answers cannot be right; give at least one answer.")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) * z
    half = spread / (1 + z * z / total)
    # Rounding must not carry the ends beyond what is possible.
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(share, 0.0 if correct == 0 else low, 1.0 if correct == total else high)


def accuracy(
    correct: Sequence[bool],
    clips: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Fraction right, with an interval over clips.

    Answers about one clip rise and fall together, so whole clips are resampled: a cluster
    bootstrap, percentiles widened for few clips. Where every clip has one question the answers are
    independent and Wilson's interval is exact enough; where all are right or all wrong resampling
    has nothing to vary, and Wilson's interval for as many answers as there are clips stands in.
    One clip says nothing about others: [0, 1].

    Args:
        correct: whether each answer is right.
        clips: the clip of each answer.
        confidence: coverage aimed at, in (0, 1).
        resamples: draws of the bootstrap. Time and memory are O(resamples x clips).
        seed: of the draws, so that the same answers give the same interval.

    Raises:
        ValueError: there are no answers, or the lengths differ.

    Example:
        >>> print(accuracy([True, True, False, True], ["a", "b", "c", "d"]))
        75.0 % [30.1, 95.4]
        >>> accuracy([True, False], ["a", "a"])
        Interval(value=0.5, low=0.0, high=1.0)
    """
    total_G, number_G = _per_clip(np.asarray(correct, dtype=np.float64), clips)
    share = float(total_G.sum() / number_G.sum())
    if len(total_G) == 1:
        return Interval(share, 0.0, 1.0)
    if number_G.max() == 1 or share in (0.0, 1.0):
        found = wilson(share * len(total_G), len(total_G), confidence)
        return Interval(share, found.low, found.high)
    low, high = _bootstrap(total_G, number_G, confidence, resamples, seed)
    return Interval(share, low, high)


def difference(
    one: Sequence[bool],
    other: Sequence[bool],
    clips: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Accuracy of `one` minus that of `other` on the same questions, with a paired interval.

    The same cluster bootstrap as `accuracy`, of the per-question differences. Where no question is
    answered differently nothing varies, and the interval is what as many agreeing clips allow: plus
    and minus the upper Wilson limit of 0 among them. Where so few clips differ that all of them may
    point one way by chance (fewer than six at 95 %, by the sign test), resampling is too sure, and
    the interval is widened to hold zero. One clip gives [-1, 1].

    Args:
        one: whether each answer is right, for example of a reduced model.
        other: the same questions in the same order, for example of the untouched model.
        clips: the clip of each question.
        confidence, resamples, seed: as in `accuracy`.

    Raises:
        ValueError: there are no answers, or the lengths differ.

    Example:
        >>> found = difference([True, False] * 20, [True, True] * 20, list(map(str, range(40))))
        >>> found.value, found.low < -0.3, found.high > -0.7 and found.high < 0
        (-0.5, True, True)
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} answers cannot be paired with {len(other)}.")
    gap = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    total_G, number_G = _per_clip(gap, clips)
    value = float(total_G.sum() / number_G.sum())
    if len(total_G) == 1:
        return Interval(value, -1.0, 1.0)
    mean_G = total_G / number_G
    if np.all(mean_G == mean_G[0]):
        margin = wilson(0, len(total_G), confidence).high
        return Interval(value, max(-1.0, value - margin), min(1.0, value + margin))
    low, high = _bootstrap(total_G, number_G, confidence, resamples, seed)
    if 2.0 ** (1 - np.count_nonzero(total_G)) > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(value, low, high)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t by the Cornish-Fisher expansion, within 1 % from 3 degrees on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.5.

    Example:
        >>> round(student_quantile(0.975, 10), 3)
        2.228
    """
    z, n = NormalDist().inv_cdf(probability), max(freedom, 1)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


def _per_clip(value: np.ndarray, clips: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of answers of every clip, float64 [G] each."""
    if len(value) != len(clips):
        raise ValueError(f"{len(value)} answers came with the clips of {len(clips)}.")
    if len(value) == 0:
        raise ValueError("there are no answers, so there is no accuracy.")
    _, index = np.unique(np.asarray(clips, dtype=str), return_inverse=True)
    return np.bincount(index, value), np.bincount(index).astype(np.float64)


def _bootstrap(
    total_G: np.ndarray, number_G: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Ends of the expanded percentile interval of sum(total) / sum(number) over clips.

    Plain percentiles are too narrow for few clips: by sqrt((G - 1) / G) and by the normal in place
    of Student's quantile. Both are made up for by moving the percentiles outwards.

    Source: T. Hesterberg, The American Statistician 69 (2015), 371-386, section 5.3.
    """
    clips = len(total_G)
    columns_GK = np.stack([total_G, number_G], axis=1)
    drawn_RK = np.concatenate([w @ columns_GK for w in _weights(clips, resamples, seed)])
    share_R = drawn_RK[:, 0] / drawn_RK[:, 1]
    t = student_quantile(0.5 + _checked(confidence) / 2, clips - 1)
    tail = NormalDist().cdf(-t * math.sqrt(clips / (clips - 1)))
    low, high = np.quantile(share_R, (tail, 1 - tail))
    return float(low), float(high)


def _weights(clips: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often every clip is drawn: float32 [R', G], in blocks that bound the memory."""
    if clips * resamples <= _MOST_ENTRIES:
        yield _drawn(clips, resamples, seed, 0)
        return
    rows = max(1, _MOST_ENTRIES // clips)
    for block, start in enumerate(range(0, resamples, rows)):
        yield _draw(clips, min(rows, resamples - start), seed, block)


def _draw(clips: int, rows: int, seed: int, block: int) -> np.ndarray:
    generator = np.random.default_rng([seed, block])
    pick_RG = generator.integers(clips, size=(rows, clips), dtype=np.int32)
    pick_RG += np.arange(rows, dtype=np.int32)[:, None] * clips
    return np.bincount(pick_RG.ravel(), minlength=rows * clips).reshape(rows, clips).astype("f4")


# Every cell of a run asks for the same draws.
_drawn = lru_cache(maxsize=16)(_draw)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}.")
    return confidence
