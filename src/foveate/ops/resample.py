"""Resampling along one axis as a matrix, so that it can be part of a reduction.

Legend: L places before, M places after.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, interpolate


def bilinear_matrix(length: int, num: int, device: torch.device | str = "cpu") -> Tensor:
    """Linear interpolation from `length` to `num` places, float32 [M, L], rows adding up to 1.

    Pixel centres, no antialiasing: on two axes, `interpolate(mode="bilinear")`. O(L M).

    Raises:
        ValueError: a length is below 1.

    Example:
        >>> bilinear_matrix(2, 4).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    _check(length, num)
    eye_1LL = torch.eye(length, device=device)[None]
    return interpolate(eye_1LL, size=num, mode="linear", align_corners=False)[0].T.contiguous()


def average_matrix(length: int, num: int, device: torch.device | str = "cpu") -> Tensor:
    """Adaptive average pooling from `length` to `num` places, float32 [M, L]; cells may overlap.

    O(L M).

    Raises:
        ValueError: a length is below 1.

    Example:
        >>> average_matrix(3, 2).tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    _check(length, num)
    eye_1LL = torch.eye(length, device=device)[None]
    return adaptive_avg_pool1d(eye_1LL, num)[0].T.contiguous()


def _check(length: int, num: int) -> None:
    if min(length, num) < 1:
        raise ValueError(f"length and num must be at least 1 place, got {length} and {num}")
