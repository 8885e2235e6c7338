"""DyCoke's temporal merging, frame by frame as the paper tells it.

Legend: T frames, N patches of a frame, D channels.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity


def select(x_TND: torch.Tensor, keep: float) -> torch.Tensor:
    """Flat indices that stay, ascending; groups of four frames."""
    T, N, _ = x_TND.shape
    kept = []
    for frame in range(T):
        if frame % 4 == 0:
            kept.append(torch.arange(N) + frame * N)
            continue
        earlier = frame - 2 if frame % 4 == 2 else frame - 1
        similarity_N = cosine_similarity(x_TND[frame], x_TND[earlier], dim=-1)
        order = similarity_N.topk(int(keep * N), largest=False).indices
        kept.append(order.sort().values + frame * N)
    return torch.cat(kept)
