"""LVLM_CSP's pruning: the attention of the last token, all heads, and the largest scores.

Legend: H heads, G key heads, S tokens, d head channels, K kept tokens.
"""

from __future__ import annotations

import torch


def prune(q_1HSd: torch.Tensor, k_1GSd: torch.Tensor, first: int, num: int, keep: int):
    """Visual tokens that stay, ascending; they are the `num` tokens from `first` on."""
    k_1HSd = k_1GSd.repeat_interleave(q_1HSd.shape[1] // k_1GSd.shape[1], dim=1)
    logits_1H1S = q_1HSd[:, :, -1:] @ k_1HSd.transpose(-1, -2) * q_1HSd.shape[-1] ** -0.5
    score_N = logits_1H1S.softmax(-1).mean(1)[0, 0, first : first + num]
    return score_N.topk(keep).indices.sort().values
