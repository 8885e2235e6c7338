"""HiPrune as its paper writes it: whole attention maps, one tile after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def select(q: Tensor, k: Tensor, width: int, keep: int, alpha: float = 0.1) -> Tensor:
    """Kept patches of every tile, [T, keep]; queries and keys [2 blocks, T, H, 1 + L, d]."""
    maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(2).mean(2)[..., 1:]
    kept = []
    for object_L, deep_L in zip(*maps, strict=True):
        L = object_L.shape[0]
        chosen = set()
        for anchor in object_L.topk(round(alpha * keep / 5)).indices.tolist():
            row, column = divmod(anchor, width)
            for y, x in ((row, column), (row - 1, column), (row + 1, column), (row, column - 1),
                         (row, column + 1)):  # fmt: skip
                if 0 <= y < L // width and 0 <= x < width:
                    chosen.add(y * width + x)
        rest = deep_L.clone()
        rest[list(chosen)] = -torch.inf
        registers = rest.topk(keep - len(chosen)).indices.tolist()
        kept.append(sorted([*chosen, *registers]))
    return torch.tensor(kept)
