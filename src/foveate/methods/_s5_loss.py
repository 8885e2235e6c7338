"""The losses of S5: the ratio of kept tokens, and long-short masked contrastive learning.

Legend: B videos, L tokens, D channels.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, normalize


def ratio_loss(mask_BL: torch.Tensor, ratio: float) -> torch.Tensor:
    """Squared distance of the kept share from the wanted one, over the whole batch.

    Args:
        mask_BL: 0 or 1 with gradients, as `foveate.ops.gumbel_keep` gives it.
        ratio: share of tokens to keep, in (0, 1].

    Raises:
        ValueError: the ratio is out of range.

    Example:
        >>> ratio_loss(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 0.5).item()
        0.0625

    Source: S5 (arXiv 2303.14526); the squared form is ours.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}.")
    return (ratio - mask_BL.mean()).square()


def contrastive_loss(
    short_BD: torch.Tensor, long_BD: torch.Tensor, temperature: float = 0.2
) -> torch.Tensor:
    """Symmetric InfoNCE: a short clip finds the long clip of its own video, and the reverse.

    Args:
        short_BD: pooled embeddings of the short clips, from the online network.
        long_BD: of the long clips, from the momentum network; no gradient reaches them.
        temperature: of the softmax over the batch.

    Raises:
        ValueError: shapes differ or the temperature is not above 0.

    Example:
        >>> same = torch.eye(4)
        >>> contrastive_loss(same, same).item() < contrastive_loss(same, same.flip(0)).item()
        True

    Source: LSMCL in S5 (arXiv 2303.14526); the form of the loss is ours.
    """
    if short_BD.shape != long_BD.shape or short_BD.dim() != 2:
        raise ValueError(
            "contrastive_loss takes two [B, D] of one shape, got "
            f"{tuple(short_BD.shape)} and {tuple(long_BD.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    unit_BD, other_BD = normalize(short_BD, dim=-1), normalize(long_BD.detach(), dim=-1)
    logits_BB = unit_BD @ other_BD.T / temperature
    own_B = torch.arange(len(short_BD), device=short_BD.device)
    return (cross_entropy(logits_BB, own_B) + cross_entropy(logits_BB.T, own_B)) / 2
