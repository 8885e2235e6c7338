"""DPC-kNN, k-means and k-medoids."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import dpc_knn, k_medoids, kmeans, scatter_mean


def random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(seed=0) -> tuple[Tensor, Tensor]:
    """Three well separated groups of 10, 8 and 6 points in a random order, and their labels."""
    centre = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    label = torch.tensor([0] * 10 + [1] * 8 + [2] * 6)
    label = label[torch.randperm(24, generator=torch.Generator().manual_seed(seed))]
    return centre[label] + 0.3 * random(24, 2, seed=seed), label


def same_partition(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[:, None] == a, b[:, None] == b)


def dpc_by_hand(x: Tensor, m: int, k: int) -> tuple[list[int], list[int]]:
    """The card's formulas with loops, in float64; ties in density go to the lower index."""
    x = x.double()
    n, channels = x.shape
    d = (x[:, None] - x).norm(dim=-1) / channels**0.5
    rho = (-d.square().topk(min(k, m), largest=False).values.mean(-1)).exp()
    score = torch.empty(n, dtype=torch.float64)
    for i in range(n):
        denser = [
            float(d[i, j]) for j in range(n) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)
        ]
        score[i] = rho[i] * (min(denser) if denser else float(d.max()))
    centres = score.sort(descending=True, stable=True).indices[:m].sort().values.tolist()
    assignment = [
        centres.index(i) if i in centres else int(d[i, centres].argmin()) for i in range(n)
    ]
    return centres, assignment


@given(n=st.integers(1, 14), m=st.integers(1, 14), k=st.integers(3, 8), seed=st.integers(0, 99))
def test_dpc_equals_the_loop(n, m, k, seed):
    m = min(m, n)
    x = random(n, 4, seed=seed)
    centres, assignment = dpc_knn(x, m, k=k)
    assert (centres.tolist(), assignment.tolist()) == dpc_by_hand(x, m, k)


@pytest.mark.parametrize("seed", range(5))
def test_all_three_find_planted_groups(seed):
    x, label = blobs(seed)
    assert same_partition(dpc_knn(x, 3)[1], label)
    assert same_partition(k_medoids(x, 3)[1], label)
    assert same_partition(kmeans(x, 3, seed=seed)[1], label)


def test_dpc_mask_equals_the_shortened_sample():
    x = random(2, 12, 4)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) > 0.3
    centres, assignment = dpc_knn(x, 3, mask=mask)
    for b in range(2):
        places = mask[b].nonzero()[:, 0]
        short_centres, short_assignment = dpc_knn(x[b, places], 3)
        assert centres[b].tolist() == places[short_centres].tolist()
        assert assignment[b, places].tolist() == short_assignment.tolist()
    assert bool((assignment[~mask] == -1).all())


def test_dpc_duplicates_do_not_become_two_centres():
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]])
    centres, assignment = dpc_knn(x, 2)
    assert centres.tolist() == [0, 3] and assignment.tolist() == [0, 0, 0, 1, 1, 1]
    assert dpc_knn(torch.ones(5, 3), 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert dpc_knn(torch.ones(5, 3), 5)[1].tolist() == [0, 1, 2, 3, 4]


def test_dpc_none_and_noise():
    x = random(6, 4)
    centres, assignment = dpc_knn(x, 0)
    assert centres.shape == (0,) and assignment.tolist() == [-1] * 6
    noisy = [dpc_knn(x, 3, generator=torch.Generator().manual_seed(1))[0] for _ in range(2)]
    assert torch.equal(*noisy)
    # Two heaps of equal points: without noise the first of each, with noise any of each.
    heaps = torch.tensor([0.0, 1.0]).repeat_interleave(50)[:, None]
    assert dpc_knn(heaps, 2)[0].tolist() == [0, 50]
    drawn = dpc_knn(heaps, 2, generator=torch.Generator().manual_seed(1))[0].tolist()
    assert drawn != [0, 50] and drawn[0] < 50 <= drawn[1]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_batch_equals_single(metric):
    x = random(3, 20, 5)
    init = torch.tensor([3, 11, 17, 5])
    centroids, labels = kmeans(x, 4, init=init, metric=metric)
    medoids, members = k_medoids(x, 4, metric=metric)
    centres, nearest = dpc_knn(x, 4)
    for b in range(3):
        one = kmeans(x[b], 4, init=init, metric=metric)
        torch.testing.assert_close(centroids[b], one[0])
        assert torch.equal(labels[b], one[1])
        one = k_medoids(x[b], 4, metric=metric)
        assert torch.equal(medoids[b], one[0]) and torch.equal(members[b], one[1])
        one = dpc_knn(x[b], 4)
        assert torch.equal(centres[b], one[0]) and torch.equal(nearest[b], one[1])


@given(n=st.integers(2, 20), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_kmeans_reaches_a_fixed_point(n, k, seed):
    k = min(k, n)
    x = random(n, 3, seed=seed)
    centroids, labels = kmeans(x, k, seed=seed, iterations=100, tolerance=1e-6)
    distance = torch.cdist(x, centroids)
    assert torch.equal(labels, distance.argmin(-1))
    used = torch.bincount(labels, minlength=k) > 0
    mean = scatter_mean(x[None], labels[None], k)[0]
    torch.testing.assert_close(mean[used], centroids[used], atol=1e-4, rtol=1e-4)
    again = kmeans(x, k, seed=seed, iterations=100, tolerance=1e-6)
    assert torch.equal(centroids, again[0]) and torch.equal(labels, again[1])


def test_kmeans_objective_falls_and_empty_clusters_stay():
    x = random(40, 3)

    def error(iterations):
        centroids, labels = kmeans(x, 5, init=torch.arange(5), iterations=iterations)
        return float((x - centroids[labels]).square().sum())

    errors = [error(i) for i in range(8)]
    assert all(a >= b - 1e-4 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    twins = torch.full((2, 1), 2.0)
    centroids, labels = kmeans(twins, 2, init=torch.tensor([0, 1]))
    assert labels.tolist() == [0, 0] and centroids.tolist() == [[2.0], [2.0]]


def test_plus_plus_never_draws_a_row_twice():
    rows = kmeans(torch.ones(6, 2), 6, iterations=0)[0]
    assert rows.shape == (6, 2)
    x, label = blobs()
    starts = [kmeans(x, 3, iterations=0, seed=s)[1] for s in range(10)]
    assert sum(same_partition(s, label) for s in starts) >= 8


def test_plus_plus_draws_distinct_rows_among_duplicates():
    from foveate.ops.cluster import _plus_plus

    rows = _plus_plus(torch.ones(2, 7, 3), 7, seed=0)
    assert rows.sort(-1).values.tolist() == [list(range(7))] * 2


@given(n=st.integers(2, 16), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_medoids_are_distinct_rows_in_their_own_cluster_at_a_local_optimum(n, k, seed):
    k = min(k, n)
    x = random(n, 3, seed=seed)
    medoids, labels = k_medoids(x, k)
    assert medoids.tolist() == sorted(set(medoids.tolist()))
    assert labels[medoids].tolist() == list(range(k))
    distance = torch.cdist(x, x)
    for c in range(k):
        member = (labels == c).nonzero()[:, 0]
        cost = distance[member][:, member].sum(-1)
        own = float(cost[member.tolist().index(int(medoids[c]))])
        assert own <= float(cost.min()) + 1e-4


def test_two_member_ties_go_to_the_lower_index():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    assert k_medoids(x, 2, init=torch.tensor([1, 3]))[0].tolist() == [0, 2]
    assert k_medoids(x, 4)[0].tolist() == [0, 1, 2, 3]


def test_cluster_errors():
    x = random(5, 3)
    with pytest.raises(ValueError, match="num_clusters"):
        dpc_knn(x, 6)
    with pytest.raises(ValueError, match="num_clusters"):
        dpc_knn(x, 3, mask=torch.tensor([True, True, False, False, False]))
    with pytest.raises(ValueError, match="neighbour"):
        dpc_knn(x, 2, k=0)
    with pytest.raises(ValueError, match="mask"):
        dpc_knn(x, 2, mask=torch.ones(4, dtype=torch.bool))
    for cluster in (kmeans, k_medoids):
        with pytest.raises(ValueError, match="between 1 and 5"):
            cluster(x, 0)
        with pytest.raises(ValueError, match="init must be"):
            cluster(x, 2, init=torch.tensor([0]))
        with pytest.raises(ValueError, match=r"0 \.\. 4"):
            cluster(x, 2, init=torch.tensor([0, 5]))
