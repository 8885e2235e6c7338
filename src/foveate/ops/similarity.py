"""Cosine similarity and distances between tokens.

Legend of shape suffixes: B batch, T frames, N and M tokens, D channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.ops._common import full_precision, unit_rows, widen


def cosine_similarity_matrix(a: Tensor, b: Tensor | None = None, eps: float = 1e-12) -> Tensor:
    """Compute the cosine of every row of `a` with every row of `b`.

    O(N M D). Computed in at least float32; rows whose norm is below `eps` have cosine 0.

    Args:
        a: [..., N, D].
        b: [..., M, D] with the same leading axes, or None for `a` itself.
        eps: smallest norm divided by.

    Returns:
        [..., N, M] in float32 (float64 for float64 input).

    Raises:
        ValueError: the channel counts differ.

    Example:
        >>> cosine_similarity_matrix(torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    b = a if b is None else b
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"a and b must be [..., N, D] and [..., M, D] with one D, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    with full_precision(a.device):
        unit_a = unit_rows(a, eps)
        unit_b = unit_a if b is a else unit_rows(b, eps)
        return unit_a @ unit_b.transpose(-1, -2)


def most_similar(x: Tensor, target: Tensor, eps: float = 1e-12) -> Tensor:
    """Find for every row of `x` the row of `target` with the largest cosine, ties to the first.

    O(N M D). Rows of `x` are not scaled to unit length, since their length does not change which
    target wins: that saves a copy of them, which takes longer than the product.

    Args:
        x: [..., N, D].
        target: [..., M, D] with the same leading axes, M >= 1.
        eps: smallest norm of a target divided by.

    Returns:
        [..., N] int64; 0 for rows of zeros.

    Raises:
        ValueError: there is no target or the channel counts differ.

    Example:
        >>> most_similar(torch.tensor([[9.0, 1.0], [0.1, 0.2]]), torch.eye(2)).tolist()
        [0, 1]
    """
    if x.dim() < 2 or target.dim() < 2 or x.shape[-1] != target.shape[-1] or not target.shape[-2]:
        raise ValueError(
            f"x and target must be [..., N, D] and [..., M, D] with one D and M >= 1, "
            f"got {tuple(x.shape)} and {tuple(target.shape)}"
        )
    with full_precision(x.device):
        similarity = widen(x) @ unit_rows(target, eps).transpose(-1, -2)
    return similarity.argmax(-1)


def adjacent_similarity(x_TND: Tensor, eps: float = 1e-8) -> Tensor:
    """Compute the cosine of every token with the token at the same place one frame later.

    O(T N D), one pass for the norms and one for the products.

    Args:
        x_TND: [..., T, N, D] with T >= 1 frames.
        eps: smallest norm divided by.

    Returns:
        [..., T - 1, N] in float32 (float64 for float64 input).

    Raises:
        ValueError: fewer than three axes.

    Example:
        >>> adjacent_similarity(torch.ones(3, 2, 4)).allclose(torch.ones(2, 2))
        True

    Source: HoliTom, step 1 of the temporal segmentation (arXiv 2505.21334).
    """
    if x_TND.dim() < 3:
        raise ValueError(f"x must be [..., T, N, D], got shape {tuple(x_TND.shape)}")
    with full_precision(x_TND.device):
        x = widen(x_TND)
        norm = torch.linalg.vector_norm(x, dim=-1).clamp_min(eps)
        before, after = x[..., :-1, :, :], x[..., 1:, :, :]
        return _row_products(before, after) / (norm[..., :-1, :] * norm[..., 1:, :])


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of matching rows, [..., N, D] twice to [..., N]."""
    if a.device.type != "cpu" or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return torch.linalg.vecdot(a, b)
    # Frame by frame through one buffer that stays in cache: the tensor form writes and reads back
    # all products, which takes three times as long at 32 x 196 x 3584.
    out = a.new_empty(a.shape[:-1])
    buffer = a.new_empty(a.shape[-2:])
    for frame in np.ndindex(*a.shape[:-2]):
        torch.sum(torch.mul(a[frame], b[frame], out=buffer), dim=-1, out=out[frame])
    return out


def pairwise_distance(a_BND: Tensor, b_BMD: Tensor, metric: str = "euclidean") -> Tensor:
    """Compute Euclidean or cosine distances between two sets of tokens.

    Euclidean distances come from a matrix product after both sets were moved by their common mean,
    which keeps the rounding error small for features far from the origin. O(N M D).

    Args:
        a_BND: [..., N, D].
        b_BMD: [..., M, D].
        metric: "euclidean" or "cosine" (1 - cosine, norms clamped at 1e-12).

    Returns:
        [..., N, M], at least 0 (cosine: within rounding), in float32 (float64 for float64 input).

    Raises:
        ValueError: unknown metric.

    Example:
        >>> pairwise_distance(torch.tensor([[0.0]]), torch.tensor([[3.0]])).tolist()
        [[3.0]]
    """
    if metric == "cosine":
        return 1 - cosine_similarity_matrix(a_BND, b_BMD)
    if metric != "euclidean":
        raise ValueError(f'metric must be "euclidean" or "cosine", got {metric!r}')
    with full_precision(a_BND.device):
        a, b = widen(a_BND), widen(b_BMD)
        centre = b.mean(-2, keepdim=True)
        a, b = a - centre, b - centre
        square = (a * a).sum(-1)[..., :, None] + (b * b).sum(-1)[..., None, :]
        return (square - 2 * (a @ b.transpose(-1, -2))).clamp_min_(0).sqrt_()
