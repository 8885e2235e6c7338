"""Cosine similarity and distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate.ops import (
    adjacent_similarity,
    cosine_similarity_matrix,
    most_similar,
    pairwise_distance,
)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_cosine_matrix_equals_the_definition():
    a, b = random(2, 5, 8), random(2, 7, 8, seed=1)
    want = F.cosine_similarity(a[:, :, None], b[:, None], dim=-1)
    torch.testing.assert_close(cosine_similarity_matrix(a, b), want)
    torch.testing.assert_close(cosine_similarity_matrix(a), cosine_similarity_matrix(a, a))


def test_zero_vectors_have_cosine_zero_and_half_precision_is_widened():
    a = torch.zeros(2, 4, dtype=torch.bfloat16)
    a[1] = 3
    got = cosine_similarity_matrix(a)
    assert got.dtype == torch.float32
    assert torch.equal(got[0], torch.zeros(2))
    torch.testing.assert_close(got[1, 1], torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_adjacent_similarity_with_and_without_gradient(dtype, lead):
    x = random(*lead, 5, 6, 16, dtype=dtype)
    wide = x.double()
    want = F.cosine_similarity(wide[..., :-1, :, :], wide[..., 1:, :, :], dim=-1)
    got = adjacent_similarity(x)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)
    tracked = adjacent_similarity(x.clone().requires_grad_())
    assert tracked.requires_grad
    torch.testing.assert_close(tracked.detach(), got, atol=1e-6, rtol=0)


def test_one_frame_has_no_neighbour():
    assert adjacent_similarity(torch.ones(1, 4, 3)).shape == (0, 4)


def test_distances_far_from_the_origin_stay_exact():
    points = random(40, 8) * 1e-2
    for shift in (0.0, 30.0):
        got = pairwise_distance(points + shift, points + shift)
        want = torch.cdist((points + shift).double(), (points + shift).double())
        assert (got.double() - want).fill_diagonal_(0).abs().max() < 1e-4
    cosine = pairwise_distance(points, points, "cosine")
    torch.testing.assert_close(cosine, 1 - cosine_similarity_matrix(points))


def test_wrong_input():
    with pytest.raises(ValueError, match="one D"):
        cosine_similarity_matrix(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[\.\.\., T, N, D\]"):
        adjacent_similarity(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="metric"):
        pairwise_distance(torch.zeros(2, 3), torch.zeros(2, 3), "manhattan")


def test_the_most_similar_target_wins_whatever_the_lengths():
    x, target = random(2, 9, 6), random(2, 4, 6, seed=1)
    target[:, 0] *= 100  # long, not similar
    want = cosine_similarity_matrix(x, target).argmax(-1)
    assert most_similar(x, target).equal(want)
    assert most_similar(x * torch.linspace(0.1, 9, 9)[:, None], target).equal(want)
    assert most_similar(x, torch.cat([target, target], 1)).equal(want)  # ties: the first
    assert most_similar(x.bfloat16(), target.bfloat16()).dtype == torch.int64
    with pytest.raises(ValueError, match="M >= 1"):
        most_similar(x, target[:, :0])
    with pytest.raises(ValueError, match="with one D"):
        most_similar(x, target[..., :5])
