"""CATP's first stage, line by line: all gains anew for every choice."""

from __future__ import annotations

import torch


def select(x_PD: torch.Tensor, text_D: torch.Tensor, keep: int, weight: float) -> torch.Tensor:
    """Indices of the chosen patches in the order of choice, int64 [keep]."""
    unit_PD = x_PD / x_PD.norm(dim=1, keepdim=True)
    similarity_PP = (unit_PD @ unit_PD.T + 1) / 2
    bonus_P = weight * (unit_PD @ (text_D / text_D.norm()) + 1) / 2
    cover_P = torch.zeros(len(x_PD))
    chosen: list[int] = []
    while len(chosen) < keep:
        gain_P = (similarity_PP - cover_P).clamp(min=0).sum(1) + bonus_P
        gain_P[chosen] = -torch.inf
        chosen.append(int(gain_P.argmax()))
        cover_P = torch.maximum(cover_P, similarity_PP[chosen[-1]])
    return torch.tensor(chosen)
