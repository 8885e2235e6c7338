"""Ways to sum attention columns without storing the matrix: tiles, and a gradient.

Legend of shape suffixes: B batch, H query heads (keys already repeated to them), N query rows,
M keys, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.ops._common import widen

# Logits in one tile of the chunked form. On a CPU 2 MiB of float32 stay in the second-level cache,
# worth a factor of 2 to 6; elsewhere few large kernels are better than many small ones.
_TILE_ELEMENTS_CPU = 2**19
_TILE_ELEMENTS_ACCELERATOR = 2**26


@dataclass(frozen=True)
class Masks:
    """What hides keys from rows: `key` [B, M] bool, `pair` [B|1, H|1, N, M], causal offset."""

    key_BM: Tensor | None
    pair: Tensor | None
    causal: bool


def apply_mask(logits: Tensor, mask: Tensor) -> Tensor:
    """Set masked logits to -inf; `mask` is bool (True = attend) or additive."""
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    hidden = mask < 0.5 * torch.finfo(mask.dtype).min
    return (logits + mask).masked_fill(hidden, -torch.inf)


def _tiles(
    shape: tuple[int, int, int, int], chunk: int, elements: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut [B, H, N] into blocks whose logits hold about `elements` numbers each."""
    B, H, N, M = shape
    rows = max(1, min(N, chunk, max(16, elements // max(M, 1))))
    heads = max(1, min(H, elements // max(rows * M, 1)))
    samples = max(1, min(B, elements // max(rows * M * heads, 1))) if heads == H else 1
    for b in range(0, B, samples):
        for h in range(0, H, heads):
            for n in range(0, N, rows):
                yield slice(b, b + samples), slice(h, h + heads), slice(n, min(n + rows, N))


def chunked_columns(
    q_BHND: Tensor, k_BHMD: Tensor, weights_BHN: Tensor, scale: float, masks: Masks, chunk: int
) -> Tensor:
    """Weighted column sums [B, H, M] from cache-sized tiles of rows."""
    B, H, N, _ = q_BHND.shape
    M = k_BHMD.shape[2]
    on_cpu = q_BHND.device.type == "cpu"
    elements = _TILE_ELEMENTS_CPU if on_cpu else _TILE_ELEMENTS_ACCELERATOR
    q_BHND, keys_BHDM = widen(q_BHND) * scale, widen(k_BHMD).transpose(-1, -2)
    columns_BHM = q_BHND.new_zeros(B, H, M)
    tiny = torch.finfo(q_BHND.dtype).tiny
    for b, h, n in _tiles((B, H, N, M), chunk, elements):
        # Causal rows of this tile cannot see keys past the last row's own: skip those columns.
        last = min(M, M - N + n.stop) if masks.causal else M
        if last <= 0:
            continue
        logits = q_BHND[b, h, n] @ keys_BHDM[b, h, :, :last]
        if masks.causal:
            logits = logits.masked_fill_(_future(n, N, M, last, logits.device), -torch.inf)
        if masks.key_BM is not None:
            logits = logits.masked_fill_(~masks.key_BM[b, None, None, :last], -torch.inf)
        if masks.pair is not None:
            logits = apply_mask(logits, masks.pair[b, h, n, :last])
        # Softmax by hand: the division moves to the row weights (one pass less over the tile), and
        # a row without keys is all zeros instead of NaN.
        peak = logits.amax(-1, keepdim=True)
        logits.sub_(peak.masked_fill_(peak == -torch.inf, 0.0)).exp_()
        shares = weights_BHN[b, h, n] / logits.sum(-1).clamp_min_(tiny)
        columns_BHM[b, h, :last] += (shares.unsqueeze(-2) @ logits).squeeze(-2)
    return columns_BHM


def matrix_tiles(
    q_BHND: Tensor, k_BHMD: Tensor, scale: float, bias: Tensor | None
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Cache-sized tiles of attention with their places: (samples, heads, rows), [b, h, n, M].

    `bias` is added to the scaled logits.
    """
    q_BHND, keys_BHDM = widen(q_BHND), widen(k_BHMD).transpose(-1, -2)
    (B, H, N, _), M = q_BHND.shape, keys_BHDM.shape[3]
    if bias is not None:
        bias = bias.to(q_BHND.dtype).expand(B, H, -1, -1)
    elements = _TILE_ELEMENTS_ACCELERATOR
    if q_BHND.device.type == "cpu":
        # A head is cut only where it leaves no cache for anything else.
        elements = max(_TILE_ELEMENTS_CPU // 2, min(N * M, 2 * _TILE_ELEMENTS_CPU))
    none = q_BHND.new_zeros(())
    for b, h, n in _tiles((B, H, N, M), max(N, 1), elements):
        q_bhnD = q_BHND[b, h, n]
        logits = torch.baddbmm(
            none, q_bhnD.flatten(0, 1), keys_BHDM[b, h].flatten(0, 1), beta=0, alpha=scale
        ).unflatten(0, q_bhnD.shape[:2])
        if bias is not None:
            logits += bias[b, h] if bias.shape[2] == 1 else bias[b, h, n]
        yield (b, h, n), logits.softmax(-1)


def columns_and_diagonal(
    q_BHND: Tensor, k_BHND: Tensor, scale: float, bias: Tensor | None, v_BHND: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Column sums and diagonals [B, H, N] of square attention, and what it makes of values."""
    columns_BHN = widen(q_BHND.new_zeros(q_BHND.shape[:3]))
    diagonal_BHN, out_BHND = torch.empty_like(columns_BHN), None
    if v_BHND is not None:
        v_BHND = widen(v_BHND)
        B, H, N, D = v_BHND.shape
        # Heads side by side, as the projection behind it takes them.
        out_BHND = v_BHND.new_empty(B, N, H, D).transpose(1, 2)
    for (b, h, n), share in matrix_tiles(q_BHND, k_BHND, scale, bias):
        columns_BHN[b, h] += share.sum(-2)
        diagonal_BHN[b, h, n] = share[..., n].diagonal(dim1=-2, dim2=-1)
        if v_BHND is not None and out_BHND is not None:
            v_XND = v_BHND[b, h].flatten(0, 1)
            out_BHND[b, h, n] = torch.bmm(share.flatten(0, 1), v_XND).unflatten(0, share.shape[:2])
    return columns_BHN, diagonal_BHN, out_BHND


def _future(n: slice, N: int, M: int, last: int, device: torch.device) -> Tensor:
    """[rows, last] bool: True where the key lies after what the row may see."""
    rows = torch.arange(n.start, n.stop, device=device) + (M - N)
    return torch.arange(last, device=device) > rows[:, None]


def backward_columns(
    q_BHND: Tensor, k_BHMD: Tensor, weights_BHN: Tensor, scale: float, masks: Masks
) -> Tensor:
    """Weighted column sums [B, H, M] as the gradient of a dummy value tensor."""
    N, M = q_BHND.shape[2], k_BHMD.shape[2]
    if q_BHND.device.type == "cpu":
        q_BHND, k_BHMD = widen(q_BHND), widen(k_BHMD)
    bias, weights_BHN = _backward_bias(q_BHND, weights_BHN, masks, M)
    # Only the plain square case can be left to the kernel: its flag aligns to the start, not the
    # end, and excludes a mask.
    is_causal = masks.causal and bias is None and N == M
    with torch.inference_mode(False), torch.enable_grad():
        q = q_BHND.clone() if q_BHND.is_inference() else q_BHND.detach()
        k = k_BHMD.clone() if k_BHMD.is_inference() else k_BHMD.detach()
        bias = bias.clone() if bias is not None and bias.is_inference() else bias
        v = torch.zeros_like(k, requires_grad=True)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale
        )
        upstream = weights_BHN.clone().to(out.dtype)[..., None].expand_as(out)
        (grad_BHMD,) = torch.autograd.grad(out, v, upstream)
    return widen(grad_BHMD[..., 0])


def _backward_bias(
    q_BHND: Tensor, weights_BHN: Tensor, masks: Masks, M: int
) -> tuple[Tensor | None, Tensor]:
    """Join the masks into one additive tensor; rows without any key get weight 0 and no mask."""
    N = q_BHND.shape[2]
    if masks.key_BM is None and masks.pair is None and (not masks.causal or N == M):
        return None, weights_BHN
    bias = q_BHND.new_zeros(1, 1, 1, 1)
    if masks.key_BM is not None:
        bias = apply_mask(bias, masks.key_BM[:, None, None])
    if masks.causal:
        bias = apply_mask(bias, ~_future(slice(0, N), N, M, M, bias.device))
    if masks.pair is not None:
        bias = apply_mask(bias, masks.pair)
    bias = bias.to(q_BHND.dtype)
    dead = (bias == -torch.inf).all(-1, keepdim=True)
    return bias.masked_fill(dead, 0.0), weights_BHN.masked_fill(dead.squeeze(-1), 0.0)
