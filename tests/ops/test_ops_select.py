"""Top-k, even and random positions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops import random_indices, top_k, top_k_ragged, top_k_ranked, uniform_indices

# Few distinct values, so that ties are the rule; -inf is a legal score.
values = st.sampled_from([-float("inf"), -1.0, 0.0, 0.5, 2.0])
rows = st.lists(values, min_size=1, max_size=12)


def best_first(scores: list[float], allowed: list[bool]) -> list[int]:
    order = [i for i in range(len(scores)) if allowed[i]]
    return sorted(order, key=lambda i: -scores[i])


@given(scores=rows, data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_top_k_is_the_stable_sort_of_what_is_allowed(scores, data, dtype):
    allowed = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    k = data.draw(st.integers(0, sum(allowed)))
    want = best_first(scores, allowed)[:k]
    tensor, mask = torch.tensor(scores, dtype=dtype), torch.tensor(allowed)
    assert top_k_ranked(tensor, k, mask=mask).tolist() == want
    assert top_k(tensor, k, mask=mask).tolist() == sorted(want)
    ragged = top_k_ragged(tensor[None].expand(2, -1), [k, 0], mask=mask[None].expand(2, -1))
    assert ragged.tolist() == [sorted(want), [-1] * k]


@given(scores=rows)
def test_a_larger_budget_keeps_what_a_smaller_one_kept(scores):
    tensor = torch.tensor(scores)
    kept = [set(top_k(tensor, k).tolist()) for k in range(len(scores) + 1)]
    assert all(small < large for small, large in itertools.pairwise(kept))
    assert [len(s) for s in kept] == list(range(len(scores) + 1))


@given(seed=st.integers(0, 999), k=st.integers(0, 10))
def test_permutation_equivariant_without_ties(seed, k):
    generator = torch.Generator().manual_seed(seed)
    scores, order = torch.rand(10, generator=generator), torch.randperm(10, generator=generator)
    moved = order[top_k(scores[order], k)]
    assert moved.sort().values.tolist() == top_k(scores, k).tolist()


def test_leading_axes_and_integers():
    scores = torch.tensor([[[1, 5, 5, 0]], [[9, 2, 3, 9]]])
    assert top_k(scores, 2).tolist() == [[[1, 2]], [[0, 3]]]
    assert top_k(scores, 2).dtype == torch.int64


def test_ragged_counts_as_tensor_and_all_zero():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    assert top_k_ragged(scores, torch.tensor([1, 3])).tolist() == [[0, -1, -1], [0, 1, 2]]
    assert top_k_ragged(scores, [0, 0]).shape == (2, 0)


def test_too_large_k_and_nan_are_refused():
    scores = torch.zeros(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for k in (-1, 4):
        with pytest.raises(ValueError, match="between 0 and 3"):
            top_k(scores, k)
    with pytest.raises(ValueError, match="between 0 and 1"):
        top_k(scores, 2, mask=mask)
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        top_k_ragged(scores, [1, 2], mask=mask)
    with pytest.raises(ValueError, match="k must have shape"):
        top_k_ragged(scores, [1])
    with pytest.raises(ValueError, match="mask"):
        top_k(scores, 1, mask=mask[:1])
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([0.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="scalar"):
        top_k(torch.tensor(1.0), 0)


def test_nan_behind_a_mask_is_nobodys_business():
    scores = torch.tensor([float("nan"), 1.0, 2.0])
    assert top_k(scores, 2, mask=torch.tensor([False, True, True])).tolist() == [1, 2]


@given(n=st.integers(1, 300), data=st.data(), endpoints=st.booleans())
def test_uniform_is_distinct_ascending_and_even(n, data, endpoints):
    k = data.draw(st.integers(1, n))
    index = uniform_indices(n, k, endpoints=endpoints)
    gaps = index.diff()
    assert index.shape == (k,) and int(index[0]) >= 0 and int(index[-1]) < n
    assert k == 1 or (int(gaps.min()) >= 1 and int(gaps.max() - gaps.min()) <= 1)
    if endpoints and k > 1:
        assert int(index[0]) == 0 and int(index[-1]) == n - 1
        # linspace may fall just short of a whole number, never by a whole position.
        line = np.linspace(0, n - 1, k)
        assert np.abs(index.numpy() - np.floor(line + 1e-9)).max() == 0


def test_uniform_edges():
    assert uniform_indices(5, 0).tolist() == []
    assert uniform_indices(0, 0).tolist() == []
    assert uniform_indices(7, 7).tolist() == list(range(7))
    assert uniform_indices(8, 1, endpoints=False).tolist() == [4]
    with pytest.raises(ValueError, match="between 0 and 5"):
        uniform_indices(5, 6)


@given(n=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
def test_random_is_distinct_ascending_and_repeatable(n, data, seed):
    k = data.draw(st.integers(0, n))
    index = random_indices(3, n, k, seed=seed)
    assert index.shape == (3, k)
    assert bool((index.diff(dim=-1) > 0).all())
    assert k == 0 or (int(index.min()) >= 0 and int(index.max()) < n)
    again = random_indices(3, n, k, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(index, again)


def test_random_covers_everything_and_rejects_two_sources():
    drawn = random_indices(400, 8, 2, seed=0)
    counts = torch.bincount(drawn.flatten(), minlength=8)
    assert int(counts.min()) > 60 and int(counts.max()) < 140
    with pytest.raises(ValueError, match="either"):
        random_indices(1, 4, 2, seed=0, generator=torch.Generator())
