"""Cutting a video into stretches that start at keyframes, for decoding them in parallel."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Interval(NamedTuple):
    """Timestamps from `start` up to (not including) `end`, and how many wanted frames are inside.

    The last interval of a video includes its end.
    """

    start: int
    end: int
    num_wanted: int


def keyframe_intervals(
    keyframe_pts: Sequence[int],
    end_pts: int,
    num_frames: int,
    wanted: Sequence[int],
    num_intervals: int,
    start_pts: int = 0,
) -> list[Interval]:
    """Cut a video into at most `num_intervals` stretches of similar length between keyframes.

    Each border is the keyframe nearest to an even cut (the later one on ties), so a decoder needs
    one seek per stretch. Cuts outside the keyframes add no border and equal borders count once, so
    fewer intervals may come back. O((intervals + wanted) log keyframes).

    Args:
        keyframe_pts: timestamps of the keyframes, ascending, in the stream's time base.
        end_pts: last timestamp of the stream.
        num_frames: frames of the stream; frame i is taken to be at the i-th even step from start to
            end (constant frame rate).
        wanted: frame numbers.
        num_intervals: most intervals.
        start_pts: first timestamp of the stream.

    Raises:
        ValueError: no keyframe, an empty stream, or fewer than one interval.

    Example:
        >>> keyframe_intervals([0, 40, 80], 100, 101, [0, 50, 99], 2)
        [Interval(start=0, end=40, num_wanted=1), Interval(start=40, end=100, num_wanted=2)]

    Source: QuickVideo, section 3.1 (arXiv 2505.16175), with start timestamps other than 0.
    """
    if not keyframe_pts or end_pts < start_pts or num_intervals < 1:
        raise ValueError(
            f"need keyframes, end_pts >= start_pts and at least 1 interval, got "
            f"{len(keyframe_pts)} keyframes, {start_pts}..{end_pts} and {num_intervals}."
        )
    span = end_pts - start_pts
    borders = {start_pts, end_pts}
    for cut in range(1, num_intervals):
        target = start_pts + cut * span / num_intervals
        after = bisect_left(keyframe_pts, target)
        if keyframe_pts[0] <= target <= keyframe_pts[-1]:
            before = max(after - 1, 0)
            later_is_nearer = keyframe_pts[after] - target <= target - keyframe_pts[before]
            borders.add(keyframe_pts[after if later_is_nearer else before])
    edges = sorted(borders)
    if len(edges) == 1:
        return [Interval(start_pts, end_pts, len(wanted))]
    counts = [0] * (len(edges) - 1)
    for frame in wanted:
        pts = start_pts + frame * span / max(num_frames - 1, 1)
        inside = bisect_left(edges, pts)
        # A frame on a border belongs to the interval that starts there, the last to the last.
        inside = inside if inside < len(edges) and edges[inside] == pts else inside - 1
        counts[min(max(inside, 0), len(counts) - 1)] += 1
    return [Interval(a, b, n) for (a, b), n in zip(pairwise(edges), counts, strict=True)]
