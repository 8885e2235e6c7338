"""Budgets: the values they take, how they round, whom they belong to."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import Budget

RETAIN = st.floats(0, 1, exclude_min=True, allow_subnormal=False)


class TestValues:
    @pytest.mark.parametrize(
        "value", [0.15, 1, 1.0, np.float64(0.15), np.float32(0.5), np.array(0.5)]
    )
    def test_fractions(self, value) -> None:
        budget = Budget(retain=value)
        assert type(budget.retain) in (int, float) and budget.retain == float(value)
        assert budget.num_samples is None

    @pytest.mark.parametrize("value", [1, np.int64(64), np.int32(3), torch.tensor(5)])
    def test_counts(self, value) -> None:
        assert type(Budget(tokens=value).tokens) is int

    @pytest.mark.parametrize(
        "values",
        [
            [0.5, 0.1],
            (0.5, 0.1),
            np.array([0.5, 0.1]),
            torch.tensor([0.5, 0.1], dtype=torch.float64),
        ],
    )
    def test_one_per_sample(self, values) -> None:
        budget = Budget(retain=values)
        assert budget == Budget(retain=(0.5, 0.1)) and hash(budget) == hash(Budget((0.5, 0.1)))
        assert budget.num_samples == 2
        assert [budget.sample(i) for i in range(2)] == [Budget(0.5), Budget(0.1)]
        assert [budget.sample(i, repeats=3).retain for i in range(6)] == [0.5] * 3 + [0.1] * 3
        for index in (2, -1):
            with pytest.raises(ValueError, match=f"names 2 samples, but sample {index}"):
                budget.sample(index)
        for ask in (lambda: budget.count(10), lambda: budget.fraction(10)):
            with pytest.raises(ValueError, match="per sample"):
                ask()

    @pytest.mark.parametrize(
        "value", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, True, "0.5", [], [0.5, 0], [[0.5]],
                  1j, np.float32("nan"), [0.5, None]]
    )  # fmt: skip
    def test_what_is_no_fraction(self, value) -> None:
        with pytest.raises(ValueError, match="retain"):
            Budget(retain=value)

    @pytest.mark.parametrize("value", [0, -3, 2.0, True, "5", [], [4, 0], np.float64(2), math.nan])
    def test_what_is_no_count(self, value) -> None:
        with pytest.raises(ValueError, match="tokens"):
            Budget(tokens=value)

    def test_not_both(self) -> None:
        with pytest.raises(ValueError, match=r"not both \(got retain=0.5, tokens=4\)"):
            Budget(0.5, 4)

    def test_full(self) -> None:
        assert Budget().is_full and Budget(1.0).is_full and Budget((1, 1.0)).is_full
        assert not Budget(0.999).is_full and not Budget((1.0, 0.5)).is_full
        assert not Budget(tokens=10**9).is_full, "whether that is all depends on the input"


class TestCounts:
    @given(RETAIN, st.integers(0, 10**5))
    def test_counts_are_within_one_of_the_exact_share(self, retain: float, num: int) -> None:
        exact = Fraction(retain) * num
        floor, even, ceil = (Budget(retain).count(num, r) for r in ("floor", "half_even", "ceil"))
        assert 0 <= floor <= even <= ceil <= num
        assert abs(even - exact) <= Fraction(1, 2) + Fraction(1, 10**6)
        assert ceil - floor <= 1

    @pytest.mark.parametrize(
        ("retain", "num", "expected"),
        [
            (0.5, 5, (2, 2, 3)),
            (0.5, 7, (3, 4, 4)),
            (0.15, 196, (29, 29, 30)),
            (0.001, 9, (0, 0, 1)),
        ],
    )
    def test_rounding(self, retain: float, num: int, expected: tuple[int, int, int]) -> None:
        got = tuple(Budget(retain).count(num, r) for r in ("floor", "half_even", "ceil"))
        assert got == expected

    def test_unknown_rounding(self) -> None:
        with pytest.raises(ValueError, match="got 'up'"):
            Budget(0.5).count(10, "up")  # type: ignore[arg-type]

    def test_absolute_counts_never_exceed_what_there_is(self) -> None:
        budget = Budget(tokens=64)
        assert (budget.count(196), budget.count(10), budget.count(0)) == (64, 10, 0)
        assert (budget.fraction(256), budget.fraction(10), budget.fraction(0)) == (0.25, 1.0, 1.0)
        assert (Budget().count(7), Budget().fraction(7), Budget(0.3).fraction(7)) == (7, 1.0, 0.3)

    @given(st.lists(st.integers(0, 300), max_size=6), RETAIN | st.integers(1, 900))
    def test_splitting_over_parts(self, sizes: list[int], amount: float | int) -> None:
        budget = Budget(tokens=amount) if isinstance(amount, int) else Budget(retain=amount)
        kept = budget.split(sizes)
        assert all(min(size, 1) <= k <= size for k, size in zip(kept, sizes, strict=True))
        if isinstance(amount, int):
            least = sum(min(size, 1) for size in sizes)
            assert sum(kept) == min(max(amount, least), sum(sizes))
        else:
            alone = [min(size, max(1, budget.count(size))) for size in sizes]
            assert kept == alone

    @given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 200))
    def test_a_larger_budget_never_keeps_less(self, sizes: list[int], tokens: int) -> None:
        small, large = Budget(tokens=tokens).split(sizes), Budget(tokens=tokens + 1).split(sizes)
        assert sum(small) <= sum(large)
