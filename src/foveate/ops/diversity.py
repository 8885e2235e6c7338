"""Greedy farthest-point selection: max-min and max-sum diversity, and k-centre.

Legend of shape suffixes: B batch, N tokens, C channels, K chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from foveate.ops._common import (
    batched,
    full_precision,
    require_count,
    require_shape,
    unit_rows,
    widen,
)

Metric = Literal["euclidean", "cosine"]

# Largest N whose similarity matrix may be stored, and most entries of it over a batch.
_MATRIX_TOKENS = 4096
_MATRIX_ENTRIES = 2**26
_TILE = 256


def max_min_diversity(x_BND: Tensor, k: int, *, mask: Tensor | None = None) -> Tensor:
    """Choose `k` tokens whose smallest pairwise cosine distance is large, greedily.

    The first token is the one farthest from its nearest neighbour; then always the token farthest
    from all chosen so far. The result's smallest distance is at least half of the best possible
    (for a true metric). O(N^2 C / 2) for the start, computed in tiles of one triangle, then one
    row per step: read from the similarity matrix when N <= 4096, otherwise O(N C) with O(N)
    memory. Computed in at least float32; the norm is clamped at 1e-12; no gradient.

    Args:
        x_BND: [N, C] or [B, N, C].
        k: tokens to choose, 0 <= k <= N.
        mask: [N] or [B, N] bool, True where a token may be chosen (and counts as a neighbour).

    Returns:
        [k] or [B, k] int64, in the order of selection; distinct, ties to the lowest index.

    Raises:
        ValueError: shapes do not fit or `k` exceeds the (valid) tokens.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 0.02]])
        >>> max_min_diversity(x, 2).tolist()
        [2, 0]

    Source: DivPrune, the max-min diversity problem (arXiv 2503.02175).
    """
    x, added = batched(x_BND, "x")
    mask_BN = _batched_mask(mask, x, added, k)
    if k == 0 or x.shape[0] == 0:
        return _shaped(x.new_zeros(x.shape[0], k, dtype=torch.long), added)
    B, N, _ = x.shape
    with torch.no_grad(), full_precision(x.device):
        unit_BNC = unit_rows(x)
        if N > _MATRIX_TOKENS:
            nearest_BN = _nearest_similarity(unit_BNC, mask_BN)
            row = _rows_on_demand(unit_BNC)
        elif B * N * N > _MATRIX_ENTRIES:
            orders = [
                max_min_diversity(x[b], k, mask=None if mask_BN is None else mask_BN[b])
                for b in range(B)
            ]
            return torch.stack(orders)
        else:
            similarity_BNN = _gram(unit_BNC)
            nearest_BN = _nearest_in_matrix(similarity_BNN, mask_BN)
            row = _rows_of_matrix(similarity_BNN)
        first_B = _masked(-nearest_BN, mask_BN).argmax(-1)
        return _shaped(_farthest(row, first_B, k, mask_BN), added)


def k_centre(
    x_BND: Tensor,
    k: int,
    *,
    first: int | Tensor | Literal["norm"] = 0,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,
) -> Tensor:
    """Choose `k` tokens that cover the rest: always the one farthest from those chosen.

    O(k N C) time and O(N) memory, one row of distances per step; no gradient.

    Args:
        x_BND: [N, C] or [B, N, C].
        k: tokens to choose, 0 <= k <= N.
        first: where to start: an index, a [B] tensor of indices, or "norm" for the token of largest
            L2 norm (the KKZ start).
        metric: "euclidean", or "cosine" for 1 - cosine.
        mask: [N] or [B, N] bool, True where a token may be chosen.

    Returns:
        [k] or [B, k] int64, in the order of selection; distinct, ties to the lowest index.

    Raises:
        ValueError: shapes do not fit, `k` exceeds the (valid) tokens, or `first` is out of range.

    Example:
        >>> k_centre(torch.tensor([[0.0], [1.0], [9.0], [5.0]]), 3).tolist()
        [0, 2, 3]

    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985).
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'metric must be "euclidean" or "cosine", got {metric!r}')
    x, added = batched(x_BND, "x")
    mask_BN = _batched_mask(mask, x, added, k)
    B = x.shape[0]
    if k == 0 or B == 0:
        return _shaped(x.new_zeros(B, k, dtype=torch.long), added)
    with torch.no_grad(), full_precision(x.device):
        first_B = _first(x, first, mask_BN)
        row = _rows_on_demand(unit_rows(x)) if metric == "cosine" else _squared_rows(widen(x))
        return _shaped(_farthest(row, first_B, k, mask_BN), added)


def max_sum_diversity(
    x_BND: Tensor, k: int, *, first: int | Tensor = 0, mask: Tensor | None = None
) -> Tensor:
    """Choose `k` tokens, each with the smallest sum of cosines to those chosen before.

    A sum forgives one close neighbour among many far ones, so tokens opposite to a crowd may be
    near-duplicates of each other; `k_centre` and `max_min_diversity` avoid them. One matrix-vector
    product per step, O(k N C) time and O(N) memory on top of the unit vectors. Computed in at least
    float32; the norm is clamped at 1e-12; no gradient.

    Args:
        x_BND: [N, C] or [B, N, C].
        k: tokens to choose, 0 <= k <= N.
        first: where to start: an index or a [B] tensor of indices.
        mask: [N] or [B, N] bool, True where a token may be chosen.

    Returns:
        [k] or [B, k] int64, in the order of selection; distinct, ties to the lowest index.

    Raises:
        ValueError: shapes do not fit, `k` exceeds the (valid) tokens, or `first` is out of range.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.1], [0.0, 1.0]])
        >>> max_sum_diversity(x, 3).tolist()
        [0, 2, 1]

    Source: ToDRE, greedy max-sum diversification (arXiv 2505.18757, version 2).
    """
    x, added = batched(x_BND, "x")
    mask_BN = _batched_mask(mask, x, added, k)
    B = x.shape[0]
    if k == 0 or B == 0:
        return _shaped(x.new_zeros(B, k, dtype=torch.long), added)
    with torch.no_grad(), full_precision(x.device):
        first_B = _first(x, first, mask_BN)
        cosines_to = _cosines_on_demand(unit_rows(x))
        order_BK = _farthest(lambda index_B: -cosines_to(index_B), first_B, k, mask_BN, torch.add)
        return _shaped(order_BK, added)


def _farthest(
    distances_to: Callable[[Tensor], Tensor],
    first_B: Tensor,
    k: int,
    mask_BN: Tensor | None,
    joined: Callable[..., Tensor] = torch.minimum,
) -> Tensor:
    """Greedy farthest point, by the smallest distance to those chosen or another running value.

    Chosen tokens are masked, so never repeat.
    """
    B = first_B.shape[0]
    order_BK = first_B.new_empty(B, k)
    order_BK[:, 0] = first_B
    closest_BN: Tensor | None = None
    latest_B = first_B
    for step in range(1, k):
        to_latest_BN = distances_to(latest_B)
        if closest_BN is None:
            closest_BN = _masked(to_latest_BN.clone(), mask_BN)
        else:
            joined(closest_BN, to_latest_BN, out=closest_BN)
        closest_BN.scatter_(1, latest_B[:, None], -torch.inf)
        latest_B = closest_BN.argmax(-1)
        order_BK[:, step] = latest_B
    return order_BK


def farthest_rows(distance_BNN: Tensor, k: int, first_B: Tensor) -> Tensor:
    """`k_centre` with distances at hand, [B, k] in the order of selection."""
    batch = torch.arange(distance_BNN.shape[0], device=distance_BNN.device)
    return _farthest(lambda index_B: distance_BNN[batch, index_B], first_B, k, None)


def _gram(unit_BNC: Tensor) -> Tensor:
    """Cosines of all pairs: upper triangle of tiles, mirrored, which halves the arithmetic."""
    B, N, _ = unit_BNC.shape
    if N <= _TILE:
        return unit_BNC @ unit_BNC.transpose(-1, -2)
    out_BNN = unit_BNC.new_empty(B, N, N)
    for i in range(0, N, _TILE):
        strip = unit_BNC[:, i : i + _TILE] @ unit_BNC[:, i:].transpose(-1, -2)
        out_BNN[:, i : i + _TILE, i:] = strip
        out_BNN[:, i + _TILE :, i : i + _TILE] = strip[..., _TILE:].transpose(-1, -2)
    return out_BNN


def _nearest_in_matrix(similarity_BNN: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Largest cosine of every token with another; writes -inf on the diagonal, which nobody reads.

    (A token's distance to itself is masked in the greedy loop, too.)
    """
    similarity_BNN.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    if mask_BN is None:
        return similarity_BNN.amax(-1)
    return similarity_BNN.masked_fill(~mask_BN[:, None], -torch.inf).amax(-1)


def _nearest_similarity(unit_BNC: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Largest cosine of every token with another, tile by tile over one triangle, O(N) memory."""
    B, N, _ = unit_BNC.shape
    nearest_BN = unit_BNC.new_full((B, N), -torch.inf)
    for i in range(0, N, _TILE):
        left = slice(i, min(i + _TILE, N))
        for j in range(i, N, 8 * _TILE):
            right = slice(j, min(j + 8 * _TILE, N))
            tile = unit_BNC[:, left] @ unit_BNC[:, right].transpose(-1, -2)
            if i == j:
                tile.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
            by_row, by_column = tile, tile
            if mask_BN is not None:
                by_row = tile.masked_fill(~mask_BN[:, None, right], -torch.inf)
                by_column = tile.masked_fill(~mask_BN[:, left, None], -torch.inf)
            nearest_BN[:, left] = torch.maximum(nearest_BN[:, left], by_row.amax(-1))
            nearest_BN[:, right] = torch.maximum(nearest_BN[:, right], by_column.amax(-2))
    return nearest_BN


def _rows_of_matrix(similarity_BNN: Tensor) -> Callable[[Tensor], Tensor]:
    batch = torch.arange(similarity_BNN.shape[0], device=similarity_BNN.device)

    def row(index_B: Tensor) -> Tensor:
        return 1 - similarity_BNN[batch, index_B]

    return row


def _rows_on_demand(unit_BNC: Tensor) -> Callable[[Tensor], Tensor]:
    cosines_to = _cosines_on_demand(unit_BNC)

    def row(index_B: Tensor) -> Tensor:
        return 1 - cosines_to(index_B)

    return row


def _cosines_on_demand(unit_BNC: Tensor) -> Callable[[Tensor], Tensor]:
    batch = torch.arange(unit_BNC.shape[0], device=unit_BNC.device)

    def row(index_B: Tensor) -> Tensor:
        return (unit_BNC @ unit_BNC[batch, index_B].unsqueeze(-1)).squeeze(-1)

    return row


def _squared_rows(x_BNC: Tensor) -> Callable[[Tensor], Tensor]:
    batch = torch.arange(x_BNC.shape[0], device=x_BNC.device)

    def row(index_B: Tensor) -> Tensor:
        # Direct differences are exactly zero for duplicates, which a matrix product is not.
        return (x_BNC - x_BNC[batch, index_B].unsqueeze(1)).square().sum(-1)

    return row


def _first(x: Tensor, first: int | Tensor | str, mask_BN: Tensor | None) -> Tensor:
    B, N, _ = x.shape
    if isinstance(first, str):
        if first != "norm":
            raise ValueError(
                f'first must be an index, a tensor of indices or "norm", got {first!r}'
            )
        return _masked(torch.linalg.vector_norm(widen(x), dim=-1), mask_BN).argmax(-1)
    if isinstance(first, Tensor):
        first_B = first.to(device=x.device, dtype=torch.long).expand(B)
        low, high = int(first_B.min()), int(first_B.max())
    else:
        low = high = first
        first_B = torch.full((B,), first, device=x.device)
    if low < 0 or high >= N:
        raise ValueError(f"first must be in 0 .. {N - 1}, got {low} .. {high}")
    return first_B


def _batched_mask(mask: Tensor | None, x: Tensor, added: bool, k: int) -> Tensor | None:
    B, N, _ = x.shape
    require_count(k, 0, N, "k", "tokens")
    if mask is None:
        return None
    require_shape(mask, (N,) if added else (B, N), "mask")
    mask = mask.reshape(B, N)
    if mask.numel():
        require_count(k, 0, int(mask.sum(-1).min()), "k", "fewest valid tokens of a sample")
    return mask


def _masked(value_BN: Tensor, mask_BN: Tensor | None) -> Tensor:
    return value_BN if mask_BN is None else value_BN.masked_fill(~mask_BN, -torch.inf)


def _shaped(order_BK: Tensor, added: bool) -> Tensor:
    return order_BK.squeeze(0) if added else order_BK
