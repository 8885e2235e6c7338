"""Cutting a video into segments: optimal partitions and change points.

Legend of shape suffixes: T frames, N tokens per frame, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.ops._common import require_count, require_dims


@dataclass(frozen=True)
class Segmentation:
    """Contiguous segments of a video and what is redundant inside each.

    `bounds` [S, 2] int64 holds the first and last frame of every segment, both included; `static`
    [S, N] bool marks the places that stay redundant over the whole segment (none in a segment of
    one frame); `removed` counts the tokens that averaging those places over time removes.
    """

    bounds: Tensor
    removed: int
    static: Tensor

    @property
    def num_segments(self) -> int:
        """Number of segments S."""
        return self.bounds.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Frames per segment [S]."""
        return self.bounds[:, 1] - self.bounds[:, 0] + 1


def segment_by_gain(redundant_TN: Tensor, max_window: int = 1024) -> Segmentation:
    """Cut a video so that averaging redundant places within segments removes most tokens.

    A segment s..e gains (e - s) times the number of places whose links s..e-1 are all redundant;
    the best contiguous partition is found exactly. O(T N + T^2): the run length of every link
    gives all gains at once. Candidates are tried from short to long and replace only if strictly
    larger, so ties give the shortest last segment.

    Args:
        redundant_TN: [T - 1, N] bool; entry (t, p) links place p of frames t and t + 1.
        max_window: longest segment, in frames.

    Returns:
        `Segmentation` over T frames, tensors on the input's device.

    Raises:
        ValueError: not a bool [T - 1, N], or `max_window` below 1.

    Example:
        >>> links = torch.tensor([[True, True], [False, False], [True, False]])
        >>> found = segment_by_gain(links)
        >>> found.bounds.tolist(), found.removed, found.static.tolist()
        ([[0, 1], [2, 3]], 3, [[True, True], [True, False]])

    Source: HoliTom, temporal segmentation by dynamic programming (arXiv 2505.21334).
    """
    require_dims(redundant_TN, 2, "redundant", "[T - 1, N]")
    if redundant_TN.dtype != torch.bool:
        raise ValueError(f"redundant must be bool, got {redundant_TN.dtype}")
    device = redundant_TN.device
    end_TN = _run_ends(redundant_TN)
    links, places = redundant_TN.shape
    frames = links + 1
    # alive[s, e] = places whose run from frame s reaches frame e: count the ends, then sum from the
    # right. One transfer to the host follows; the recursion itself is sequential.
    ended = torch.zeros(frames, frames, dtype=torch.long, device=device)
    ended[:links].scatter_add_(1, end_TN, torch.ones_like(end_TN))
    alive = ended.flip(1).cumsum(1).flip(1)
    frame = torch.arange(frames, device=device)
    gain_TT = (alive * (frame - frame[:, None])).cpu()
    bounds, removed = optimal_partition(gain_TT, max_window)
    bounds = bounds.to(device)
    first, last = bounds.unbind(1)
    whole_TN = torch.cat([end_TN, end_TN.new_full((1, places), frames - 1)])
    static_SN = (whole_TN[first] >= last[:, None]) & (last > first)[:, None]
    return Segmentation(bounds, int(removed), static_SN)


def optimal_partition(gain_TT: Tensor, max_window: int | None = None) -> tuple[Tensor, float | int]:
    """Find the contiguous partition of T frames with the largest sum of segment gains.

    Exact dynamic programming on the host, O(T max_window). Ties: the shortest last segment.

    Args:
        gain_TT: [T, T]; entry (s, e) with s <= e is the gain of segment s..e (both included),
            the rest is ignored.
        max_window: longest segment in frames; None for no limit.

    Returns:
        Bounds [S, 2] int64 (first and last frame of each segment, on the device of `gain_TT`) and
        the total gain (int for integer gains).

    Raises:
        ValueError: not square, or `max_window` below 1.

    Example:
        >>> gain = torch.tensor([[0, 5, 4], [0, 0, 3], [0, 0, 0]])
        >>> bounds, value = optimal_partition(gain)
        >>> bounds.tolist(), value
        ([[0, 1], [2, 2]], 5)
    """
    require_dims(gain_TT, 2, "gain", "[T, T]")
    frames = gain_TT.shape[0]
    if gain_TT.shape[1] != frames:
        raise ValueError(f"gain must be square, got {tuple(gain_TT.shape)}")
    window = frames if max_window is None else max_window
    if window < 1 and frames:
        raise ValueError(f"max_window must be at least 1 frame, got {max_window}")
    whole = not gain_TT.is_floating_point()
    # Row e of the transpose, read backwards, lists the segments that end at e from short to long.
    ending = gain_TT.detach().cpu().to(torch.long if whole else torch.float64).T.contiguous()
    gains = ending.numpy()
    best = np.zeros(frames + 1, dtype=gains.dtype)
    start = np.zeros(frames, dtype=np.int64)
    for e in range(frames):
        low = max(0, e + 1 - window)
        total = (best[low : e + 1] + gains[e, low : e + 1])[::-1]
        length = int(total.argmax())
        best[e + 1], start[e] = total[length], e - length
    cuts: list[tuple[int, int]] = []
    e = frames - 1
    while e >= 0:
        cuts.append((int(start[e]), e))
        e = int(start[e]) - 1
    bounds = torch.tensor(cuts[::-1], dtype=torch.long).reshape(-1, 2)
    return bounds.to(gain_TT.device), best[-1].item()


def change_points(
    similarity_T: Tensor,
    *,
    threshold: float | None = None,
    num_segments: int | None = None,
) -> Tensor:
    """Cut a video where neighbouring frames differ.

    Args:
        similarity_T: [T - 1]; entry t compares frames t and t + 1.
        threshold: cut wherever the similarity is below it.
        num_segments: cut at the `num_segments - 1` smallest similarities, earliest first on ties.

    Returns:
        Bounds [S, 2] int64: first and last frame of each segment, both included.

    Raises:
        ValueError: not exactly one of `threshold` and `num_segments`, or more segments than frames.

    Example:
        >>> change_points(torch.tensor([0.9, 0.1, 0.8]), num_segments=2).tolist()
        [[0, 1], [2, 3]]
    """
    require_dims(similarity_T, 1, "similarity", "[T - 1]")
    links = similarity_T.shape[0]
    if (threshold is None) == (num_segments is None):
        raise ValueError("give exactly one of threshold and num_segments")
    if threshold is not None:
        cut_C = torch.nonzero(similarity_T < threshold).flatten()
    else:
        assert num_segments is not None
        require_count(num_segments, 1, links + 1, "num_segments", "frames")
        order = torch.sort(similarity_T, stable=True).indices
        cut_C = order[: num_segments - 1].sort().values
    first = torch.cat([cut_C.new_zeros(1), cut_C + 1])
    last = torch.cat([cut_C, cut_C.new_full((1,), links)])
    return torch.stack([first, last], dim=1)


def scene_segments(x_TNC: Tensor, max_cuts: int = 24) -> Tensor:
    """Cut a video into scenes where neighbouring frames are least alike. O(T N C).

    A frame is all its features in one vector, compared with the next one's by their cosine. A video
    of at most `max_cuts` + 1 frames is cut behind every one of them; any other is cut exactly
    `max_cuts` times, earliest first on ties.

    Args:
        x_TNC: features of N places in T frames.
        max_cuts: cuts, one fewer than scenes.

    Returns:
        Bounds [S, 2] int64: first and last frame of each scene, both included.

    Raises:
        ValueError: not [T, N, C] with a frame, or `max_cuts` below 0.

    Example:
        >>> x = torch.eye(2)[[0, 0, 0, 1, 1]][:, None]
        >>> scene_segments(x, max_cuts=1).tolist()
        [[0, 2], [3, 4]]

    Source: TDC, arXiv 2504.10443, section 3; the number of cuts and the rule for short videos are
    those of its code.
    """
    require_dims(x_TNC, 3, "features", "[T, N, C]")
    frames = x_TNC.shape[0]
    if frames == 0 or max_cuts < 0:
        raise ValueError(
            f"a video has at least one frame and max_cuts is at least 0, got {frames} frames and "
            f"max_cuts = {max_cuts}"
        )
    if frames <= max_cuts + 1:
        own_T = torch.arange(frames, device=x_TNC.device)
        return torch.stack([own_T, own_T], dim=1)
    flat_TV = x_TNC.flatten(1).float()
    similarity = torch.nn.functional.cosine_similarity(flat_TV[:-1], flat_TV[1:], dim=1)
    return change_points(similarity, num_segments=max_cuts + 1)


def _run_ends(redundant_TN: Tensor) -> Tensor:
    """Frame that the unbroken run of links from frame t reaches, for every t and place."""
    links = redundant_TN.shape[0]
    frame_T1 = torch.arange(links, device=redundant_TN.device)[:, None]
    broken_TN = torch.where(redundant_TN, links, frame_T1)
    if links == 0:
        return broken_TN
    return broken_TN.flip(0).cummin(0).values.flip(0)
