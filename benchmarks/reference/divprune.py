"""DivPrune's greedy search, formula by formula, on the full distance matrix."""

from __future__ import annotations

import torch


def select(x_NC: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the chosen tokens in the order of choice, int64 [keep]."""
    unit_NC = x_NC / x_NC.norm(dim=1, keepdim=True)
    distance_NN = 1 - unit_NC @ unit_NC.T
    # The smallest entry of a column is the token itself, the second smallest its neighbour.
    nearest_N = distance_NN.topk(2, dim=0, largest=False).values[1]
    chosen = [int(nearest_N.argmax())]
    while len(chosen) < keep:
        closest_N = distance_NN[chosen].min(0).values
        chosen.append(int(closest_N.argmax()))
    return torch.tensor(chosen)
