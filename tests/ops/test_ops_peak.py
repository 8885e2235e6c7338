"""The most attention of any query, against the whole matrix."""

from __future__ import annotations

import pytest
import torch

from foveate import ops
from foveate.ops import peak


def tensors(H: int = 4, G: int = 2, N: int = 5, M: int = 9, B: int = 2):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, N, 6, generator=generator)
    return q, torch.randn(B, G, M, 6, generator=generator)


def whole(q, k, scale=None):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * q @ k.mT, dim=-1)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("entries", [1, 30, 2**26])
def test_equals_the_maximum_of_the_matrix(heads, entries, monkeypatch) -> None:
    monkeypatch.setattr(peak, "_ENTRIES", entries)
    q, k = tensors(*heads)
    for scale in (None, 0.3):
        expected = whole(q, k, scale).amax((1, 2))
        torch.testing.assert_close(ops.peak_attention(q, k, scale=scale), expected)


def test_masked_keys_and_queries_are_as_if_absent() -> None:
    q, k = tensors()
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    query_mask = torch.ones(2, 5, dtype=torch.bool)
    key_mask[1, 6:] = False
    query_mask[1, 3:] = False
    got = ops.peak_attention(q, k, key_mask=key_mask, query_mask=query_mask)
    torch.testing.assert_close(got[0], ops.peak_attention(q[:1], k[:1])[0])
    alone = ops.peak_attention(q[1:, :, :3], k[1:, :, :6])
    torch.testing.assert_close(got[1], torch.nn.functional.pad(alone[0], (0, 3)))


def test_gradient_and_half_precision() -> None:
    q, k = tensors()
    q.requires_grad_(True)
    ops.peak_attention(q, k).sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0
    half = ops.peak_attention(q.detach().bfloat16(), k.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ops.peak_attention(q, k).detach(), atol=2e-2, rtol=0)


def test_no_query_looks_at_nothing() -> None:
    q, k = tensors(N=0)
    assert ops.peak_attention(q, k).equal(torch.zeros(2, 9))


def test_bad_input() -> None:
    q, k = tensors(H=3, G=2)
    with pytest.raises(ValueError, match="2 key heads must divide the 3 query heads"):
        ops.peak_attention(q, k)
    q, k = tensors()
    with pytest.raises(ValueError, match="query_mask must have shape"):
        ops.peak_attention(q, k, query_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="q must be"):
        ops.peak_attention(q[0], k)
