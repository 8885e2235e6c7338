"""Attention in which some keys are seen without rotary distance.

Legend of shape suffixes: B batch, H query heads, G key heads (G divides H), N query rows, M keys,
D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import require_shape

#: Logits held at once: what caches of a CPU hold (4 MiB in float32), what keeps a GPU busy.
_TILE_CPU, _TILE_GPU = 2**21, 2**26
#: Rows of a tile below which it takes fewer heads instead: products of few rows are slow.
_ROWS = 128


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
    because reading the keys is what costs there. Tiles of some heads and rows are worked off one
    by one, so that memory is O(B M) rows of logits and not H N times that. Time O(B H N M D), half
    of it when causal.

    Against fused attention without such keys (float32, two CPU cores, D = 128): 1.3 times the time
    for 2988 rows of 32 heads, 1.2 times for 6333 rows of 28 heads on 4 key heads.

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
        when one tile held all rows of all heads, else None.

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
    heads, rows = _tile_shape(tile, B, H, G, N, M)
    runs = None if N == 1 else _runs(unrotated_BM)
    parts = []
    for first_head in range(0, G, heads):
        own = slice(first_head * H // G, min(first_head + heads, G) * H // G)
        k_BgMD, v_BgMD = (x[:, first_head : first_head + heads] for x in (k_BGMD, v_BGMD))
        mask = attn_mask
        if attn_mask is not None and attn_mask.shape[1] > 1:
            mask = attn_mask[:, own]
        outs = []
        for first in range(0, N, rows):
            last = min(first + rows, N)
            # Causal rows see nothing behind themselves: those keys need no logits.
            seen = M if mask is not None else M - N + last
            rotated, raw = (x[:, own, first:last] * factor for x in (q_rotated_BHND, q_raw_BHND))
            if runs is None:
                logits = _both(rotated, raw, k_BgMD[:, :, :seen], unrotated_BM[:, :seen])
            else:
                logits = _run_by_run(rotated, raw, k_BgMD[:, :, :seen], runs)
            logits = _masked(logits, mask, first, M - N)
            weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(v_BGMD.dtype)
            outs.append(_grouped(weights, v_BgMD[:, :, :seen]))
            if heads == G and rows == N:
                return outs[0], weights
        parts.append(outs[0] if len(outs) == 1 else torch.cat(outs, dim=2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None


def _tile_shape(tile: int, B: int, H: int, G: int, N: int, M: int) -> tuple[int, int]:
    """Key heads and rows of a tile of about `tile` logits: many rows before many heads."""
    of_one_head = max(B * H // G * M, 1)  # a row of all queries that share a key head
    heads = max(1, min(G, tile // (of_one_head * min(N, _ROWS))))
    return heads, max(1, min(N, tile // (of_one_head * heads)))


def _runs(unrotated_BM: Tensor) -> list[tuple[int, int, list[bool]]]:
    """(first, last + 1, kind per sample) of stretches in which no sample's kind changes."""
    changes_M = (unrotated_BM[:, 1:] != unrotated_BM[:, :-1]).any(dim=0)
    edges = [0, *(changes_M.nonzero()[:, 0] + 1).tolist(), unrotated_BM.shape[1]]
    kinds = unrotated_BM[:, edges[:-1]].T.tolist()
    return list(zip(edges[:-1], edges[1:], kinds, strict=True))


def _run_by_run(
    rotated: Tensor, raw: Tensor, k_BGMD: Tensor, runs: list[tuple[int, int, list[bool]]]
) -> Tensor:
    B, H, N, D = raw.shape
    G, M = k_BGMD.shape[1:3]
    # Without a gradient the runs are written where they belong, which saves a pass over the logits.
    whole = None if torch.is_grad_enabled() else raw.new_empty(B * G, H // G * N, M)
    parts = []
    for first, end, kinds in runs:
        end = min(end, M)
        if first >= end:
            break
        if all(kinds) or not any(kinds):
            q = raw if kinds[0] else rotated
        else:
            q = torch.where(
                torch.tensor(kinds, device=raw.device)[:, None, None, None], raw, rotated
            )
        k_BGDs = k_BGMD[:, :, first:end].transpose(2, 3)
        if whole is None:
            parts.append(_grouped(q, k_BGDs))
        else:
            rows = q.reshape(B * G, H // G * N, D)
            torch.bmm(rows, k_BGDs.reshape(B * G, D, end - first), out=whole[..., first:end])
    if whole is not None:
        return whole.view(B, H, N, M)
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
        # Only the columns of these rows themselves lie partly ahead; nothing lies behind them.
        own = logits_BHnM[..., first + num_past :]
        ahead_nn = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu(1)
        own.masked_fill_(ahead_nn, -torch.inf)
        return logits_BHnM
    part = mask[:, :, first : first + n, :M]
    if part.dtype != torch.bool:
        return logits_BHnM + part
    # Not -inf: a row of padding sees no key, and its softmax must not be NaN.
    return logits_BHnM.masked_fill(~part, torch.finfo(logits_BHnM.dtype).min)
