"""Numbers that stand apart from their neighbours.

Legend of shape suffixes: B batch, N numbers of a row, k neighbours, c candidates for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import require_dims, require_shape


def local_outlier_factor(x_BN: Tensor, k: int, *, mask: Tensor | None = None) -> Tensor:
    """Compare how dense numbers lie around each number with how dense around its neighbours.

    Values near 1 are inliers; far above 1, a number lies alone beside denser ones. The number
    itself is no neighbour of its own. On a line all neighbours lie within k places of the sorted
    order, so this takes O(N log N + N k log k) per row instead of O(N^2).

    Args:
        x_BN: [B, N], any real dtype.
        k: neighbours, at least 1; rows with fewer others use those there are.
        mask: [B, N] bool, which numbers take part; None: all.

    Returns:
        [B, N] float64; 1 for numbers that do not take part or are alone.

    Raises:
        ValueError: shapes do not fit, or k < 1.

    Example:
        >>> x = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 9.0]])
        >>> (local_outlier_factor(x, 3) > 1.5).tolist()
        [[False, False, False, False, False, True]]

    Source: M. Breunig et al., LOF: Identifying Density-Based Local Outliers, SIGMOD 2000,
    definitions 5 to 7; 1e-10 is added to the mean reachability, as is common.
    """
    require_dims(x_BN, 2, "x", "[B, N]")
    if k < 1:
        raise ValueError(f"k must be at least 1 neighbour, got {k}")
    if mask is not None:
        require_shape(mask, tuple(x_BN.shape), "mask")
    N, device = x_BN.shape[1], x_BN.device
    if N < 2:
        return torch.ones(x_BN.shape, dtype=torch.float64, device=device)
    x_BN = x_BN.double()
    num_B1 = x_BN.new_full((len(x_BN), 1), N)
    if mask is not None:
        # Those that do not take part go to the end of the order, infinitely far away.
        x_BN, num_B1 = x_BN.where(mask, torch.inf), mask.sum(1, keepdim=True)
    k = min(k, N - 1)
    k_B1 = (num_B1.long() - 1).clamp(1, k)
    x_BN, order_BN = x_BN.sort(dim=1, stable=True)

    offset_c = torch.arange(-k, k + 1, device=device)
    place_Nc = torch.arange(N, device=device)[:, None] + offset_c[offset_c != 0]
    inside_Nc = (place_Nc >= 0) & (place_Nc < N)
    place_Nc = place_Nc.clamp(0, N - 1)
    distance_BNc = (x_BN[:, place_Nc] - x_BN[..., None]).abs()
    distance_BNc = distance_BNc.nan_to_num(torch.inf, torch.inf).where(inside_Nc, torch.inf)
    distance_BNk, near_BNk = (part[..., :k] for part in distance_BNc.sort(dim=2, stable=True))
    place_BNk = place_Nc.expand(len(x_BN), -1, -1).gather(2, near_BNk)

    used_B1k = torch.arange(k, device=device) < k_B1[..., None]
    last_BN1 = (k_B1 - 1)[..., None].expand(-1, N, -1)
    radius_BN = distance_BNk.gather(2, last_BN1)[..., 0]
    reach_BNk = torch.maximum(distance_BNk, _at(radius_BN, place_BNk))
    density_BN = 1 / (_mean(reach_BNk, used_B1k) + 1e-10)
    factor_BN = _mean(_at(density_BN, place_BNk), used_B1k) / density_BN
    if mask is not None:
        sorted_mask_BN = mask.gather(1, order_BN) & (num_B1 > 1)
        factor_BN = factor_BN.where(sorted_mask_BN, 1.0)
    return torch.empty_like(factor_BN).scatter_(1, order_BN, factor_BN)


def _at(value_BN: Tensor, place_BNk: Tensor) -> Tensor:
    return value_BN.gather(1, place_BNk.flatten(1)).view(place_BNk.shape)


def _mean(value_BNk: Tensor, used_B1k: Tensor) -> Tensor:
    return value_BNk.where(used_B1k, 0.0).sum(2) / used_B1k.sum(2)
