"""Max-min and max-sum diversity, and k-centre."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import (
    cosine_similarity_matrix,
    diversity,
    k_centre,
    max_min_diversity,
    max_sum_diversity,
)


def random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transcription(x: Tensor, k: int) -> list[int]:
    """The card's steps with the whole distance matrix, in float64."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    order: list[int] = []
    for step in range(k):
        if step == 0:
            score = distance.topk(2, dim=0, largest=False).values[1]
        else:
            score = distance[order].amin(0)
        order.append(int(score.argmax()))
    return order


@pytest.fixture
def without_matrix(monkeypatch):
    """Force the path of long sequences: tiles for the start, rows on demand."""
    monkeypatch.setattr(diversity, "_MATRIX_TOKENS", 0)
    monkeypatch.setattr(diversity, "_TILE", 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_transcription(dtype):
    for seed, (n, k) in enumerate([(12, 12), (60, 20), (130, 13)]):
        x = random(n, 16, seed=seed)
        assert max_min_diversity(x.to(dtype), k).tolist() == transcription(x, k)


def test_long_path_equals_the_transcription(without_matrix):
    for n, k in [(12, 12), (43, 20)]:
        x = random(n, 16)
        assert max_min_diversity(x, k).tolist() == transcription(x, k)


def test_tiled_gram_is_the_product(monkeypatch):
    monkeypatch.setattr(diversity, "_TILE", 7)
    x = random(2, 31, 5)
    torch.testing.assert_close(diversity._gram(x), x @ x.transpose(1, 2))


def test_batch_equals_single_on_every_path(monkeypatch):
    x = random(3, 20, 8)
    single = [max_min_diversity(sample, 6).tolist() for sample in x]
    assert max_min_diversity(x, 6).tolist() == single
    monkeypatch.setattr(diversity, "_MATRIX_ENTRIES", 20 * 20)
    assert max_min_diversity(x, 6).tolist() == single
    monkeypatch.setattr(diversity, "_MATRIX_TOKENS", 0)
    assert max_min_diversity(x, 6).tolist() == single


@given(n=st.integers(3, 12), k=st.integers(2, 4), dims=st.integers(1, 3), seed=st.integers(0, 99))
def test_farthest_point_is_at_least_half_of_the_optimum(n, k, dims, seed):
    k = min(k, n)
    x = random(n, dims, seed=seed)
    distance = torch.cdist(x.double(), x.double())

    def smallest(chosen):
        return min(float(distance[i, j]) for i, j in itertools.combinations(chosen, 2))

    best = max(smallest(chosen) for chosen in itertools.combinations(range(n), k))
    assert smallest(k_centre(x, k).tolist()) >= 0.5 * best - 1e-6


@given(n=st.integers(3, 12), k=st.integers(2, 4), seed=st.integers(0, 99))
def test_diversity_is_half_of_the_optimum_in_the_metric_behind_cosine(n, k, seed):
    # 1 - cosine is half the squared chord, and the chord is a true metric.
    k = min(k, n)
    x = random(n, 3, seed=seed).double()
    chord = (1 - cosine_similarity_matrix(x)).clamp_min(0).mul(2).sqrt()

    def smallest(chosen):
        return min(float(chord[i, j]) for i, j in itertools.combinations(chosen, 2))

    best = max(smallest(chosen) for chosen in itertools.combinations(range(n), k))
    assert smallest(max_min_diversity(x, k).tolist()) >= 0.5 * best - 1e-9


@given(seed=st.integers(0, 99), k=st.integers(1, 15))
def test_prefix_scale_and_permutation(seed, k):
    x = random(15, 6, seed=seed).double()
    order = max_min_diversity(x, k)
    assert order.tolist() == max_min_diversity(x, 15)[:k].tolist()
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(15, 1, generator=generator).double() + 0.1
    assert max_min_diversity(x * scale, k).tolist() == order.tolist()
    # The first two picks may tie (mutual nearest neighbours), so compare what follows from one
    # start: permuting the tokens permutes the choice.
    shuffle = torch.randperm(15, generator=generator)
    start = int((shuffle == order[0]).nonzero())
    moved = shuffle[k_centre(x[shuffle], k, first=start, metric="cosine")]
    assert moved.tolist() == k_centre(x, k, first=int(order[0]), metric="cosine").tolist()


@pytest.mark.parametrize("long", [False, True])
def test_needle_duplicates_and_zero_vectors(long, request):
    if long:
        request.getfixturevalue("without_matrix")
    background = torch.ones(200, 8) + 1e-3 * random(200, 8)
    background[137] = -1.0
    assert 137 in max_min_diversity(background, 2).tolist()
    duplicates = torch.ones(6, 4)
    assert sorted(max_min_diversity(duplicates, 6).tolist()) == list(range(6))
    assert sorted(max_min_diversity(torch.zeros(5, 4), 5).tolist()) == list(range(5))


@pytest.mark.parametrize("long", [False, True])
def test_masked_tokens_are_neither_chosen_nor_neighbours(long, request):
    if long:
        request.getfixturevalue("without_matrix")
    x = random(2, 30, 8)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(5)) > 0.4
    k = int(mask.sum(-1).min())
    order = max_min_diversity(x, k, mask=mask)
    for b in range(2):
        places = mask[b].nonzero()[:, 0]
        assert order[b].tolist() == places[max_min_diversity(x[b, places], k)].tolist()
    assert bool(mask.gather(1, k_centre(x, k, first="norm", mask=mask)).all())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_k_centre_is_greedy_in_its_metric(metric):
    x = random(25, 4)
    distance = torch.cdist(x, x) if metric == "euclidean" else 1 - cosine_similarity_matrix(x)
    order = k_centre(x, 10, first=3, metric=metric).tolist()
    assert order[0] == 3
    for step in range(1, 10):
        assert order[step] == int(distance[order[:step]].amin(0).argmax())


def test_k_centre_starts():
    x = random(2, 9, 4)
    norms = x.norm(dim=-1)
    assert k_centre(x, 1, first="norm")[:, 0].tolist() == norms.argmax(-1).tolist()
    assert k_centre(x, 2, first=torch.tensor([4, 7]))[:, 0].tolist() == [4, 7]
    for bad in (9, -1, torch.tensor([0, 9])):
        with pytest.raises(ValueError, match=r"0 \.\. 8"):
            k_centre(x, 2, first=bad)
    with pytest.raises(ValueError, match="first must be"):
        k_centre(x, 2, first="middle")
    with pytest.raises(ValueError, match="metric"):
        k_centre(x, 2, metric="dot")


def test_edges():
    x = random(5, 4)
    assert max_min_diversity(x, 0).shape == (0,)
    assert max_min_diversity(x[:1], 1).tolist() == [0]
    assert max_min_diversity(x.bfloat16(), 3).dtype == torch.int64
    assert k_centre(x[None], 0).shape == (1, 0)
    with pytest.raises(ValueError, match="between 0 and 5"):
        max_min_diversity(x, 6)
    with pytest.raises(ValueError, match="valid tokens"):
        max_min_diversity(x, 3, mask=torch.tensor([True, True, False, False, False]))
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        max_min_diversity(x[0], 1)


def naive_max_sum(x: Tensor, k: int, first: int) -> list[int]:
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    total, order = unit @ unit[first], [first]
    total[first] = torch.inf
    while len(order) < k:
        order.append(int(total.argmin()))
        total = total + unit @ unit[order[-1]]
        total[order[-1]] = torch.inf
    return order


@given(n=st.integers(1, 20), first=st.integers(0, 19), seed=st.integers(0, 99))
def test_max_sum_is_the_naive_loop(n, first, seed):
    x, first = random(n, 6, seed=seed).double(), first % n
    order = max_sum_diversity(x, n, first=first).tolist()
    assert order == naive_max_sum(x, n, first) and sorted(order) == list(range(n))
    assert max_sum_diversity(x, n // 2, first=first).tolist() == order[: n // 2]


def test_max_sum_in_batches_with_masks_and_ties():
    x = random(3, 20, 8)
    start = torch.tensor([3, 0, 19])
    order = max_sum_diversity(x, 6, first=start)
    assert [row.tolist() for row in order] == [
        max_sum_diversity(x[b], 6, first=int(start[b])).tolist() for b in range(3)
    ]
    mask = torch.ones(20, dtype=torch.bool)
    mask[5:12] = False
    kept = mask.nonzero()[:, 0]
    found = max_sum_diversity(x[0], 13, first=3, mask=mask)
    assert found.tolist() == kept[max_sum_diversity(x[0, kept], 13, first=3)].tolist()
    assert max_sum_diversity(torch.ones(5, 4), 5, first=2).tolist() == [2, 0, 1, 3, 4]
    with pytest.raises(ValueError, match="first"):
        max_sum_diversity(x, 2, first=20)
