"""Methods inside the language model and the encoder as their papers write them.

Whole attention matrices for all heads, one group, window or frame after the other; no attention to
speed. Legend: H heads, S tokens of the prompt, N visual tokens, d head channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_HSd: Tensor, k_HSd: Tensor) -> Tensor:
    """Causal attention of all heads, [H, S, S], as an eager kernel hands it out."""
    num = q_HSd.shape[1]
    logits = q_HSd @ k_HSd.mT * q_HSd.shape[-1] ** -0.5
    hidden = torch.ones(num, num, dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def fastv(q_HSd: Tensor, k_HSd: Tensor, first: int, num: int, keep: int) -> Tensor:
    """FastV (2403.06764) and PyramidDrop (2410.17247): the last row of the mean attention."""
    score_N = attention(q_HSd, k_HSd).mean(0)[-1, first : first + num]
    return score_N.topk(keep).indices.sort().values


def transprune(
    attn_in: Tensor, attn_out: Tensor, q_HSd: Tensor, k_HSd: Tensor, first: int, num: int, keep: int
) -> Tensor:
    """TransPrune (2507.20630), one layer's transition and the instruction's attention."""
    change_S = attn_out.norm(dim=-1) / attn_in.norm(dim=-1)
    turn_S = 1 - F.cosine_similarity(attn_in, attn_out, dim=-1)
    transition_N = (turn_S.softmax(-1) * change_S)[first : first + num]
    rows = attention(q_HSd, k_HSd)[:, first + num :].mean(0).mean(0)
    iga_N = rows[first : first + num]
    score_N = transition_N / transition_N.sum() + iga_N / iga_N.sum()
    return score_N.topk(keep).indices.sort().values


def safewatch(
    q_HSd: Tensor, k_HSd: Tensor, visual: slice, policies: list[tuple[int, int]], keep: int
) -> Tensor:
    """SafeWatch (2412.06878): the union of what every policy attends to."""
    probs = attention(q_HSd, k_HSd).mean(0)
    each, chosen = -(-keep // len(policies)), set()
    for first, end in policies:
        score_N = probs[first:end].mean(0)[visual]
        chosen |= set(score_N.topk(each).indices.tolist())
    return torch.tensor(sorted(chosen))


def quickvideo(keys_GNd: Tensor, tokens_per_group: int, retain: float) -> Tensor:
    """QuickVideo (2505.16175): keys of small norm, group by group."""
    kept = []
    for start in range(0, keys_GNd.shape[1], tokens_per_group):
        part = keys_GNd[:, start : start + tokens_per_group]
        norm_n = part.norm(dim=(0, 2))
        best = norm_n.topk(int(retain * part.shape[1]), largest=False).indices + start
        kept.append(best.sort().values)
    return torch.cat(kept)


def video_xl2(keys_GNd: Tensor, unit: int, window: int, dense: set[int]) -> Tensor:
    """Video-XL-2 (2506.19225): units of a chunk whole, all others averaged by windows."""
    parts = []
    for number in range(keys_GNd.shape[1] // unit):
        part_GUd = keys_GNd[:, number * unit : (number + 1) * unit]
        if number in dense:
            parts.append(part_GUd)
        else:
            parts += [
                part_GUd[:, first : first + window].mean(1, keepdim=True)
                for first in range(0, unit - window + 1, window)
            ]
    return torch.cat(parts, dim=1)


def tome(metric_TNd: Tensor, x_TND: Tensor, r: int) -> Tensor:
    """ToMe (2210.09461), one image at a time: every second token may join its nearest neighbour."""
    merged = []
    for metric_Nd, x_ND in zip(metric_TNd, x_TND, strict=True):
        unit = F.normalize(metric_Nd, dim=-1)
        score, best = (unit[::2] @ unit[1::2].mT).max(1)
        order = score.argsort(descending=True, stable=True)
        x_even, x_odd = x_ND[::2], x_ND[1::2].clone()
        count = torch.ones(len(x_odd), 1)
        for source in order[:r].tolist():
            x_odd[best[source]] += x_even[source]
            count[best[source]] += 1
        merged.append(torch.cat([x_even[order[r:]], x_odd / count]))
    return torch.stack(merged)


def fopru(q_THNd: Tensor, k_THNd: Tensor, keep: int) -> Tensor:
    """FoPru (2411.14164), by rank: received or given attention, whichever varies more."""
    kept = []
    for q_HNd, k_HNd in zip(q_THNd, k_THNd, strict=True):
        probs = (q_HNd @ k_HNd.mT * q_HNd.shape[-1] ** -0.5).softmax(-1).mean(0)[1:, 1:]
        received, given = probs.mean(0), probs.mean(1)
        score = received if received.var() > given.var() else given
        kept.append(score.topk(keep).indices.sort().values)
    return torch.stack(kept)


def aim(q_HSd: Tensor, k_HSd: Tensor, temperature: float = 0.1, steps: int = 5) -> Tensor:
    """AIM (2412.03248): page rank over the sharpened attention of a layer, [S]."""
    num = q_HSd.shape[1]
    logits = q_HSd @ k_HSd.mT * q_HSd.shape[-1] ** -0.5
    hidden = torch.ones(num, num, dtype=torch.bool).triu(1)
    walk = (logits.masked_fill(hidden, -torch.inf) / temperature).softmax(-1)
    mass = torch.full((q_HSd.shape[0], 1, num), 1 / num)
    for _ in range(steps):
        mass = mass @ walk
    return mass[:, 0].square().mean(0).sqrt()


def vista_llama(
    rotated: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor], v_HSd: Tensor, visual_S: Tensor
) -> Tensor:
    """Vista-LLaMA (2312.08870): both logit matrices in full, one of them per column."""
    num, scale = v_HSd.shape[1], v_HSd.shape[-1] ** -0.5
    logits = torch.where(visual_S, plain[0] @ plain[1].mT, rotated[0] @ rotated[1].mT) * scale
    hidden = torch.ones(num, num, dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v_HSd
