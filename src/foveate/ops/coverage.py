"""Greedy facility location: tokens that together resemble all others.

Legend of shape suffixes: N tokens, K chosen tokens, R tokens that a choice covers better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import compute_dtype, require_count, require_dims, require_shape


def facility_location(similarity_NN: Tensor, k: int, *, bonus_N: Tensor | None = None) -> Tensor:
    """Choose `k` tokens that cover all tokens well and are worth something themselves, greedily.

    Maximises `sum_x max_{y chosen} similarity(y, x) + sum_{y chosen} bonus(y)`, to within 1 - 1/e
    of the best possible where bonuses are not negative. After every choice only the gains from
    tokens that it covers better than before are corrected: O(N^2) for the first choice and
    O(N R) for each next, R soon being small; the naive form is O(k N^2). Gains are summed in
    float64; no gradient. One value per choice is read back from the device.

    Args:
        similarity_NN: [N, N], symmetric, not negative.
        k: tokens to choose, 0 <= k <= N.
        bonus_N: [N], what a token is worth by itself; None for nothing.

    Returns:
        [k] int64, in the order of selection; distinct; of tokens that are equal in row
        and bonus the lowest index.

    Raises:
        ValueError: shapes do not fit or `k` is out of range.

    Example:
        >>> similarity_NN = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> facility_location(similarity_NN, 2).tolist()
        [0, 2]
        >>> facility_location(similarity_NN, 2, bonus_N=torch.tensor([0.0, 5.0, 0.0])).tolist()
        [1, 2]

    Source: Nemhauser, Wolsey and Fisher, "An analysis of approximations for maximizing submodular
    set functions" (1978); with a bonus for text, CATP (arXiv 2508.07871).
    """
    require_dims(similarity_NN, 2, "similarity", "[N, N]")
    N = similarity_NN.shape[0]
    require_shape(similarity_NN, (N, N), "similarity")
    require_count(k, 0, N, "k", "tokens")
    if bonus_N is not None:
        require_shape(bonus_N, (N,), "bonus")
    with torch.no_grad():
        similarity_NN = similarity_NN.to(compute_dtype(similarity_NN.dtype))
        cover_N = similarity_NN.new_zeros(N)
        gain_N = similarity_NN.sum(1, dtype=torch.float64)
        if bonus_N is not None:
            gain_N += bonus_N
        order_K = torch.empty(k, dtype=torch.long, device=similarity_NN.device)
        for step in range(k):
            best = gain_N.argmax()
            order_K[step] = best
            gain_N[best] = -torch.inf
            row_N = similarity_NN[best]
            better_R = (row_N > cover_N).nonzero()[:, 0]
            old_R1, new_R1 = cover_N[better_R, None], row_N[better_R, None]
            # What the others could have added to these tokens, and now no longer can.
            lost_RN = torch.minimum(similarity_NN[better_R], new_R1).sub_(old_R1).clamp_(min=0)
            gain_N -= lost_RN.sum(0, dtype=torch.float64)
            cover_N = torch.maximum(cover_N, row_N)
        return order_K
