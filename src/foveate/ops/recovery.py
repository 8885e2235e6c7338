"""Bringing a shortened sequence back to full length: by attention, or by interpolation in time.

Legend of shape suffixes: B batch, K tokens left, N places of the full sequence, C channels, H
heads, d channels of a head, `...` any axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from foveate.ops._common import require_dims, require_shape, widen


def cross_attention(
    query_BNC: Tensor, x_BKC: Tensor, weights: Mapping[str, Tensor], num_heads: int
) -> Tensor:
    """Multi-head attention from queries to tokens, [B, N, C]. O(N C^2 + K C^2 + N K C).

    Args:
        query_BNC: queries, before their projection.
        x_BKC: tokens that give keys and values.
        weights: "linear_q", "linear_k", "linear_v" and "proj", each with ".weight" [C, C] and
            perhaps ".bias" [C].
        num_heads: H; divides C.

    Raises:
        ValueError: shapes do not fit or a weight is missing.

    Example:
        >>> names = ("linear_q", "linear_k", "linear_v", "proj")
        >>> weights = {f"{name}.weight": torch.eye(4) for name in names}
        >>> cross_attention(torch.zeros(1, 3, 4), torch.ones(1, 2, 4), weights, 2).tolist()[0][0]
        [1.0, 1.0, 1.0, 1.0]
    """
    require_dims(query_BNC, 3, "query", "[B, N, C]")
    require_dims(x_BKC, 3, "x", "[B, K, C]")
    width = query_BNC.shape[2]
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"the {width} channels do not divide into {num_heads} heads")

    def project(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in weights:
            raise ValueError(f"weights lacks {name}.weight; it has {', '.join(sorted(weights))}")
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def heads(x: Tensor, name: str) -> Tensor:
        return project(x, name).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    out_BHNd = scaled_dot_product_attention(
        heads(query_BNC, "linear_q"), heads(x_BKC, "linear_k"), heads(x_BKC, "linear_v")
    )
    return project(out_BHNd.transpose(1, 2).flatten(2), "proj")


def interpolate_places(x_BK: Tensor, place_BK: Tensor, length: int) -> Tensor:
    """Full length by linear interpolation between the nearest kept places before and after.

    Kept places come out exactly as they are; before the first and behind the last one its value is
    repeated. O(N) per channel.

    Args:
        x_BK: [B, K, ...].
        place_BK: int [B, K], strictly ascending places in 0 .. length - 1.
        length: N.

    Returns:
        [B, N, ...].

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x = torch.tensor([[[0.0], [4.0]]])
        >>> interpolate_places(x, torch.tensor([[1, 3]]), 5).flatten().tolist()
        [0.0, 0.0, 2.0, 4.0, 4.0]
    """
    require_shape(place_BK, tuple(x_BK.shape[:2]), "place")
    if x_BK.shape[1] == 0:
        raise ValueError("nothing to interpolate between: no token is left")
    B, K = place_BK.shape
    time_BN = torch.arange(length, device=place_BK.device).expand(B, length).contiguous()
    after_BN = torch.searchsorted(place_BK.contiguous(), time_BN).clamp_max(K - 1)
    before_BN = (torch.searchsorted(place_BK.contiguous(), time_BN, right=True) - 1).clamp_min(0)
    start_BN, end_BN = place_BK.gather(1, before_BN), place_BK.gather(1, after_BN)
    wide = widen(x_BK[:0]).dtype
    share_BN = (time_BN - start_BN).to(wide) / (end_BN - start_BN).clamp_min(1).to(wide)
    share_BN = share_BN.clamp(0, 1)
    batch_B1 = torch.arange(B, device=place_BK.device)[:, None]
    share = share_BN.reshape(B, length, *(1,) * (x_BK.dim() - 2))
    return torch.lerp(
        x_BK[batch_B1, before_BN].to(wide), x_BK[batch_B1, after_BN].to(wide), share
    ).to(x_BK.dtype)
