"""ToDRE's first stage, line by line: the token least like all chosen so far, next."""

from __future__ import annotations

import torch


def select(x_NC: torch.Tensor, keep: int, pivot: int) -> torch.Tensor:
    """Indices of the chosen tokens in the order of choice, int64 [keep]."""
    unit_NC = x_NC / x_NC.norm(dim=1, keepdim=True)
    total_N = unit_NC @ unit_NC[pivot]
    total_N[pivot] = torch.inf
    chosen = [pivot]
    while len(chosen) < keep:
        latest = int(total_N.argmin())
        chosen.append(latest)
        total_N = total_N + unit_NC @ unit_NC[latest]
        total_N[latest] = torch.inf
    return torch.tensor(chosen)
