"""How much patches change from frame to frame, and how much two scenes mean the same.

Legend: T frames, N patches of a frame, V values of a patch (3 p^2), K rows of logits, W words.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from foveate.ops._common import require_dims

Metric = Literal["l2", "ssim"]


def image_patches(pixels_T3HW: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Pictures cut into patches, row by row, float32 [T, N, V] with V = 3 h w.

    A margin that is too narrow for a patch is left out, as by a convolution of that stride.

    Args:
        pixels_T3HW: pictures.
        patch_size: (height, width) of a patch.

    Raises:
        ValueError: not [T, 3, H, W], or smaller than a patch.

    Example:
        >>> image_patches(torch.zeros(2, 3, 8, 13), (4, 4)).shape
        torch.Size([2, 6, 48])
    """
    require_dims(pixels_T3HW, 4, "pixels", "[T, 3, H, W]")
    (height, width), (h, w) = pixels_T3HW.shape[-2:], patch_size
    if height < h or width < w:
        raise ValueError(
            f"image_patches: pictures of {height} x {width} hold no patch of {h} x {w}."
        )
    rows, columns = height // h, width // w
    cut = pixels_T3HW[..., : rows * h, : columns * w].float()
    split = cut.unflatten(-1, (columns, w)).unflatten(-3, (rows, h))
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def patch_change(x_TNV: Tensor, before_TNV: Tensor, metric: Metric = "l2") -> Tensor:
    """How much every patch differs from another picture's, float32 [T, N]. O(T N V).

    "l2" is the Euclidean distance of the values; "ssim" is 1 - SSIM in [0, 2], with mean, variance
    and covariance over the whole patch (no window), constants (0.01 R)^2 and (0.03 R)^2, and R the
    larger range of values of the two patches, at least 1.

    Args:
        x_TNV: values of the patches.
        before_TNV: values of those that they are compared with.
        metric: which.

    Raises:
        ValueError: the shapes differ, or there is no such metric.

    Example:
        >>> x = torch.tensor([[[0.0, 0.0]]])
        >>> patch_change(x + torch.tensor([3.0, 4.0]), x).tolist()
        [[5.0]]
        >>> patch_change(x, x, "ssim").tolist()
        [[0.0]]
    """
    if x_TNV.shape != before_TNV.shape:
        raise ValueError(
            f"patch_change: patches {tuple(x_TNV.shape)} and {tuple(before_TNV.shape)} differ in "
            "shape."
        )
    x_TNV, before_TNV = x_TNV.float(), before_TNV.float()
    if metric == "l2":
        return torch.linalg.vector_norm(x_TNV - before_TNV, dim=-1)
    if metric != "ssim":
        raise ValueError(f'patch_change: metric must be "l2" or "ssim", got {metric!r}.')
    both = (x_TNV, before_TNV)
    range_TN = torch.stack([v.amax(-1) - v.amin(-1) for v in both]).amax(0).clamp_min(1.0)
    c1_TN, c2_TN = (0.01 * range_TN).square(), (0.03 * range_TN).square()
    mean_a, mean_b = (v.mean(-1) for v in both)
    centred = [v - v.mean(-1, keepdim=True) for v in both]
    variance_TN = sum((v.square().mean(-1) for v in centred), torch.zeros_like(mean_a))
    covariance_TN = (centred[0] * centred[1]).mean(-1)
    likeness_TN = (2 * mean_a * mean_b + c1_TN) * (2 * covariance_TN + c2_TN)
    likeness_TN /= (mean_a.square() + mean_b.square() + c1_TN) * (variance_TN + c2_TN)
    return 1 - likeness_TN


def last_true(flag_TN: Tensor) -> Tensor:
    """For every frame and place, the latest frame up to it whose flag is set, int64 [T, N].

    -1 before the first one.

    Example:
        >>> last_true(torch.tensor([[True], [False], [True], [False]])).flatten().tolist()
        [0, 0, 2, 2]
    """
    own_T1 = torch.arange(flag_TN.shape[0], device=flag_TN.device)[:, None]
    return own_T1.where(flag_TN, -1).cummax(0).values


def jensen_shannon(logits_KW: Tensor, other_KW: Tensor, swapped: bool = False) -> Tensor:
    """Jensen-Shannon divergence of two rows of logits in nats, float32 [K], in [0, ln 2].

    Args:
        logits_KW: unnormalised log-probabilities.
        other_KW: those of the other side; the result is the same the other way round.
        swapped: (KL(m | p) + KL(m | q)) / 2 with the mixture m in front, which is unbounded and no
            Jensen-Shannon divergence, for comparison with code that has it.

    Example:
        >>> p, q = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
        >>> round(float(jensen_shannon(p, q)), 4), float(jensen_shannon(p, p))
        (0.6931, 0.0)
    """
    log_p, log_q = log_softmax(logits_KW.float(), -1), log_softmax(other_KW.float(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    if swapped:
        return (log_m.exp() * (log_m - (log_p + log_q) / 2)).sum(-1)
    parts = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return (parts.sum(-1) / 2).clamp_min(0)
