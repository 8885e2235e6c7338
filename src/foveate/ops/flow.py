"""Information flow through a transformer: what a token passes on, and how fast to cut by it.

Legend of shape suffixes: B batch, H heads, N tokens, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import require_shape, widen


def flow_score(attention_BN: Tensor, semantic_BN: Tensor | None, v_BHNd: Tensor) -> Tensor:
    """How much the tokens pass on: who looks at them, times how large their values are.

    `score = (attention / sum + semantic / sum) |v|_1` with v the mean value over heads; without
    `semantic`, `score = attention |v|_1`. O(B H N d).

    Args:
        attention_BN: attention that one query pays to the tokens.
        semantic_BN: the same with values in place of queries and keys, or None.
        v_BHNd: values of the tokens.

    Returns:
        float32 [B, N]. Where all attention is zero (padding) the score is zero.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> v = torch.tensor([[[[1.0, -1.0], [2.0, 2.0]]]])
        >>> flow_score(torch.tensor([[0.2, 0.2]]), torch.tensor([[0.3, 0.1]]), v).tolist()
        [[2.5, 3.0]]

    Source: FlowCut, section 3 (arXiv 2505.19536).
    """
    require_shape(attention_BN, (v_BHNd.shape[0], v_BHNd.shape[2]), "attention")
    magnitude_BN = widen(v_BHNd).mean(1).abs().sum(-1)
    if semantic_BN is None:
        return widen(attention_BN) * magnitude_BN
    require_shape(semantic_BN, tuple(attention_BN.shape), "semantic")
    return (_shares(attention_BN) + _shares(semantic_BN)) * magnitude_BN


def concentration(p_BN: Tensor, num_B: Tensor, eps: float = 0.0) -> Tensor:
    """How far distributions are from uniform: `1 - (H / ln n)^2`, in [0, 1].

    Args:
        p_BN: probabilities; padding holds zeros, and 0 ln 0 = 0.
        num_B: n, the tokens of each row that exist.
        eps: added inside the logarithm.

    Returns:
        float32 [B]: 0 for a uniform row, 1 for a one-hot one; 0 where n is 1.

    Example:
        >>> p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
        >>> concentration(p, torch.tensor([4, 4])).tolist()
        [0.0, 1.0]
    """
    p_BN = widen(p_BN)
    if eps:
        entropy_B = -(p_BN * (p_BN + eps).log()).sum(-1)
    else:
        entropy_B = -torch.special.xlogy(p_BN, p_BN).sum(-1)
    share_B = entropy_B / num_B.clamp_min(2).to(p_BN.dtype).log()
    return (1 - share_B**2).where(num_B > 1, 0.0)


def cut_towards(num_B: Tensor, target_B: Tensor, remaining: int, concentration_B: Tensor) -> Tensor:
    """How many tokens to drop now, `remaining` blocks before all above the target must be gone.

    `round((n - target) / sqrt(remaining) * concentration)`; all of them when none remains.

    Args:
        num_B: n, tokens that each row has, int64.
        target_B: tokens that it has in the end, int64.
        remaining: blocks after this one in which the row still may be cut.
        concentration_B: see `concentration`.

    Returns:
        int64 [B], at least 0.

    Raises:
        ValueError: `remaining` is negative.

    Example:
        >>> num, target = torch.tensor([80, 20]), torch.tensor([20, 20])
        >>> cut_towards(num, target, 4, torch.tensor([0.5, 0.5])).tolist()
        [15, 0]
        >>> cut_towards(num, target, 0, torch.tensor([0.5, 0.5])).tolist()
        [60, 0]
    """
    if remaining < 0:
        raise ValueError(f"remaining must be at least 0 blocks, got {remaining}.")
    excess_B = (num_B - target_B).clamp_min(0)
    if remaining == 0:
        return excess_B
    # Half a token goes to the even number, as in the released code.
    return (excess_B / remaining**0.5 * concentration_B).round().long().clamp_min(0)


def _shares(x_BN: Tensor) -> Tensor:
    x_BN = widen(x_BN)
    return x_BN / x_BN.sum(-1, keepdim=True).clamp_min(torch.finfo(x_BN.dtype).tiny)
