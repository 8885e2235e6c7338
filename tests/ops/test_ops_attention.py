"""Attention column sums, rows and received attention against a naive softmax."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import _columns as columns
from foveate.ops import (
    attend_and_score,
    attention_column_sums,
    attention_matrix,
    attention_received_and_kept,
    attention_rows,
    masked_softmax,
    received_attention,
)


def naive(q, k, *, scale=None, causal=False, key_mask=None, attn_mask=None) -> Tensor:
    """Softmax attention [B, H, N, M] written out in float64; rows without a key are zero."""
    B, H, N, D = q.shape
    M = k.shape[2]
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    logits = q.double() @ k.double().transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    allowed = torch.ones(B, H, N, M, dtype=torch.bool)
    if causal:
        allowed &= torch.ones(N, M, dtype=torch.bool).tril(M - N)
    if key_mask is not None:
        allowed &= key_mask[:, None, None]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed &= attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask.double()
        allowed &= attn_mask > torch.finfo(attn_mask.dtype).min
    logits = logits.masked_fill(~allowed, -torch.inf)
    return torch.softmax(logits, -1).nan_to_num(0.0)


def qk(B=2, H=4, G=2, N=7, M=7, D=8, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, N, D, generator=generator)
    k = torch.randn(B, G, M, D, generator=generator)
    return q.to(dtype), k.to(dtype)


BACKENDS = ["chunked", "backward"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("N", "M", "causal", "keys", "pair"),
    [
        (N, M, causal, keys, pair)
        for (N, M), causal, keys, pair in itertools.product(
            [(7, 7), (3, 9), (9, 3)], [False, True], [False, True], [None, "bool", "additive"]
        )
    ],
)
def test_column_sums_equal_the_naive_softmax(backend, N, M, causal, keys, pair):
    q, k = qk(N=N, M=M)
    generator = torch.Generator().manual_seed(1)
    key_mask = None
    if keys:
        key_mask = torch.rand(2, M, generator=generator) > 0.3
        key_mask[1] = False
    attn_mask = None
    if pair:
        attn_mask = torch.rand(2, 1, N, M, generator=generator) > 0.3
        attn_mask[0, 0, 0] = False
    if pair == "additive":
        attn_mask = torch.where(attn_mask, 0.25, torch.finfo(torch.float32).min)
    weights = torch.rand(2, 4, N, generator=generator)
    masks = {"causal": causal, "key_mask": key_mask, "attn_mask": attn_mask}
    want = torch.einsum("bhn,bhnm->bhm", weights.double(), naive(q, k, **masks))
    got = attention_column_sums(
        q, k, row_weights=weights, reduce="none", backend=backend, chunk=2, **masks
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 4, 7)])
def test_row_weights_may_leave_out_head_and_batch(backend, shape):
    q, k = qk()
    weights = torch.arange(torch.Size(shape).numel()).float().view(shape)
    full = weights if len(shape) != 2 else weights[:, None]
    want = torch.einsum("bhn,bhnm->bhm", full.expand(2, 4, 7).double(), naive(q, k))
    got = attention_column_sums(q, k, row_weights=weights, reduce="sum", backend=backend)
    torch.testing.assert_close(got.double(), want.sum(1), atol=1e-4, rtol=1e-5)
    mean = attention_column_sums(q, k, row_weights=weights, backend=backend)
    torch.testing.assert_close(mean * 4, got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_float64(backend):
    q, k = qk(dtype=torch.float64)
    got = attention_column_sums(q, k, scale=1.5, backend=backend)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, naive(q, k, scale=1.5).sum(2).mean(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_summed_in_float32(backend):
    q, k = qk(N=300, M=300, dtype=torch.bfloat16)
    got = attention_column_sums(q, k, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), naive(q, k).sum(2).mean(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_every_gradient_mode(backend, context):
    plain = attention_column_sums(*qk(), backend=backend, causal=True)
    with context():
        q, k = qk()
        q.requires_grad_(not q.is_inference() and torch.is_grad_enabled())
        got = attention_column_sums(q, k, backend=backend, causal=True)
        masked = attention_column_sums(
            q, k, backend=backend, key_mask=torch.arange(7).expand(2, 7) < 5
        )
    assert not got.requires_grad
    assert torch.equal(got, plain)
    assert masked[:, 5:].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_the_logits(backend):
    q, k = qk()
    plain = attention_column_sums(q, k, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_column_sums(q, k, backend=backend), plain)


@given(
    B=st.integers(1, 3),
    G=st.integers(1, 3),
    repeat=st.integers(1, 2),
    N=st.integers(1, 12),
    chunk=st.integers(1, 13),
    elements=st.sampled_from([1, 40, 100, 2**19]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_tiling_preserves_mass_and_result(B, G, repeat, N, chunk, elements, causal, seed):
    q, k = qk(B=B, H=G * repeat, G=G, N=N, M=N, seed=seed)
    weights = torch.rand(B, N, generator=torch.Generator().manual_seed(seed))
    args = {"row_weights": weights, "causal": causal, "reduce": "sum"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_TILE_ELEMENTS_CPU", elements)
        tiled = attention_column_sums(q, k, chunk=chunk, **args)
    torch.testing.assert_close(tiled.sum(-1), weights.sum(-1) * G * repeat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        tiled, attention_column_sums(q, k, backend="backward", **args), atol=2e-5, rtol=1e-4
    )


def test_permuting_keys_permutes_columns_and_permuting_rows_changes_nothing():
    q, k = qk(N=20, M=20)
    plain = attention_column_sums(q, k)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(attention_column_sums(q, k[:, :, order]), plain[:, order])
    torch.testing.assert_close(attention_column_sums(q[:, :, order], k), plain)
    heads = torch.tensor([2, 3, 0, 1])
    torch.testing.assert_close(attention_column_sums(q[:, heads], k.flip(1)), plain)


def test_half_precision_masks_count_as_masked():
    q, k = qk()
    hidden = torch.zeros(1, 1, 7, 7)
    hidden[..., 3] = torch.finfo(torch.bfloat16).min
    for mask in (hidden, hidden.bfloat16(), hidden.clamp_min(-65504).half(), hidden - 1e38):
        assert attention_column_sums(q, k, attn_mask=mask)[:, 3].abs().max() == 0


def test_received_attention_is_the_mean_over_valid_rows_and_heads():
    q, k = qk()
    torch.testing.assert_close(
        received_attention(q, k).double(), naive(q, k).mean((1, 2)), atol=1e-6, rtol=0
    )
    valid = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    got = received_attention(q, k, query_mask=valid, key_mask=valid)
    want = naive(q[:1, :, :4], k[:1, :, :4]).mean((1, 2))
    torch.testing.assert_close(got[:1, :4].double(), want, atol=1e-6, rtol=0)
    assert got[0, 4:].abs().max() == 0
    torch.testing.assert_close(got.sum(-1), torch.ones(2))


def test_attention_rows_equal_the_rows_of_the_full_matrix():
    q, k = qk(N=9, M=9)
    rows = torch.tensor([8, 2, 5])
    full = naive(q, k, causal=True)
    got = attention_rows(q[:, :, rows], k, row_positions=rows)
    assert got.shape == (2, 4, 3, 9)
    torch.testing.assert_close(got.double(), full[:, :, rows], atol=1e-6, rtol=0)
    per_sample = torch.tensor([[8, 2], [1, 7]])
    picked = torch.stack([q[b][:, per_sample[b]] for b in range(2)])
    got = attention_rows(picked, k, row_positions=per_sample)
    want = torch.stack([full[b][:, per_sample[b]] for b in range(2)])
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


def test_attention_rows_masks_and_dtype():
    q, k = qk(N=2, dtype=torch.bfloat16)
    key_mask = torch.arange(7).expand(2, 7) >= torch.tensor([[2], [7]])
    got = attention_rows(q, k, key_mask=key_mask)
    assert got.dtype == torch.float32
    assert got[0, ..., :2].abs().max() == 0
    torch.testing.assert_close(got[0].sum(-1), torch.ones(4, 2))
    assert torch.equal(got[1], torch.zeros(4, 2, 7))
    bias = torch.zeros(1, 1, 2, 7).masked_fill(~key_mask[:1, None, None], -torch.inf)
    torch.testing.assert_close(attention_rows(q[:1], k[:1], attn_mask=bias), got[:1])


def test_one_row_is_the_same_whatever_the_keys_lie_like():
    q, k = qk(N=1, G=4)
    beside = k.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.stack([k, k], 2).permute(0, 3, 2, 1, 4).contiguous()[:, :, 1].transpose(1, 2)
    assert beside.stride() != k.stride() != fused.stride()
    key_mask = torch.arange(7).expand(2, 7) >= torch.tensor([[2], [0]])
    want = attention_rows(q, k, key_mask=key_mask)
    for other in (beside, fused):
        assert torch.equal(other, k)
        torch.testing.assert_close(attention_rows(q, other, key_mask=key_mask), want)


def test_attention_rows_gradient_has_no_nan_in_dead_rows():
    q, k = qk(N=1)
    q.requires_grad_()
    mask = torch.tensor([[False] * 7, [True] * 7])
    attention_rows(q, k, key_mask=mask)[..., 0].sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()
    assert q.grad[1].abs().max() > 0


def test_masked_softmax_of_empty_and_dead_rows():
    logits = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    assert masked_softmax(logits).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert masked_softmax(torch.empty(2, 0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 7, 8)}, "B, H, N, D"),
        ({"k": torch.zeros(2, 3, 7, 8)}, "divide"),
        ({"k": torch.zeros(2, 2, 7, 9)}, "share"),
        ({"row_weights": torch.ones(6)}, "row_weights"),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, "key_mask"),
        ({"attn_mask": torch.ones(2, 3, 7, 7)}, "attn_mask"),
        ({"reduce": "max"}, "reduce"),
        ({"backend": "flash"}, "backend"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_wrong_input_says_what_is_wrong(change, message):
    q, k = qk()
    args = {"q": q, "k": k} | change
    with pytest.raises(ValueError, match=message):
        attention_column_sums(args.pop("q"), args.pop("k"), **args)


def test_wrong_row_positions_and_query_mask():
    q, k = qk()
    with pytest.raises(ValueError, match="row_positions"):
        attention_rows(q, k, row_positions=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="query_mask"):
        received_attention(q, k, query_mask=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 2, 40), (3, 1, 33)])
@pytest.mark.parametrize("elements", [2, 64, 2**12])
@pytest.mark.parametrize("bias", ["none", "keys", "pairs"])
def test_received_and_kept_are_those_of_the_matrix(shape, elements, bias, monkeypatch) -> None:
    """Whatever the tiles: several images, single heads, or some rows of one."""
    monkeypatch.setattr("foveate.ops._columns._TILE_ELEMENTS_CPU", elements)
    B, H, N = shape
    q, k = torch.randn(B, N, 2, H, 4).permute(2, 0, 3, 1, 4)
    added = {
        "none": None, "keys": torch.randn(B, 1, 1, N), "pairs": torch.randn(B, 1, N, N),
    }[bias]  # fmt: skip
    received, kept = attention_received_and_kept(q, k, added)
    matrix = attention_matrix(q, k, added)
    torch.testing.assert_close(received, matrix.sum(2))
    torch.testing.assert_close(kept, matrix.diagonal(dim1=2, dim2=3))
    v = torch.randn(B, N, H, 5).transpose(1, 2)[..., :4]
    out, *same = attend_and_score(q, k, v, added)
    torch.testing.assert_close(out, matrix @ v)
    assert same[0].equal(received) and same[1].equal(kept)
    half, _ = attention_received_and_kept(q.bfloat16(), k.bfloat16(), added)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, matrix.sum(2), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("elements", [2, 64, 2**12])
def test_the_matrix_is_that_of_the_rows(elements, monkeypatch) -> None:
    monkeypatch.setattr("foveate.ops._columns._TILE_ELEMENTS_CPU", elements)
    q, k, bias = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 13, 4), torch.randn(2, 1, 1, 13)
    expected = attention_rows(q, k, attn_mask=bias)
    torch.testing.assert_close(attention_matrix(q, k, bias), expected)
    room = torch.zeros(3, 3, 9, 13)
    written = attention_matrix(q, k, bias, out=room[:2])
    assert written.data_ptr() == room.data_ptr() and room[2].abs().sum() == 0
    torch.testing.assert_close(room[:2], expected)
    assert attention_matrix(q.double(), k.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="k must have shape"):
        attention_matrix(q, k[:, :2])


def test_received_and_kept_need_square_attention() -> None:
    with pytest.raises(ValueError, match="k must have shape"):
        attention_received_and_kept(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4))
