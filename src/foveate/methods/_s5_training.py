"""How S5 is trained: its loss, and the random masks that it is compared with.

Legend: B videos, L tokens of a video.
"""

from __future__ import annotations

import math

import torch

from foveate import ops
from foveate.methods._s5_loss import ratio_loss


def selective_loss(
    task_loss: torch.Tensor, mask_BL: torch.Tensor, ratio: float, weight: float = 2.0
) -> torch.Tensor:
    """The loss of a task and, weighted, how far the mask is from the share of tokens to keep.

    Args:
        task_loss: of what the model makes of the masked tokens, one number.
        mask_BL: from `foveate.ops.gumbel_keep`.
        ratio: share of tokens to keep, in (0, 1].
        weight: lambda; 0 leaves the loss of the task.

    Raises:
        ValueError: the ratio is out of range or the weight is negative.

    Example:
        >>> mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> selective_loss(torch.tensor(1.0), mask, 0.5, weight=2.0).item()
        1.125

    Source: S5 (arXiv 2303.14526); squared form and weight are ours.
    """
    if weight < 0:
        raise ValueError(f"weight must not be negative, got {weight}.")
    return task_loss + weight * ratio_loss(mask_BL, ratio)


def random_mask(noise_BL: torch.Tensor, ratio: float) -> torch.Tensor:
    """A mask that keeps the tokens with the largest noise, as many in every video, [B, L] of 0, 1.

    Args:
        noise_BL: independent draws.
        ratio: share of tokens to keep, in (0, 1]; a part of a token is rounded up.

    Raises:
        ValueError: the ratio is out of range.

    Example:
        >>> random_mask(torch.tensor([[0.1, 0.9, 0.4, 0.2]]), 0.5).tolist()
        [[0.0, 1.0, 1.0, 0.0]]
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}.")
    keep = math.ceil(ratio * noise_BL.shape[1])
    return torch.zeros_like(noise_BL).scatter(1, ops.top_k(noise_BL, keep), 1.0)
