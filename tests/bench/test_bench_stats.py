from __future__ import annotations

import math

import numpy as np
import pytest

from foveate.bench import Interval, accuracy, difference, wilson
from foveate.bench.stats import _bootstrap, student_quantile


def test_wilson_solves_its_own_equation() -> None:
    # The ends are where a proportion would be z standard errors from what was seen.
    found = wilson(37, 120)
    for end in (found.low, found.high):
        z = (found.value - end) / math.sqrt(end * (1 - end) / 120)
        assert abs(z) == pytest.approx(1.959964, abs=1e-5)
    assert found.low < found.value == 37 / 120 < found.high


@pytest.mark.parametrize(("correct", "closed"), [(0, (0.0, 0.27753)), (10, (0.72247, 1.0))])
def test_wilson_at_the_ends(correct: int, closed: tuple[float, float]) -> None:
    # With none right the upper end is z^2 / (n + z^2).
    found = wilson(correct, 10)
    assert (found.low, found.high) == pytest.approx(closed, abs=1e-5)


@pytest.mark.parametrize(
    ("freedom", "exact"), [(3, 3.1824), (5, 2.5706), (10, 2.2281), (99, 1.984)]
)
def test_student_quantiles_match_the_tables(freedom: int, exact: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(exact, rel=2e-3)


def test_one_question_per_clip_gives_wilson() -> None:
    right = [True] * 30 + [False] * 10
    found = accuracy(right, [str(n) for n in range(40)])
    assert (found.low, found.high) == (wilson(30, 40).low, wilson(30, 40).high)


def test_many_clips_give_the_cluster_robust_normal_interval() -> None:
    generator = np.random.default_rng(0)
    share = generator.beta(2, 1, size=600)
    right = generator.random((600, 4)) < share[:, None]
    found = accuracy(right.ravel().tolist(), np.repeat(np.arange(600), 4).astype(str).tolist())
    error = right.mean(1).std(ddof=1) / math.sqrt(600)
    assert found.value == pytest.approx(right.mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_copies_of_a_question_add_nothing() -> None:
    right = [True, False, True, True, False, True, True, True]
    clips = list("abcdefgh")
    once = difference(right, [not r for r in right], clips)
    thrice = difference(right * 3, [not r for r in right] * 3, clips * 3)
    assert thrice == once
    # Taken for independent answers, they would seem to.
    assert (wilson(18, 24).high - wilson(18, 24).low) < accuracy(right * 3, clips * 3).high - (
        accuracy(right * 3, clips * 3).low
    )


@pytest.mark.parametrize("clips", [10, 40])
def test_intervals_cover_the_truth(clips: int) -> None:
    # 400 data sets whose clips differ in difficulty: 95 % intervals hold the truth in 92 to 98 %,
    # intervals that take the five answers about a clip for independent ones do not.
    generator = np.random.default_rng(3)
    names = np.repeat(np.arange(clips), 5).astype(str).tolist()
    held = held_gap = held_naive = 0
    for _ in range(400):
        share = generator.beta(2, 1, size=(clips, 1))
        one = (generator.random((clips, 5)) < share).ravel()
        other = (generator.random((clips, 5)) < 0.7 * share).ravel()
        found = accuracy(one.tolist(), names, resamples=1000)
        gap = difference(other.tolist(), one.tolist(), names, resamples=1000)
        naive = wilson(int(one.sum()), one.size)
        held += found.low <= 2 / 3 <= found.high
        held_gap += gap.low <= -0.2 <= gap.high
        held_naive += naive.low <= 2 / 3 <= naive.high
    assert 0.92 <= held / 400 <= 0.985
    assert 0.92 <= held_gap / 400 <= 0.985
    assert held_naive / 400 < 0.90


def test_pairing_narrows_a_difference() -> None:
    generator = np.random.default_rng(0)
    one = generator.random(300) < 0.6
    other = one & (generator.random(300) < 0.9)
    names = [str(n // 3) for n in range(300)]
    gap = difference(other.tolist(), one.tolist(), names)
    apart = accuracy(one.tolist(), names)
    assert gap.high - gap.low < 0.6 * (apart.high - apart.low)
    assert gap.low < gap.value < gap.high < 0


@pytest.mark.parametrize("per_clip", [1, 3])
def test_few_clips_that_differ_prove_nothing(per_clip: int) -> None:
    # Of a fair coin five equal throws are no surprise at 5 %: 2 / 2^5 = 6.25 %; six are.
    names = [str(n // per_clip) for n in range(100 * per_clip)]
    plain = [True] * len(names)
    found = {}
    for lost in range(1, 10):
        worse = [n >= lost * per_clip for n in range(len(names))]
        found[lost] = difference(worse, plain, names).excludes_zero
        assert difference(plain, worse, names).excludes_zero == found[lost]
    assert found == {lost: lost >= 6 for lost in found}


def test_what_does_not_vary_still_has_an_interval() -> None:
    names = [str(n // 4) for n in range(80)]
    everything = accuracy([True] * 80, names)
    assert everything == Interval(1.0, wilson(20, 20).low, 1.0)
    same = difference([True, False] * 40, [True, False] * 40, names)
    assert same.value == 0 and same.high == -same.low == wilson(0, 20).high
    assert accuracy([True, False], ["a", "a"]) == Interval(0.5, 0.0, 1.0)
    assert difference([True], [True], ["a"]) == Interval(0.0, -1.0, 1.0)


def test_large_suites_are_drawn_in_blocks() -> None:
    generator = np.random.default_rng(1)
    total, number = generator.binomial(3, 0.5, 5000).astype(float), np.full(5000, 3.0)
    low, high = _bootstrap(total, number, 0.95, 2000, 0)
    error = (total / 3).std(ddof=1) / math.sqrt(5000)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_same_answers_give_the_same_interval() -> None:
    right, names = [True, False, True, True, False, True], list("aabbcc")
    assert accuracy(right, names) == accuracy(right, names)
    order = [5, 3, 1, 0, 2, 4]
    assert accuracy([right[i] for i in order], [names[i] for i in order]) == accuracy(right, names)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no answers"):
        accuracy([], [])
    with pytest.raises(ValueError, match="came with the clips of 1"):
        accuracy([True, False], ["a"])
    with pytest.raises(ValueError, match="cannot be paired"):
        difference([True], [True, False], ["a"])
    with pytest.raises(ValueError, match="at least one answer"):
        wilson(3, 2)
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        wilson(1, 2, confidence=95)
