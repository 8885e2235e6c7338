"""Finding near-duplicates among rows in an order: every row looks back at earlier ones.

Legend of shape suffixes: K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import require_dims, require_shape
from foveate.ops.select import ranks


def duplicate_links(similarity_KK: Tensor, threshold: float, *, most: int | None = None) -> Tensor:
    """For every row the earlier row that it resembles most, where that is above `threshold`.

    Only entries below the diagonal are read; ties go to the lowest index. O(K^2).

    Args:
        similarity_KK: of row i with row j, any real dtype; -inf rules a pair out.
        threshold: a pair must be above it.
        most: links to make at most, the most alike first; None: all.

    Returns:
        int64 [K]: the earlier row, -1 for a row that stays. The first row always stays.

    Raises:
        ValueError: the matrix is not square, or `most` is negative.

    Example:
        >>> alike = torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0.2, 0.8, 1]])
        >>> duplicate_links(alike, 0.75).tolist(), duplicate_links(alike, 0.75, most=1).tolist()
        ([-1, 0, 1], [-1, 0, -1])

    Source: the temporal merge in the released code of B-VLLM (arXiv 2412.09919); `most` is ours.
    """
    require_dims(similarity_KK, 2, "similarity", "[K, K]")
    K = similarity_KK.shape[0]
    require_shape(similarity_KK, (K, K), "similarity")
    if most is not None and most < 0:
        raise ValueError(f"most must be 0 or more links, got {most}")
    device = similarity_KK.device
    if K == 0:
        return torch.empty(0, dtype=torch.long, device=device)
    is_earlier_KK = torch.ones(K, K, dtype=torch.bool, device=device).tril(-1)
    best_K, earlier_K = similarity_KK.masked_fill(~is_earlier_KK, -torch.inf).max(1)
    linked_K = best_K > threshold
    if most is not None:
        linked_K &= ranks(best_K.masked_fill(~linked_K, -torch.inf)) < most
    return earlier_K.where(linked_K, -1)


def follow_links(link_K: Tensor) -> Tensor:
    """The row at the end of every chain of links; a row without a link is its own.

    O(K log K), by doubling.

    Args:
        link_K: int64 [K], an earlier row or -1, as `duplicate_links` gives.

    Returns:
        int64 [K].

    Raises:
        ValueError: a link does not point to an earlier row (CPU).

    Example:
        >>> follow_links(torch.tensor([-1, 0, 1, -1, 3])).tolist()
        [0, 0, 0, 3, 3]
    """
    require_dims(link_K, 1, "links", "[K]")
    order_K = torch.arange(len(link_K), device=link_K.device)
    if link_K.device.type == "cpu" and bool(((link_K >= order_K) | (link_K < -1)).any()):
        raise ValueError(f"every link must be -1 or an earlier row, got {link_K.tolist()}")
    root_K = link_K.where(link_K >= 0, order_K)
    for _ in range(max(len(link_K) - 1, 0).bit_length()):
        root_K = root_K[root_K]
    return root_K
