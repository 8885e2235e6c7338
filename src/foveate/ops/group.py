"""Sums and averages of tokens by group, and the weights of repeated halving.

Legend of shape suffixes: B batch, N tokens, D channels, G groups, R sources, K targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import compute_dtype, full_precision, require_dims, require_shape

# Most entries of the one-hot matrix that makes sums deterministic on accelerators.
_ONE_HOT_ENTRIES = 2**28


def scatter_sum(x_BND: Tensor, assignment_BN: Tensor, num_groups: int) -> Tensor:
    """Add up the tokens of every group, in at least float32.

    O(N D) on a CPU. Elsewhere the sum is a product with a one-hot matrix (O(N G D)), because
    atomic additions would make the result differ from run to run. Gradients flow to `x`.

    Args:
        x_BND: [B, N, D].
        assignment_BN: [B, N] int64 group of every token, in -1 .. num_groups - 1; -1 joins none.
        num_groups: G.

    Returns:
        [B, G, D] in float32 (float64 for float64 input); empty groups are zero.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> scatter_sum(torch.ones(1, 3, 2), torch.tensor([[0, 0, -1]]), 2).tolist()
        [[[2.0, 2.0], [0.0, 0.0]]]
    """
    require_dims(x_BND, 3, "x", "[B, N, D]")
    B, N, D = x_BND.shape
    require_shape(assignment_BN, (B, N), "assignment")
    x = x_BND.to(compute_dtype(x_BND.dtype))
    if _as_product(x, num_groups):
        return _one_hot_sum(x, assignment_BN, num_groups)
    # One spare group per sample takes what belongs to none.
    slot_BN = torch.where(assignment_BN < 0, num_groups, assignment_BN)
    total_BGD = add_rows(x.new_zeros(B, num_groups + 1, D), x, slot_BN)
    return total_BGD[:, :num_groups]


def add_to_groups(base_BGD: Tensor, x_BND: Tensor, assignment_BN: Tensor) -> Tensor:
    """Add tokens to the rows of `base` in place where that is deterministic; groups are >= 0."""
    if _as_product(x_BND, base_BGD.shape[1]):
        return base_BGD + _one_hot_sum(x_BND, assignment_BN, base_BGD.shape[1])
    return add_rows(base_BGD, x_BND, assignment_BN)


def add_rows(base_BGD: Tensor, x_BND: Tensor, slot_BN: Tensor) -> Tensor:
    """Add each token to row `slot` of its sample, in place."""
    B, G, D = base_BGD.shape
    flat_X = flat_rows(slot_BN, G)
    return base_BGD.view(B * G, D).index_add_(0, flat_X, x_BND.reshape(-1, D)).view(B, G, D)


def flat_rows(index_BK: Tensor, num_tokens: int) -> Tensor:
    """Turn positions per sample into row numbers of the flattened [B * N, D] tensor."""
    offset_B1 = torch.arange(index_BK.shape[0], device=index_BK.device)[:, None] * num_tokens
    return (index_BK + offset_B1).flatten()


def _as_product(x_BND: Tensor, num_groups: int) -> bool:
    entries = x_BND.shape[0] * x_BND.shape[1] * num_groups
    return x_BND.device.type != "cpu" and entries <= _ONE_HOT_ENTRIES


def _one_hot_sum(x_BND: Tensor, assignment_BN: Tensor, num_groups: int) -> Tensor:
    group_G1 = torch.arange(num_groups, device=x_BND.device)[:, None]
    with full_precision(x_BND.device):
        return (assignment_BN[:, None] == group_G1).to(x_BND.dtype) @ x_BND


def scatter_mean(
    x_BND: Tensor,
    assignment_BN: Tensor,
    num_groups: int,
    weights: Tensor | None = None,
) -> Tensor:
    """Average the tokens of every group, weighted by token size.

    O(N D); sums in at least float32. Gradients flow to `x` and `weights`.

    Args:
        x_BND: [B, N, D].
        assignment_BN: [B, N] int64 group of every token, in -1 .. num_groups - 1; -1 joins none.
        num_groups: G.
        weights: [B, N] or None for ones.

    Returns:
        [B, G, D] in the dtype of `x`; groups without weight are zero.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> scatter_mean(x, torch.tensor([[0, 0, 1]]), 2).tolist()
        [[[2.0], [8.0]]]
    """
    require_dims(x_BND, 3, "x", "[B, N, D]")
    B, N, _ = x_BND.shape
    wide = compute_dtype(x_BND.dtype)
    x = x_BND.to(wide)
    if weights is None:
        weights_BN = x.new_ones(B, N)
    else:
        require_shape(weights, (B, N), "weights")
        weights_BN = weights.to(wide)
        x = x * weights_BN[..., None]
    total_BGD = scatter_sum(x, assignment_BN, num_groups)
    mass_BG1 = scatter_sum(weights_BN[..., None], assignment_BN, num_groups)
    # In place: this tensor is ours, and at video sizes a fresh one costs more than the division.
    return total_BGD.div_(mass_BG1.masked_fill(mass_BG1 == 0, 1.0)).to(x_BND.dtype)


def halving_weights(target_BR: Tensor, num_targets: int) -> tuple[Tensor, Tensor]:
    """Weights that equal folding sources one after the other, `h <- (h + source) / 2`.

    With q sources, the j-th (counting from 1, in the order given) weighs `2^-(q - j + 1)` and the
    target itself `2^-q`; so `target * own + scatter_sum(source * weight)` needs no loop.
    O(R log R).

    Args:
        target_BR: [B, R] int64 target of every source, in the order of folding.
        num_targets: K.

    Returns:
        Source weights [B, R] and own weights of the targets [B, K], float32; per target they
        add up to 1.

    Raises:
        ValueError: `target_BR` is not [B, R].

    Example:
        >>> source, own = halving_weights(torch.tensor([[0, 0, 1]]), 3)
        >>> source.tolist(), own.tolist()
        ([[0.25, 0.5, 0.5]], [[0.25, 0.5, 1.0]])

    Source: HoliTom's inner merge (arXiv 2505.21334; the official code, not the paper's formula).
    """
    require_dims(target_BR, 2, "target", "[B, R]")
    B, R = target_BR.shape
    sorted_BR, order_BR = torch.sort(target_BR, dim=-1, stable=True)
    bounds_BK = torch.arange(num_targets, device=target_BR.device).expand(B, num_targets)
    count_BK = torch.searchsorted(sorted_BR, bounds_BK.contiguous(), right=True)
    end_BR = count_BK.gather(1, sorted_BR)
    age_BR = end_BR - torch.arange(R, device=target_BR.device)
    age_BR = torch.empty_like(age_BR).scatter_(1, order_BR, age_BR)
    count_BK = count_BK.diff(dim=-1, prepend=count_BK.new_zeros(B, 1))
    return torch.exp2(-age_BR.float()), torch.exp2(-count_BK.float())
