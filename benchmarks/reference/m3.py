"""M3's pooling with torch's own operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pool(x_TLD: torch.Tensor, side: int, kernel: int) -> torch.Tensor:
    """Average the patches of square frames, [T * L / kernel^2, D]."""
    x_TDHW = x_TLD.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.avg_pool2d(x_TDHW, kernel).permute(0, 2, 3, 1).flatten(0, 2)
