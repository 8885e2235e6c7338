"""Token scores from attention: weighted column sums, a few rows, and received attention.

None of these functions stores an N x N matrix for all heads. `q` and `k` are what the attention
kernel sees: rotated and normalised already, one tensor per projection.

Legend of shape suffixes: B batch, H query heads, G key heads (G divides H), N query rows,
M keys, R selected query rows, D channels of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.ops._columns import (
    Masks,
    apply_mask,
    backward_columns,
    chunked_columns,
    columns_and_diagonal,
    matrix_tiles,
)
from foveate.ops._common import compute_dtype, full_precision, require_dims, require_shape, widen

Reduce = Literal["mean", "sum", "none"]
Backend = Literal["auto", "chunked", "backward"]


def attention_column_sums(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    *,
    row_weights: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    reduce: Reduce = "mean",
    backend: Backend = "auto",
    chunk: int = 512,
) -> Tensor:
    """Sum the columns of softmax attention, each row counted with its weight, exactly.

    `col_j = sum_i w_i softmax(q k^T * scale + mask)_ij`, in O(B H N M D) time. The matrix is never
    stored: `"chunked"` works through cache-sized tiles of rows; `"backward"` reads the sums off
    the gradient of a dummy value tensor in `scaled_dot_product_attention` (the gradient of `v` is
    `P^T w`), which any fused kernel computes in O(N) memory. Both also work under
    `torch.no_grad()` and `torch.inference_mode()`; the result carries no gradient.

    `"auto"` is `"chunked"`, the faster one where it was measured: medians of
    `benchmarks/test_ops_score.py` in float32 on one thread of a Xeon CPU, in milliseconds, beside
    the textbook form (512 rows of all heads at once). On a GPU it is not measured yet.

    | B, H (G), N, D, mask             | chunked | backward | 512 rows |
    |----------------------------------|---------|----------|----------|
    | 1, 16 (16), 729, 72, none        | 20      | 83       | 41       |
    | 8, 16 (16), 729, 72, none        | 154     | 666      | 461      |
    | 1, 14 (2), 4096, 64, causal      | 407     | 951      | 2173     |
    | 1, 28 (4), 4096, 128, causal     | 1074    | 3961     | 6412     |

    Args:
        q_BHND: queries [B, H, N, D], any float dtype.
        k_BGMD: keys [B, G, M, D]; G must divide H (grouped-query attention).
        row_weights: [N], [B, N] or [B, H, N]; None counts every row once.
        scale: factor on the logits, default `D ** -0.5`.
        causal: row i of N sees keys 0 .. M - N + i (aligned to the end, as with a cache).
        key_mask: [B, M] bool, True where the key may be attended.
        attn_mask: bool (True = attend) or additive, broadcastable to [B, H, N, M]. Additive values
            below half of the dtype's minimum count as masked.
        reduce: over heads: "mean", "sum", or "none" to keep them.
        backend: "auto", "chunked" or "backward".
        chunk: most query rows handled at once by the chunked form.

    Returns:
        [B, M], or [B, H, M] with `reduce="none"`; float32 (float64 for float64 input). A row that
        may attend to no key adds nothing.

    Raises:
        ValueError: shapes do not fit, or an unknown `reduce` or `backend`.

    Example:
        >>> q, k = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
        >>> col = attention_column_sums(q, k, reduce="mean")
        >>> tuple(col.shape), round(float(col.sum()), 3)
        ((1, 10), 10.0)

    Source: used by VisionZip, FastV and H2O-like scores; the backward form follows from
    `d(P v)/dv = P^T`.
    """
    k_BHMD = expand_keys(q_BHND, k_BGMD)
    B, H, N, D = q_BHND.shape
    M = k_BHMD.shape[2]
    if reduce not in ("mean", "sum", "none"):
        raise ValueError(f'reduce must be "mean", "sum" or "none", got {reduce!r}')
    if backend not in ("auto", "chunked", "backward"):
        raise ValueError(f'backend must be "auto", "chunked" or "backward", got {backend!r}')
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    if key_mask is not None:
        require_shape(key_mask, (B, M), "key_mask")
    masks = Masks(key_mask, _expand_mask(attn_mask, B, H, N, M), causal)
    factor = D**-0.5 if scale is None else scale
    with torch.no_grad(), full_precision(q_BHND.device):
        weights_BHN = _expand_weights(row_weights, q_BHND)
        if backend == "backward":
            columns_BHM = backward_columns(q_BHND, k_BHMD, weights_BHN, factor, masks)
        else:
            columns_BHM = chunked_columns(q_BHND, k_BHMD, weights_BHN, factor, masks, chunk)
        if reduce == "none":
            return columns_BHM
        return columns_BHM.mean(1) if reduce == "mean" else columns_BHM.sum(1)


def received_attention(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    *,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    backend: Backend = "auto",
    chunk: int = 512,
) -> Tensor:
    """Average the attention every key receives, over all query rows and heads.

    Args:
        q_BHND: queries [B, H, N, D].
        k_BGMD: keys [B, G, M, D]; G must divide H.
        query_mask: [B, N] bool; only rows that are True are averaged (padding).
        scale, causal, key_mask, attn_mask, backend, chunk: as in `attention_column_sums`.

    Returns:
        [B, M] in float32; sums to 1 per sample when every averaged row sees a key.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q = torch.randn(2, 4, 9, 8)
        >>> received_attention(q, q).sum(-1).allclose(torch.ones(2))
        True

    Source: the encoder score of HoliTom (arXiv 2505.21334) and of FasterVLM's successor for
    encoders without [CLS].
    """
    weights = None
    rows: float | Tensor = q_BHND.shape[2]
    if query_mask is not None:
        require_shape(query_mask, (q_BHND.shape[0], q_BHND.shape[2]), "query_mask")
        weights = query_mask.to(q_BHND.dtype)
        rows = query_mask.sum(-1, keepdim=True).clamp_min(1)
    columns_BM = attention_column_sums(
        q_BHND,
        k_BGMD,
        row_weights=weights,
        scale=scale,
        causal=causal,
        key_mask=key_mask,
        attn_mask=attn_mask,
        backend=backend,
        chunk=chunk,
    )
    return columns_BM / rows


def attention_rows(
    q_BHRD: Tensor,
    k_BGMD: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    row_positions: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Compute the softmax attention of a few query rows ([CLS], last token, question).

    Equals the rows an eager kernel would return, at O(B H R M D) cost, whatever kernel the model
    itself runs. Gradients flow.

    Args:
        q_BHRD: the selected queries [B, H, R, D].
        k_BGMD: all keys [B, G, M, D]; G must divide H.
        scale: factor on the logits, default `D ** -0.5`.
        key_mask: [B, M] bool, True where the key may be attended.
        row_positions: [R] or [B, R] integers; row r sees keys 0 .. row_positions[r] only (causal).
        attn_mask: bool or additive, broadcastable to [B, H, R, M].

    Returns:
        [B, H, R, M] in float32 (float64 for float64 input). A row without any key is all zero.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 6, 8)
        >>> tuple(attention_rows(q, k, row_positions=torch.tensor([2])).shape)
        (1, 4, 1, 6)
    """
    k_BHMD = expand_keys(q_BHRD, k_BGMD)
    B, H, R, D = q_BHRD.shape
    M = k_BHMD.shape[2]
    factor = D**-0.5 if scale is None else scale
    with full_precision(q_BHRD.device):
        logits_BHRM = _logits(widen(q_BHRD) * factor, widen(k_BHMD))
        if key_mask is not None:
            require_shape(key_mask, (B, M), "key_mask")
            logits_BHRM = logits_BHRM.masked_fill(~key_mask[:, None, None], -torch.inf)
        if row_positions is not None:
            if row_positions.shape not in ((R,), (B, R)):
                raise ValueError(
                    f"row_positions must be [{R}] or [{B}, {R}], got {tuple(row_positions.shape)}"
                )
            last_BR = row_positions.to(q_BHRD.device).expand(B, R)
            ahead_BRM = torch.arange(M, device=q_BHRD.device) > last_BR[..., None]
            logits_BHRM = logits_BHRM.masked_fill(ahead_BRM[:, None], -torch.inf)
        pair = _expand_mask(attn_mask, B, H, R, M)
        if pair is not None:
            logits_BHRM = apply_mask(logits_BHRM, pair)
        return masked_softmax(logits_BHRM)


def _logits(q_BHRD: Tensor, k_BHMD: Tensor) -> Tensor:
    """Products of queries and keys, [B, H, R, M]."""
    _, H, R, D = q_BHRD.shape
    side_by_side = k_BHMD.stride()[1::2] == (D, 1)
    if R != 1 or not side_by_side:
        return q_BHRD @ k_BHMD.transpose(-1, -2)
    # As encoders lay keys out, heads of a token beside each other, a product by head copies them
    # all first. One with the query of every head in channels of its own reads them where they lie.
    own_HH = torch.eye(H, dtype=q_BHRD.dtype, device=q_BHRD.device)
    q_BHC = (q_BHRD * own_HH[..., None]).flatten(2)
    keys_BMC = k_BHMD.transpose(1, 2).flatten(2)
    return (q_BHC @ keys_BMC.transpose(1, 2))[:, :, None]


def attention_matrix(
    q_BHND: Tensor, k_BHMD: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """All attention of one layer, for methods that need the whole matrix.

    A third of the time of `attention_rows`, without its masks and gradients. O(B H N M D) time,
    O(B H N M) memory: call it for a few images at a time.

    Args:
        q_BHND: queries [B, H, N, D].
        k_BHMD: keys [B, H, M, D].
        bias: added to the scaled logits, broadcastable to [B, H, N, M]; every row needs a key.
        out: where to write it. New memory of some 10 MiB costs as much time as what is computed.

    Returns:
        [B, H, N, M] in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q, k = torch.randn(2, 1, 3, 5, 8)
        >>> attention_matrix(q, k).allclose(attention_rows(q, k), atol=1e-6)
        True
    """
    require_dims(q_BHND, 4, "q", "[B, H, N, D]")
    B, H, N, D = q_BHND.shape
    require_shape(k_BHMD, (B, H, k_BHMD.shape[2], D), "k")
    if out is None:
        shape = (B, H, N, k_BHMD.shape[2])
        out = torch.empty(shape, dtype=compute_dtype(q_BHND.dtype), device=q_BHND.device)
    with torch.no_grad(), full_precision(q_BHND.device):
        for at, share in matrix_tiles(q_BHND, k_BHMD, D**-0.5, bias):
            out[at] = share
    return out


def attention_received_and_kept(
    q_BHND: Tensor, k_BHND: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What every token receives of the attention of all, and what it keeps of its own.

    The column sums and the diagonal of the matrix, of which only a tile exists at a time: less than
    half the time of `attention_matrix` where that does not fit a cache. O(B H N^2 D).

    Args:
        q_BHND: queries [B, H, N, D].
        k_BHND: keys [B, H, N, D].
        bias: added to the scaled logits, broadcastable to [B, H, N, N]; every row needs a key.

    Returns:
        Two of [B, H, N], float32 (float64 for float64 input), without gradients.

    Raises:
        ValueError: queries and keys differ in shape.

    Example:
        >>> q, k = torch.randn(2, 1, 3, 5, 8)
        >>> received, kept = attention_received_and_kept(q, k)
        >>> matrix = attention_matrix(q, k)
        >>> received.allclose(matrix.sum(2)), kept.allclose(matrix.diagonal(dim1=2, dim2=3))
        (True, True)
    """
    require_dims(q_BHND, 4, "q", "[B, H, N, D]")
    require_shape(k_BHND, tuple(q_BHND.shape), "k")
    with torch.no_grad(), full_precision(q_BHND.device):
        return columns_and_diagonal(q_BHND, k_BHND, q_BHND.shape[-1] ** -0.5, bias)[:2]


def attend_and_score(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one layer, and on the way what `attention_received_and_kept` gives.

    On a CPU about as fast as the fused kernel alone, which says nothing of the weights. No
    gradients. O(B H N^2 D).

    Args:
        q_BHND: queries [B, H, N, D].
        k_BHND: keys [B, H, N, D].
        v_BHND: values [B, H, N, D].
        bias: added to the scaled logits, broadcastable to [B, H, N, N]; every row needs a key.

    Returns:
        The output [B, H, N, D] in the dtype of the values, what every token receives, what it
        keeps.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> out, received, kept = attend_and_score(q, k, v)
        >>> fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> out.allclose(fused, atol=1e-5), received.shape == kept.shape == (1, 2, 5)
        (True, True)
    """
    require_dims(q_BHND, 4, "q", "[B, H, N, D]")
    require_shape(k_BHND, tuple(q_BHND.shape), "k")
    require_shape(v_BHND, tuple(q_BHND.shape), "v")
    scale = q_BHND.shape[-1] ** -0.5
    with torch.no_grad(), full_precision(q_BHND.device):
        received, kept, out = columns_and_diagonal(q_BHND, k_BHND, scale, bias, v_BHND)
    assert out is not None
    return out.to(v_BHND.dtype), received, kept


def masked_softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis that gives zeros, not NaN, where every logit is -inf.

    Args:
        logits: [..., M], any float dtype; -inf means masked.

    Returns:
        Same shape and dtype.

    Example:
        >>> masked_softmax(torch.full((1, 2), -torch.inf)).tolist()
        [[0.0, 0.0]]
    """
    if logits.shape[-1] == 0:
        return logits
    dead = logits.amax(-1, keepdim=True) == -torch.inf
    # Refill before the softmax, too: a NaN inside would come back through the gradient.
    return torch.softmax(logits.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)


def expand_keys(q_BHND: Tensor, k_BGMD: Tensor) -> Tensor:
    """Check q against k and repeat the key heads up to the query heads."""
    require_dims(q_BHND, 4, "q", "[B, H, N, D]")
    require_dims(k_BGMD, 4, "k", "[B, G, M, D]")
    B, H, _, D = q_BHND.shape
    G, M = k_BGMD.shape[1:3]
    if k_BGMD.shape[0] != B or k_BGMD.shape[3] != D or G == 0 or H % G:
        raise ValueError(
            "q and k must share batch and channels and the key heads must divide the query heads, "
            f"got q {tuple(q_BHND.shape)} and k {tuple(k_BGMD.shape)}"
        )
    if G == H:
        return k_BGMD
    return k_BGMD[:, :, None].expand(B, G, H // G, M, D).reshape(B, H, M, D)


def _expand_weights(row_weights: Tensor | None, q_BHND: Tensor) -> Tensor:
    B, H, N, _ = q_BHND.shape
    like = widen(q_BHND[:1, :1, :1, :1])
    if row_weights is None:
        return like.new_ones(()).expand(B, H, N)
    shapes = {1: (N,), 2: (B, N), 3: (B, H, N)}
    if tuple(row_weights.shape) != shapes.get(row_weights.dim()):
        raise ValueError(
            f"row_weights must be [{N}], [{B}, {N}] or [{B}, {H}, {N}], "
            f"got {tuple(row_weights.shape)}"
        )
    weights = row_weights.to(device=like.device, dtype=like.dtype)
    if weights.dim() == 2:
        weights = weights[:, None]
    return weights.expand(B, H, N)


def _expand_mask(mask: Tensor | None, B: int, H: int, N: int, M: int) -> Tensor | None:
    if mask is None:
        return None
    try:
        return mask.expand(B, H, N, M)
    except RuntimeError:
        raise ValueError(
            f"attn_mask must be broadcastable to {(B, H, N, M)}, got {tuple(mask.shape)}"
        ) from None
