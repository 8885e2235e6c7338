"""Which frames to take: pure arithmetic on counts and seconds."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Literal

import numpy as np

from foveate.errors import FrameRequestError

Policy = Literal["ends", "centers"]


def sample_ranks(
    num_frames: int, n: int, *, policy: Policy = "ends", allow_repeat: bool = False
) -> np.ndarray:
    """Spread n ranks evenly over F frames; int64 [n], ascending, O(n).

    Args:
        num_frames: F, frames in the clip.
        n: frames wanted, at least 1.
        policy: "ends" takes the first and the last frame and cuts the places between down to whole
            numbers (``linspace(0, F - 1, n)`` as LLaVA-Video, LLaVA-OneVision and HoliTom, arXiv
            2505.21334, do); "centers" takes the middle of each of n equal parts.
        allow_repeat: let n exceed F by repeating frames, as those systems do on short clips.

    Raises:
        FrameRequestError: n is not a whole number from 1 to F, or the policy is unknown.

    Example:
        >>> sample_ranks(250, 4).tolist(), sample_ranks(250, 4, policy="centers").tolist()
        ([0, 83, 166, 249], [31, 93, 156, 218])
    """
    count = whole(n, "the number of frames")
    if count < 1:
        raise FrameRequestError(f"asked for {count} frames; ask for at least 1")
    if count > num_frames and not allow_repeat:
        raise FrameRequestError(
            f"asked for {count} frames of a clip that has {num_frames}; ask for at most "
            f"{num_frames}, or pass allow_repeat=True"
        )
    if policy == "ends":
        return np.linspace(0, num_frames - 1, count).astype(np.int64)
    if policy == "centers":
        return (2 * np.arange(count, dtype=np.int64) + 1) * num_frames // (2 * count)
    raise FrameRequestError(f"unknown policy {policy!r}; choose 'ends' or 'centers'")


def check_ranks(index: int | Iterable[int], num_frames: int) -> np.ndarray:
    """Ranks as int64 [n], each in [0, F).

    Raises:
        FrameRequestError: none are given, or one is no frame of the clip.
    """
    items = index if isinstance(index, Iterable) else [index]
    ranks = np.array([whole(item, "a frame index") for item in items], dtype=np.int64)
    if not len(ranks):
        raise FrameRequestError("no frames asked for; give at least one index")
    bad = ranks[(ranks < 0) | (ranks >= num_frames)]
    if len(bad):
        raise FrameRequestError(
            f"frame {int(bad[0])} does not exist; the clip has frames 0 to {num_frames - 1}"
        )
    return ranks


def check_seconds(seconds: float | Iterable[float], duration: float) -> np.ndarray:
    """Seconds as float64 [n], each in [0, duration).

    Raises:
        FrameRequestError: none are given, one is not a number, or lies outside of the clip.
    """
    try:
        times = np.asarray(
            list(seconds) if isinstance(seconds, Iterable) else [seconds], dtype=np.float64
        )
    except (TypeError, ValueError) as error:
        raise FrameRequestError(f"times must be seconds, got {seconds!r}") from error
    if times.ndim != 1 or not len(times):
        raise FrameRequestError(f"give one time or a flat list of times, got shape {times.shape}")
    bad = times[~((times >= 0) & (times < duration))]
    if len(bad):
        raise FrameRequestError(
            f"{float(bad[0])} s lies outside of the clip, which runs from 0 to (not including) "
            f"{duration:.6g} s"
        )
    return times


def rate_ranks(seconds_F: np.ndarray, duration: float, slack: float, fps: float) -> np.ndarray:
    """Ranks on screen at 0, 1/fps, 2/fps, ... seconds, each once; int64, ascending, O(F).

    Args:
        seconds_F: float64 [F], when each frame is first shown.
        duration: seconds.
        slack: seconds by which those times may be late from rounding.
        fps: frames per second; above the clip's own rate it gives every frame.

    Raises:
        FrameRequestError: fps is not a positive number.

    Example:
        >>> rate_ranks(np.arange(10) / 5, 2.0, 5e-4, fps=2.5).tolist()
        [0, 2, 4, 6, 8]
    """
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise FrameRequestError(f"fps must be a positive number of frames per second, got {fps!r}")
    edge = np.append(seconds_F, duration) * fps - (slack * fps + 1e-9)
    return np.flatnonzero(np.maximum(np.ceil(edge[:-1]), 0) < edge[1:])


def whole(value: object, what: str) -> int:
    """An integer, from any integer type (numpy and torch scalars, too) but not from bool.

    Raises:
        FrameRequestError: it is something else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise FrameRequestError(f"{what} must be a whole number, got {value!r}") from None
