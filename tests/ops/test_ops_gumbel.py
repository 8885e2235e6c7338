"""Gumbel top-k: exactly hard forward, soft backward, and draws in proportion to the scores."""

from __future__ import annotations

import pytest
import torch

from foveate import ops


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_forward_is_the_hard_choice(dtype, k) -> None:
    scores = torch.randn(3, 9, generator=generator()).to(dtype)
    chosen = ops.gumbel_top_k(scores, k, noise=torch.zeros(()))
    assert chosen.dtype == dtype
    expected = torch.zeros_like(scores).scatter_(-1, ops.top_k(scores, k), 1.0)
    assert chosen.equal(expected), "without noise: the choice of inference, bit for bit"
    drawn = ops.gumbel_top_k(scores, k, generator=generator(1))
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert (drawn.sum(-1) == k).all()


def test_backward_reaches_what_was_not_chosen() -> None:
    scores = torch.randn(9, generator=generator(), requires_grad=True)
    noise = ops.gumbel_noise(scores, generator(2))
    weight = torch.randn(9, generator=generator(3))
    (ops.gumbel_top_k(scores, 2, temperature=0.5, noise=noise) * weight).sum().backward()
    assert scores.grad is not None and scores.grad.ne(0).all()
    soft = scores.detach().clone().requires_grad_()
    (((soft + noise) / 0.5).softmax(-1) * weight).sum().backward()
    assert soft.grad is not None
    torch.testing.assert_close(scores.grad, soft.grad)


def test_draws_follow_the_softmax() -> None:
    # The largest of logits with Gumbel noise is a draw from their softmax (Gumbel-max).
    scores = torch.tensor([0.0, 1.0, 2.0])
    drawn = ops.gumbel_top_k(scores.expand(20_000, 3), 1, generator=generator())
    torch.testing.assert_close(drawn.mean(0), scores.softmax(-1), atol=0.015, rtol=0)
    again = ops.gumbel_top_k(scores.expand(20_000, 3), 1, generator=generator())
    assert drawn.equal(again)


def test_bad_input() -> None:
    scores = torch.zeros(4)
    with pytest.raises(ValueError, match="temperature"):
        ops.gumbel_top_k(scores, 1, temperature=0.0)
    with pytest.raises(ValueError, match="floating point"):
        ops.gumbel_top_k(scores.long(), 1)
    with pytest.raises(ValueError, match="k must be"):
        ops.gumbel_top_k(scores, 5)
    with pytest.raises(ValueError, match="either noise or generator"):
        ops.gumbel_top_k(scores, 1, noise=scores, generator=generator())
    with pytest.raises(ValueError, match="scores \\+ noise"):
        ops.gumbel_top_k(scores, 1, noise=torch.zeros(2, 4))
