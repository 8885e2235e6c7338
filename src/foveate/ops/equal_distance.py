"""Attention in which some keys are seen without rotary distance.

Legend of shape suffixes: B batch, H query heads, G key heads (G divides H), N query rows, M keys,
D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import require_shape

#: Logits held at once: what caches of a CPU hold (2 MiB in float32), what keeps a GPU busy.
_TILE_CPU, _TILE_GPU = 2**19, 2**26


def equal_distance_attention(
    q_rotated_BHND: Tensor,
    q_raw_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGMD: Tensor,
    unrotated_BM: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to some keys with raw queries and to all others with rotated ones, in one softmax.

    `logit_ij = q_raw_i . k_j` where key j is unrotated, else `q_rotated_i . k_j`. Every logit is
    computed once: keys are cut into runs of equal kind (views, no copies), each multiplied with
    the queries of its kind; a single query row is multiplied with all keys in both forms at once,
    because reading the keys is what costs there. Rows are worked off in tiles, so that memory is
    O(B H M) rows of logits and not N times that. Time O(B H N M D), half of it when causal.

    Against fused attention without such keys (float32, one busy CPU core, D = 128): 1.2 times the
    time for 512 rows of 32 heads, 1.5 times for 2048 rows of 28 heads on 4 key heads, 0.4 to 0.6
    times for one row on 4096 and 16384 keys.

    Args:
        q_rotated_BHND, q_raw_BHND: queries [B, H, N, D] with and without rotary positions.
        k_BGMD: keys [B, G, M, D], unrotated where `unrotated_BM` says so, rotated elsewhere.
        v_BGMD: values [B, G, M, D'].
        unrotated_BM: bool [B, M].
        attn_mask: bool (True = attend) or additive, [B or 1, 1 or H, N, M]; None is causal, aligned
            to the end.
        scale: factor on the logits, default `D ** -0.5`.
        tile: most logits held at once; None: what suits the device.

    Returns:
        Output [B, H, N, D'] in the dtype of the values, and the weights [B, H, N, M] in that dtype
        when one tile held all rows, else None.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
        >>> near = torch.tensor([[False, True, True, False, False, False]])
        >>> out, weights = equal_distance_attention(q.roll(1, -1), q, k, v, near)
        >>> out.shape, weights.sum(-1).allclose(torch.ones(1, 4, 6))
        (torch.Size([1, 4, 6, 8]), True)

    Source: Vista-LLaMA, arXiv 2312.08870, section 3.2 (equal distance to visual tokens).
    """
    B, H, N, D = q_raw_BHND.shape
    G, M = k_BGMD.shape[1:3]
    require_shape(q_rotated_BHND, (B, H, N, D), "q_rotated")
    require_shape(k_BGMD, (B, G, M, D), "k")
    require_shape(unrotated_BM, (B, M), "unrotated")
    if G == 0 or H % G:
        raise ValueError(f"The {G} key heads must divide the {H} query heads.")
    factor = D**-0.5 if scale is None else scale
    if tile is None:
        tile = _TILE_CPU if k_BGMD.device.type == "cpu" else _TILE_GPU
    rows = max(1, min(N, tile // max(B * H * M, 1)))
    runs = None if N == 1 else _runs(unrotated_BM)
    outs, weights_BHNM = [], None
    for first in range(0, N, rows):
        last = min(first + rows, N)
        # Causal rows see nothing behind themselves: those keys need no logits.
        seen = M if attn_mask is not None else M - N + last
        rotated, raw = (x[:, :, first:last] * factor for x in (q_rotated_BHND, q_raw_BHND))
        k_BGsD = k_BGMD[:, :, :seen]
        if runs is None:
            logits_BHns = _both(rotated, raw, k_BGsD, unrotated_BM[:, :seen])
        else:
            logits_BHns = _run_by_run(rotated, raw, k_BGsD, runs)
        logits_BHns = _masked(logits_BHns, attn_mask, first, M - N)
        weights_BHns = torch.softmax(logits_BHns, dim=-1, dtype=torch.float32).to(v_BGMD.dtype)
        outs.append(_grouped(weights_BHns, v_BGMD[:, :, :seen]))
        if rows == N:
            weights_BHNM = weights_BHns
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), weights_BHNM


def _runs(unrotated_BM: Tensor) -> list[tuple[int, int, list[bool]]]:
    """(first, last + 1, kind per sample) of stretches in which no sample's kind changes."""
    changes_M = (unrotated_BM[:, 1:] != unrotated_BM[:, :-1]).any(dim=0)
    edges = [0, *(changes_M.nonzero()[:, 0] + 1).tolist(), unrotated_BM.shape[1]]
    kinds = unrotated_BM[:, edges[:-1]].T.tolist()
    return list(zip(edges[:-1], edges[1:], kinds, strict=True))


def _run_by_run(
    rotated: Tensor, raw: Tensor, k_BGMD: Tensor, runs: list[tuple[int, int, list[bool]]]
) -> Tensor:
    parts = []
    for first, end, kinds in runs:
        end = min(end, k_BGMD.shape[2])
        if first >= end:
            break
        if all(kinds) or not any(kinds):
            q = raw if kinds[0] else rotated
        else:
            q = torch.where(
                torch.tensor(kinds, device=raw.device)[:, None, None, None], raw, rotated
            )
        parts.append(_grouped(q, k_BGMD[:, :, first:end].transpose(2, 3)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _both(rotated: Tensor, raw: Tensor, k_BGMD: Tensor, unrotated_BM: Tensor) -> Tensor:
    """Both products for every key, reading the keys once."""
    rows = rotated.shape[2]
    logits = _grouped(torch.cat([rotated, raw], dim=2), k_BGMD.transpose(2, 3))
    return torch.where(unrotated_BM[:, None, None], logits[:, :, rows:], logits[:, :, :rows])


def _grouped(x_BHNK: Tensor, y_BGKM: Tensor) -> Tensor:
    """x @ y with the key heads of `y` shared by groups of heads of `x`, without copying `y`."""
    B, H, N, K = x_BHNK.shape
    G = y_BGKM.shape[1]
    out = x_BHNK.reshape(B, G, H // G * N, K) @ y_BGKM
    return out.view(B, H, N, -1)


def _masked(logits_BHnM: Tensor, mask: Tensor | None, first: int, num_past: int) -> Tensor:
    n, M = logits_BHnM.shape[2:]
    if mask is None:
        row_n = torch.arange(first + num_past, first + num_past + n, device=logits_BHnM.device)
        ahead_nM = torch.arange(M, device=logits_BHnM.device) > row_n[:, None]
        return logits_BHnM.masked_fill(ahead_nM, -torch.inf)
    part = mask[:, :, first : first + n, :M]
    if part.dtype != torch.bool:
        return logits_BHnM + part
    # Not -inf: a row of padding sees no key, and its softmax must not be NaN.
    return logits_BHnM.masked_fill(~part, torch.finfo(logits_BHnM.dtype).min)
