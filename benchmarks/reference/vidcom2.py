"""VidCom2, formula by formula, every frame rounded on its own."""

from __future__ import annotations

import torch


def select(x_TLC: torch.Tensor, retain: float) -> torch.Tensor:
    """Flat indices of the kept patches, ascending."""
    T, L, C = x_TLC.shape
    variance_C = x_TLC.flatten(0, 1).var(0, unbiased=False)
    steady_TLC = x_TLC[..., variance_C.argsort(stable=True)[: C // 2].sort().values]
    unit_TLC = steady_TLC / steady_TLC.norm(dim=-1, keepdim=True)
    means = unit_TLC.mean((0, 1), keepdim=True), unit_TLC.mean(1, keepdim=True)
    video_TL, frame_TL = (
        sum(
            torch.exp(-((unit_TLC - mean) ** 2).sum(-1) / (2 * alpha))
            for alpha in (0.125, 0.25, 0.5, 1.0, 2.0)
        )
        for mean in means
    )
    share_T = torch.softmax(-video_TL.mean(1) / 0.01, 0)
    chosen = []
    for frame in range(T):
        ratio = min(1.0, float(retain * (1 + share_T[frame] - 1 / T)))
        keep = max(1, round(ratio * L))
        order_L = (video_TL + frame_TL)[frame].argsort(stable=True)
        chosen.append(frame * L + order_L[:keep].sort().values)
    return torch.cat(chosen)
