"""VisionZip, formula by formula, frame after frame."""

from __future__ import annotations

import torch


def reduce(
    x_TLD: torch.Tensor, score_TL: torch.Tensor, dominant: int, contextual: int
) -> torch.Tensor:
    """Dominant tokens, then contextual ones, of every frame, [T * (dominant + contextual), D]."""
    out = []
    for x_LD, score_L in zip(x_TLD, score_TL, strict=True):
        best = score_L.argsort(descending=True, stable=True)[:dominant].sort().values
        left_L = torch.ones(len(score_L), dtype=torch.bool).index_fill(0, best, False)
        x_RD = x_LD[left_L]
        unit_RD = x_RD / x_RD.norm(dim=1, keepdim=True)
        place_C = torch.arange(contextual) * max(1, len(x_RD) // contextual)
        home_R = (unit_RD @ unit_RD[place_C].T).argmax(1)
        home_R[place_C] = torch.arange(contextual)
        merged = [x_RD[home_R == index].mean(0) for index in range(contextual)]
        out += [x_LD[best], torch.stack(merged)]
    return torch.cat(out)
