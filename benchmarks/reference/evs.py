"""EVS, formula by formula."""

from __future__ import annotations

import torch


def select(x_TLD: torch.Tensor, keep: int) -> torch.Tensor:
    """Flat indices of the kept patches, ascending, int64 [keep]."""
    cosine_TL = torch.cosine_similarity(x_TLD[1:], x_TLD[:-1], dim=-1)
    first_L = torch.full_like(cosine_TL[:1], torch.inf)
    change_P = torch.cat([first_L, 1 - cosine_TL]).flatten()
    return change_P.argsort(descending=True, stable=True)[:keep].sort().values
