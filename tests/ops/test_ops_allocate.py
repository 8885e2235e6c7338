"""Sharing budgets between parts and layers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops import (
    linear_decay_schedule,
    parse_r,
    proportional,
    round_half_even,
    split_evenly,
)

weight = st.one_of(st.just(0.0), st.floats(0.01, 100.0))


@given(total=st.integers(0, 500), parts=st.integers(1, 40))
def test_split_evenly(total, parts):
    counts = split_evenly(total, parts)
    assert sum(counts) == total and len(counts) == parts
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


@given(total=st.integers(0, 300), weights=st.lists(weight, min_size=1, max_size=12), data=st.data())
def test_proportional_meets_total_and_bounds(total, weights, data):
    parts = len(weights)
    low = data.draw(st.integers(0, total // parts))
    high = data.draw(st.integers(-(-total // parts), total + 5))
    counts = proportional(total, weights, minimum=low, maximum=high)
    assert sum(counts) == total
    assert all(low <= c <= high for c in counts)
    # A heavier part never gets fewer.
    for i in range(parts):
        for j in range(parts):
            if weights[i] > weights[j]:
                assert counts[i] >= counts[j]


@given(total=st.integers(0, 300), weights=st.lists(weight, min_size=1, max_size=12))
def test_proportional_stays_within_one_of_the_exact_share(total, weights):
    mass = sum(Fraction(w) for w in weights)
    counts = proportional(total, weights)
    for count, w in zip(counts, weights, strict=True):
        share = total * Fraction(w) / mass if mass else Fraction(total, len(weights))
        assert abs(count - share) < 1


def test_proportional_examples():
    assert proportional(10, [1, 1, 1]) == [4, 3, 3]
    assert proportional(5, [0, 0, 0]) == [2, 2, 1]
    assert proportional(6, [0, 1, 0], minimum=1) == [1, 4, 1]
    assert proportional(6, [0, 1, 0], maximum=3) == [2, 3, 1]
    assert proportional(9, [1, 1, 1], minimum=[0, 5, 0], maximum=[9, 9, 1]) == [3, 5, 1]
    assert proportional(4, torch.tensor([3.0, 1.0])) == [3, 1]
    # One part is below its minimum by as much as the other is above its maximum.
    assert proportional(8, [0, 4, 4], minimum=[2, 0, 0], maximum=[8, 2, 8]) == [2, 2, 4]


@pytest.mark.parametrize(
    "args",
    [
        ((5, []), {}),
        ((5, [1, -1]), {}),
        ((5, [1, float("nan")]), {}),
        ((5, [1, 1]), {"minimum": 3}),
        ((5, [1, 1]), {"maximum": 2}),
        ((5, [1, 1]), {"minimum": [1]}),
        ((5, [1, 1]), {"minimum": -1}),
        ((-1, [1, 1]), {}),
    ],
)
def test_proportional_refuses(args):
    with pytest.raises(ValueError):
        proportional(*args[0], **args[1])


def test_linear_decay_is_the_published_schedule():
    kept = linear_decay_schedule(28, 14, 0.125)
    assert kept[:14] == [1.0] * 14
    assert kept[14:22] == [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert kept[22:] == [0.0] * 6
    assert linear_decay_schedule(3, 0, 0.0) == [1.0, 1.0, 1.0]
    assert linear_decay_schedule(0, 2, 0.5) == []
    with pytest.raises(ValueError, match="step"):
        linear_decay_schedule(3, 0, -0.1)


def test_parse_r_forms():
    assert parse_r(12, 8) == [8] * 12
    assert parse_r(12, (8, -1.0)) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert parse_r(24, (5, 0.5)) == [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4 + [6] * 4 + [7] * 3 + [8]
    assert parse_r(12, [3, 3, 3]) == [3] * 3 + [0] * 9
    assert parse_r(1, (8, 1.0)) == [0]
    with pytest.raises(ValueError, match="lists 3"):
        parse_r(2, [1, 1, 1])
    with pytest.raises(ValueError, match="negative"):
        parse_r(2, -1)


def test_round_half_even():
    assert [round_half_even(x) for x in (0.5, 1.5, 2.5, 0.098 * 576, -0.5)] == [0, 2, 2, 56, 0]
    assert round_half_even(Fraction(7, 2)) == 4
    assert round_half_even(torch.tensor(2.5)) == 2
    with pytest.raises(ValueError, match="round"):
        round_half_even(float("inf"))


def test_split_evenly_refuses():
    for total, parts in ((-1, 2), (3, 0)):
        with pytest.raises(ValueError, match="parts"):
            split_evenly(total, parts)
