"""Facility location."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import cosine_similarity_matrix, facility_location


def problem(n: int, seed: int, weight: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return (cosine_similarity_matrix(x) + 1) / 2, weight * torch.rand(n, generator=generator)


def value(similarity: Tensor, bonus: Tensor, chosen: tuple[int, ...]) -> float:
    picked = list(chosen)
    return float(similarity[picked].amax(0).sum() + bonus[picked].sum())


@given(n=st.integers(1, 14), seed=st.integers(0, 99), weight=st.sampled_from([0.0, 0.7, 50.0]))
def test_every_choice_has_the_largest_gain_and_gains_fall(n, seed, weight):
    """All gains anew in every step; two tokens that cover the same two may gain equally."""
    similarity, bonus = problem(n, seed, weight)
    order = facility_location(similarity, n, bonus_N=bonus).tolist()
    assert sorted(order) == list(range(n))
    cover, gains = torch.zeros_like(similarity[0]), []
    for step, chosen in enumerate(order):
        gain = (similarity - cover).clamp_min(0).sum(1) + bonus
        gain[order[:step]] = -torch.inf
        assert float(gain[chosen]) >= float(gain.max()) - 1e-9
        gains.append(float(gain[chosen]))
        cover = torch.maximum(cover, similarity[chosen])
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(gains))
    assert facility_location(similarity, n // 2, bonus_N=bonus).tolist() == order[: n // 2]


@given(n=st.integers(2, 9), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_value_is_at_least_1_minus_1_over_e_of_the_optimum(n, k, seed):
    k = min(k, n)
    similarity, bonus = problem(n, seed, 0.7)
    found = value(
        similarity, bonus, tuple(facility_location(similarity, k, bonus_N=bonus).tolist())
    )
    best = max(value(similarity, bonus, c) for c in itertools.combinations(range(n), k))
    assert found >= (1 - 1 / math.e) * best


def test_large_bonus_decides_and_ties_go_to_the_lowest_index():
    similarity, bonus = problem(12, 0, 1e4)
    order = facility_location(similarity, 5, bonus_N=bonus)
    assert order.tolist() == bonus.argsort(descending=True)[:5].tolist()
    assert facility_location(torch.ones(5, 5), 5).tolist() == [0, 1, 2, 3, 4]


def test_half_precision_and_nothing_to_choose():
    similarity, _ = problem(20, 1)
    assert sorted(facility_location(similarity.bfloat16(), 20).tolist()) == list(range(20))
    assert facility_location(similarity, 0).tolist() == []


def test_bad_input():
    similarity, bonus = problem(4, 0)
    with pytest.raises(ValueError, match="k must be between"):
        facility_location(similarity, 5)
    with pytest.raises(ValueError, match="similarity"):
        facility_location(similarity[:3], 1)
    with pytest.raises(ValueError, match="bonus"):
        facility_location(similarity, 1, bonus_N=bonus[:3])
