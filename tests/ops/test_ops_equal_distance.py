"""Equal-distance attention against its definition, and what it promises about positions."""

from __future__ import annotations

import pytest
import torch

from foveate import ops
from foveate.models.rotary import rotate


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(x_BHND, position_N):
    dim = x_BHND.shape[-1]
    angle_ND = (position_N[:, None] * 100.0 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
    return rotate(x_BHND, angle_ND.cos(), angle_ND.sin())


def reference(q_rotated, q_raw, k, v, unrotated_BM, allowed_BNM):
    k, v = (x.repeat_interleave(q_raw.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = torch.where(
        unrotated_BM[:, None, None],
        q_raw @ k.transpose(2, 3),
        q_rotated @ k.transpose(2, 3),
    )
    logits = logits * q_raw.shape[-1] ** -0.5
    return logits.masked_fill(~allowed_BNM[:, None], -torch.inf).softmax(-1) @ v


KINDS = torch.tensor(
    [
        [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
).bool()


@pytest.mark.parametrize("new", [11, 4, 1])
@pytest.mark.parametrize("tile", [2**24, 100])
@pytest.mark.parametrize("form", ["none", "bool", "additive"])
def test_equals_the_definition(new, tile, form):
    """Ragged kinds in a batch, shared key heads, prefill, several new rows, one new row."""
    q_rotated, q_raw = draw(3, 4, new, 8, seed=1), draw(3, 4, new, 8, seed=2)
    k, v = draw(3, 2, 11, 8, seed=3), draw(3, 2, 11, 6, seed=4)
    allowed = torch.ones(3, new, 11).bool().tril(11 - new)
    if form != "none":
        allowed[1, :, 2] = False
    mask = None if form == "none" else allowed[:, None]
    if form == "additive":
        mask = torch.zeros(3, 1, new, 11).masked_fill(~allowed[:, None], torch.finfo(k.dtype).min)
    out, weights = ops.equal_distance_attention(
        q_rotated, q_raw, k, v, KINDS, attn_mask=mask, tile=tile
    )
    expected = reference(q_rotated, q_raw, k, v, KINDS, allowed)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert (weights is None) == (tile == 100)  # of all rows and heads, or none
    if weights is not None:
        assert weights.shape == (3, 4, new, 11) and (weights[:, :, ~allowed[0]] == 0).all()


def test_padding_rows_are_finite():
    allowed = torch.ones(1, 1, 3, 3).bool().tril()
    allowed[..., 0, :] = False
    q, k = draw(1, 2, 3, 4), draw(1, 2, 3, 4, seed=1)
    out, _ = ops.equal_distance_attention(q, q, k, k, KINDS[:1, :3], attn_mask=allowed)
    assert torch.isfinite(out).all()


def test_plain_rotary_without_such_keys():
    q, k = rotated(draw(1, 2, 9, 8), torch.arange(9)), draw(1, 2, 9, 8, seed=1)
    out, _ = ops.equal_distance_attention(q, draw(1, 2, 9, 8), k, k, torch.zeros(1, 9).bool())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def text_outputs(shift=0, order=None):
    """Outputs of four rows of text behind five visual tokens, positions moved by `shift`."""
    q, k, v = (draw(1, 2, 9, 8, seed=seed) for seed in range(3))
    if order is not None:
        k[:, :, :5], v[:, :, :5] = k[:, :, order], v[:, :, order]
    near = torch.arange(9)[None] < 5
    position_N = torch.arange(9) + shift * (torch.arange(9) >= 5)
    keys = torch.where(near[:, None, :, None], k, rotated(k, position_N))
    return ops.equal_distance_attention(rotated(q, position_N), q, keys, v, near)[0][:, :, 5:]


def test_text_does_not_know_how_far_the_video_is():
    torch.testing.assert_close(text_outputs(shift=500), text_outputs(), atol=1e-5, rtol=0)
    reordered = text_outputs(order=torch.tensor([3, 1, 4, 0, 2]))
    torch.testing.assert_close(reordered, text_outputs(), atol=1e-5, rtol=0)


def test_gradients_and_bf16():
    q = draw(1, 2, 6, 8).requires_grad_()
    k = draw(1, 1, 6, 8, seed=1).requires_grad_()
    ops.equal_distance_attention(q, q * 2, k, k, KINDS[:1, :6])[0].sum().backward()
    assert q.grad is not None and k.grad is not None and (k.grad != 0).any()
    half = [x.detach().bfloat16() for x in (q, k)]
    out, _ = ops.equal_distance_attention(half[0], half[0] * 2, half[1], half[1], KINDS[:1, :6])
    full, _ = ops.equal_distance_attention(q, q * 2, k, k, KINDS[:1, :6])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), full, atol=0.1, rtol=0)


def test_bad_shapes():
    q, k = draw(1, 3, 6, 8), draw(1, 2, 6, 8)
    with pytest.raises(ValueError, match="must divide"):
        ops.equal_distance_attention(q, q, k, k, KINDS[:1, :6])
    with pytest.raises(ValueError, match="unrotated must have shape"):
        ops.equal_distance_attention(q, q, k[:, :1], k[:, :1], KINDS[:1, :5])
