"""TS-LLaVA's sample of all frames' tokens.

Legend: P tokens of a clip, S sampled tokens, D channels.
"""

from __future__ import annotations

import torch


def sample(x_PD: torch.Tensor, num_sampled: int) -> torch.Tensor:
    """The sampled tokens, [S, D]."""
    index_S = torch.linspace(0, len(x_PD) - 1, num_sampled).round().long()
    return x_PD[index_S]
