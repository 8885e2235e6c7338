"""HoliTom's outer stage, formula by formula, one frame and one segment at a time.

Legend: T frames, N places per frame, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def gains(redundant_TN: torch.Tensor) -> list[list[int]]:
    """Tokens removed by merging segment s..e, by a running AND over its links."""
    frames = redundant_TN.shape[0] + 1
    table = [[0] * frames for _ in range(frames)]
    for s in range(frames):
        whole_N = torch.ones(redundant_TN.shape[1], dtype=torch.bool)
        for e in range(s + 1, frames):
            whole_N = whole_N & redundant_TN[e - 1]
            table[s][e] = (e - s) * int(whole_N.sum())
    return table


def partition(table: list[list[int]], window: int) -> tuple[list[tuple[int, int]], int]:
    """Best contiguous partition by dynamic programming."""
    frames = len(table)
    best, cut = [0] * (frames + 1), [0] * frames
    for e in range(frames):
        best[e + 1], cut[e] = best[e], e
        for w in range(2, min(e + 1, window) + 1):
            s = e - w + 1
            if best[s] + table[s][e] > best[e + 1]:
                best[e + 1], cut[e] = best[s] + table[s][e], s
    segments = []
    e = frames - 1
    while e >= 0:
        segments.append((cut[e], e))
        e = cut[e] - 1
    return segments[::-1], best[-1]


def cluster(x_PC: torch.Tensor, m: int, k: int, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """DPC-kNN: centres and the blended features of their clusters."""
    distance = torch.cdist(x_PC, x_PC) / x_PC.shape[1] ** 0.5
    nearest = distance.topk(min(k, m), dim=1, largest=False).values
    density = (-(nearest**2).mean(1)).exp()
    delta = torch.full_like(density, float(distance.max()))
    for i in range(len(density)):
        denser = density > density[i]
        if denser.any():
            delta[i] = distance[i][denser].min()
    score = density * delta
    centres = score.sort(descending=True, stable=True).indices[:m].sort().values
    owner = distance[:, centres].argmin(1)
    owner[centres] = torch.arange(m)
    out = x_PC[centres].clone()
    for c in range(m):
        members = (owner == c).nonzero()[:, 0]
        members = members[members != centres[c]]
        if len(members):
            out[c] = beta * x_PC[centres[c]] + (1 - beta) * x_PC[members].mean(0)
    return centres, out


def outer(
    feat_TNC: torch.Tensor,
    attn_TN: torch.Tensor,
    retain: float,
    *,
    tau: float = 0.8,
    beta: float = 0.6,
    k: int = 7,
    window: int = 1024,
) -> torch.Tensor:
    """The tokens [M, C] that remain: per segment static ones, then dynamic ones frame by frame."""
    T, N, _ = feat_TNC.shape
    similarity = [F.cosine_similarity(feat_TNC[t], feat_TNC[t + 1], dim=-1) for t in range(T - 1)]
    redundant_TN = torch.stack(similarity) > tau
    segments, removed = partition(gains(redundant_TN), window)
    ratio = min(1.0, retain * T * N / (T * N - removed))
    out = []
    for first, last in segments:
        static_N = torch.zeros(N, dtype=torch.bool)
        if last > first:
            static_N = redundant_TN[first:last].all(0)
        places = static_N.nonzero()[:, 0]
        clusters = round(len(places) * ratio)
        if clusters:
            mean_PC = feat_TNC[first : last + 1, places].mean(0)
            out.append(cluster(mean_PC, clusters, k, beta)[1])
        dynamic = (~static_N).nonzero()[:, 0]
        keep = math.ceil(len(dynamic) * ratio)
        for t in range(first, last + 1):
            best = attn_TN[t, dynamic].topk(keep).indices.sort().values
            out.append(feat_TNC[t, dynamic[best]])
    return torch.cat(out)
