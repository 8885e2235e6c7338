"""Choosing token positions: by score, by an even grid or at random.

Every index tensor is int64 on the scores' device; ties go to the lowest index.

Legend of shape suffixes: B batch, N tokens, K chosen tokens, `...` any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops._common import require_count, require_dims, require_shape
from foveate.ops.diversity import max_min_diversity

__all__ = [
    "max_min_diversity",
    "random_indices",
    "ranks",
    "top_k",
    "top_k_ragged",
    "top_k_ranked",
    "uniform_indices",
]


def top_k(scores: Tensor, k: int, *, mask: Tensor | None = None) -> Tensor:
    """Return the positions of the `k` largest scores in ascending order, ties to the lowest.

    O(N log N). A masked position is never chosen, even when valid scores are -inf. With a mask
    (and for the NaN check, made on CPU tensors only) one value is read back from the device.
    On other devices NaN ranks last.

    Args:
        scores: [..., N], any real dtype.
        k: number to choose, 0 <= k <= N.
        mask: [..., N] bool, True where a position may be chosen.

    Returns:
        [..., k] int64.

    Raises:
        ValueError: `k` exceeds what may be chosen, or a score is NaN (CPU).

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist()
        [1, 2]
    """
    return top_k_ranked(scores, k, mask=mask).sort(-1).values


def top_k_ranked(scores: Tensor, k: int, *, mask: Tensor | None = None) -> Tensor:
    """Return the positions of the `k` largest scores, best first; otherwise as `top_k`.

    Args:
        scores: [..., N], any real dtype.
        k: number to choose, 0 <= k <= N.
        mask: [..., N] bool, True where a position may be chosen.

    Returns:
        [..., k] int64.

    Raises:
        ValueError: `k` exceeds what may be chosen, or a score is NaN (CPU).

    Example:
        >>> top_k_ranked(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist()
        [1, 3, 2]
    """
    if scores.dim() == 0:
        raise ValueError("scores must be [..., N], got a scalar")
    require_count(k, 0, scores.shape[-1], "k", f"tokens in scores of {tuple(scores.shape)}")
    if mask is not None:
        require_shape(mask, tuple(scores.shape), "mask")
        if mask.numel():
            require_count(k, 0, int(mask.sum(-1).min()), "k", "fewest valid tokens of a row")
    return _ranking(scores, mask)[..., :k]


def ranks(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return each position's place when its row is sorted by falling score, ties to the lowest.

    O(N log N).

    Args:
        scores: [..., N], any real dtype.
        mask: [..., N] bool; masked positions come last.

    Returns:
        [..., N] int64: 0 for the largest score.

    Raises:
        ValueError: a score is NaN (CPU).

    Example:
        >>> ranks(torch.tensor([1.0, 3.0, 2.0, 3.0])).tolist()
        [3, 0, 2, 1]
    """
    if mask is not None:
        require_shape(mask, tuple(scores.shape), "mask")
    return _ranking(scores, mask).argsort(-1)


def top_k_ragged(
    scores_BN: Tensor, k_B: Tensor | Sequence[int], *, mask: Tensor | None = None
) -> Tensor:
    """Choose a different number of positions in every row; otherwise as `top_k`.

    Args:
        scores_BN: [B, N], any real dtype.
        k_B: B integers, 0 <= k_b <= valid tokens of row b.
        mask: [B, N] bool, True where a position may be chosen.

    Returns:
        [B, max(k_B)] int64: ascending, then -1 to fill the row.

    Raises:
        ValueError: shapes do not fit or a `k_b` exceeds what may be chosen.

    Example:
        >>> top_k_ragged(torch.tensor([[1.0, 5.0, 4.0], [7.0, 6.0, 8.0]]), [2, 1]).tolist()
        [[1, 2], [2, -1]]
    """
    require_dims(scores_BN, 2, "scores", "[B, N]")
    B, N = scores_BN.shape
    device = scores_BN.device
    k_BT = torch.as_tensor(k_B, dtype=torch.long)
    require_shape(k_BT, (B,), "k")
    available = torch.full((B,), N) if mask is None else mask.sum(-1).cpu()
    if mask is not None:
        require_shape(mask, (B, N), "mask")
    counts = k_BT.cpu()
    if bool(((counts < 0) | (counts > available)).any()):
        raise ValueError(
            f"every k must be between 0 and the valid tokens of its row {available.tolist()}, "
            f"got {counts.tolist()}"
        )
    widest = int(counts.max()) if B else 0
    order_BK = _ranking(scores_BN, mask)[:, :widest]
    beyond_BK = torch.arange(widest, device=device) >= k_BT.to(device)[:, None]
    index_BK = order_BK.masked_fill(beyond_BK, N).sort(-1).values
    return index_BK.masked_fill(index_BK == N, -1)


def uniform_indices(
    num_source: int,
    k: int,
    device: torch.device | str | None = None,
    *,
    endpoints: bool = True,
) -> Tensor:
    """Pick `k` of `num_source` positions evenly, distinct and ascending.

    Integer arithmetic, so no position moves by a rounding error.

    Args:
        num_source: how many positions there are (frames, tokens).
        k: how many to pick, 0 <= k <= num_source.
        device: of the result.
        endpoints: True includes the first and the last position (`floor(i (n - 1) / (k - 1))`, the
            usual `linspace` cast to integers; k = 1 gives position 0). False takes the middle of
            `k` equal bins.

    Returns:
        [k] int64.

    Raises:
        ValueError: `k` is negative or exceeds `num_source`.

    Example:
        >>> uniform_indices(9, 3).tolist(), uniform_indices(9, 3, endpoints=False).tolist()
        ([0, 4, 8], [1, 4, 7])
    """
    require_count(k, 0, num_source, "k", "source positions")
    step = torch.arange(k, device=device)
    if not endpoints:
        return (2 * step + 1) * num_source // (2 * max(k, 1))
    return step * (num_source - 1) // max(k - 1, 1)


def random_indices(
    batch: int,
    num_source: int,
    k: int,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw `k` distinct positions of `num_source` per row, ascending.

    Args:
        batch: number of independent rows.
        num_source: how many positions there are.
        k: how many to draw, 0 <= k <= num_source.
        generator: source of randomness; its device is where the draw happens.
        seed: makes a CPU generator, so that the draw is the same on every device.
        device: of the result.

    Returns:
        [batch, k] int64.

    Raises:
        ValueError: `k` out of range, or both `generator` and `seed` given.

    Example:
        >>> random_indices(2, 10, 3, seed=0).shape
        torch.Size([2, 3])
    """
    require_count(k, 0, num_source, "k", "source positions")
    if generator is not None and seed is not None:
        raise ValueError("give either generator or seed, not both")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    where = generator.device if generator is not None else torch.device("cpu")
    draw_BN = torch.rand(batch, num_source, generator=generator, device=where)
    return draw_BN.argsort(-1)[:, :k].sort(-1).values.to(device or where)


def _ranking(scores: Tensor, mask: Tensor | None) -> Tensor:
    """All positions, best first: valid before masked, larger first, lower index on ties."""
    if scores.is_floating_point():
        nan = scores.isnan()
        if mask is not None:
            nan = nan & mask
        if scores.device.type == "cpu" and bool(nan.any()):
            raise ValueError(f"scores contain {int(nan.sum())} NaN values; they cannot be ranked")
        scores = scores.masked_fill(nan, -torch.inf)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    if mask is None:
        return order
    # A second stable sort, because -inf is a legal score: masking by value could not tell a valid
    # -inf from a masked position.
    hidden = (~mask).gather(-1, order).to(torch.uint8)
    return order.gather(-1, torch.sort(hidden, dim=-1, stable=True).indices)
