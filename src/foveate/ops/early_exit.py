"""Which tokens a classifier is sure of, and which of these stay to give context all the same.

Legend: B images, K classes, N tokens of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import require_shape
from foveate.ops.select import ranks


def presence_scores(mask_logits_BKN: Tensor, class_logits_BK2: Tensor) -> Tensor:
    """How much a token belongs to every class: P(class is present) times sigmoid of its mask.

    Args:
        mask_logits_BKN: one mask per class.
        class_logits_BK2: logits of (present, absent).

    Returns:
        [B, K, N] in [0, 1], of the masks' dtype.

    Example:
        >>> presence_scores(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)).tolist()
        [[[0.25, 0.25]]]

    Source: SegViT's attention-to-mask, as in Dynamic Token Pruning (arXiv 2308.01045).
    """
    return class_logits_BK2.softmax(-1)[..., :1] * mask_logits_BKN.sigmoid()


def ranks_in_class(value_BN: Tensor, class_BN: Tensor, among_BN: Tensor) -> Tensor:
    """Each token's place among those of its class, 0 for the largest value, ties to the lowest.

    O(N log N).

    Args:
        value_BN: what they are ranked by.
        class_BN: their classes, integers.
        among_BN: bool, which tokens are ranked; the places of the others mean nothing.

    Example:
        >>> value = torch.tensor([[0.5, 0.9, 0.8, 0.7]])
        >>> ranks_in_class(value, torch.tensor([[0, 0, 1, 0]]), torch.ones(1, 4).bool()).tolist()
        [[2, 0, 0, 1]]
    """
    class_BN = class_BN.masked_fill(~among_BN, -1)
    order_BN = ranks(value_BN, mask=among_BN).argsort(-1)
    sorted_BN, again_BN = class_BN.gather(1, order_BN).sort(dim=1, stable=True)
    first_BN = torch.searchsorted(sorted_BN, sorted_BN)
    place_BN = torch.arange(value_BN.shape[1], device=value_BN.device) - first_BN
    return torch.empty_like(place_BN).scatter_(1, order_BN.gather(1, again_BN), place_BN)


def sure_tokens(
    score_BKN: Tensor,
    threshold: float,
    keep_per_class: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Tokens whose best class scores above a threshold, except the surest few of every class.

    What counts for the exception are the tokens above the threshold. O(K N + N log N).

    Args:
        score_BKN: scores of every class.
        threshold: strict; 1 and more: no token.
        keep_per_class: so many of every class are left out of the result.
        mask: bool [B, N], which tokens there are; None: all.

    Returns:
        bool [B, N].

    Example:
        >>> score = torch.tensor([[[0.95, 0.99, 0.1, 0.93]]])
        >>> sure_tokens(score, 0.9, keep_per_class=1).tolist()
        [[True, False, False, True]]

    Source: Dynamic Token Pruning (arXiv 2308.01045), and its released code.
    """
    value_BN, class_BN = score_BKN.max(1)
    sure_BN = value_BN > threshold
    if mask is not None:
        require_shape(mask, tuple(sure_BN.shape), "mask")
        sure_BN = sure_BN & mask
    return sure_BN & (ranks_in_class(value_BN, class_BN, sure_BN) >= keep_per_class)


def least_sure_tokens(
    score_BKN: Tensor,
    keep_B: Tensor,
    keep_per_class: int,
    mask: Tensor | None = None,
) -> Tensor:
    """So many tokens of every image: the surest few of every class, then the least sure ones.

    `sure_tokens` with a threshold of each image's own that leaves `keep_B`; where that is less than
    the classes' own, those among them go first that are surest. O(K N + N log N).

    Args:
        score_BKN: scores of every class.
        keep_B: how many, integers; at most as many as there are.
        keep_per_class: so many of every class come first.
        mask: bool [B, N], which tokens there are; None: all.

    Returns:
        bool [B, N], the tokens that stay.

    Example:
        >>> score = torch.tensor([[[0.95, 0.99, 0.1, 0.93]]])
        >>> least_sure_tokens(score, torch.tensor([2]), keep_per_class=1).tolist()
        [[False, True, True, False]]
    """
    value_BN, class_BN = score_BKN.max(1)
    if mask is None:
        mask = torch.ones_like(value_BN, dtype=torch.bool)
    require_shape(mask, tuple(value_BN.shape), "mask")
    first_BN = ranks_in_class(value_BN, class_BN, mask) < keep_per_class
    place_BN = ranks(2.0 * first_BN - value_BN.float(), mask=mask)
    return (place_BN < keep_B[:, None]) & mask
