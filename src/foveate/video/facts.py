"""The facts about a clip, from its packet table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.errors import EmptyVideoError, FrameRequestError
from foveate.video.decode import Scan
from foveate.video.frames import VideoInfo
from foveate.video.memory import table_of
from foveate.video.table import PacketTable


def memory_facts(pixels_TCHW: Tensor, fps: float) -> tuple[PacketTable, VideoInfo]:
    """Table and facts of frames [T, 3, H, W] in memory at a rate (frames per second).

    Raises:
        FrameRequestError: the rate is not a positive number.
    """
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 1e-6 <= fps < math.inf:
        raise FrameRequestError(f"fps must be a positive number of frames per second, got {fps!r}")
    table = table_of(len(pixels_TCHW), fps)
    height, width = pixels_TCHW.shape[-2:]
    return table, _facts(table, height=height, width=width, codec="raw", container="memory")


def file_facts(scan: Scan, name: str) -> VideoInfo:
    """Facts of a scanned file.

    Raises:
        EmptyVideoError: there are no frames, no pixels, or no time passes.
    """
    if len(scan.table) == 0:
        raise EmptyVideoError("its video track has no frames", source=name)
    if scan.table.duration <= 0:
        raise EmptyVideoError("its video track lasts zero seconds", source=name)
    if scan.height < 1 or scan.width < 1:
        raise EmptyVideoError("its picture size is zero or cannot be told", source=name)
    return _facts(
        scan.table,
        height=scan.height,
        width=scan.width,
        codec=scan.codec,
        container=scan.container,
        rotation=scan.orientation.degrees,
        mirrored=scan.orientation.mirrored,
        has_audio=scan.has_audio,
        lost_frames=scan.lost_frames,
    )


def _facts(table: PacketTable, **facts: Any) -> VideoInfo:
    key_K, bytes_F = np.flatnonzero(table.key_F), table.bytes_F
    return VideoInfo(
        duration=table.duration,
        frame_rate=len(table) / table.duration,
        num_frames=len(table),
        keyframe_index=torch.from_numpy(key_K),
        keyframe_seconds=torch.from_numpy(table.seconds_F[key_K]),
        keyframe_pts=torch.from_numpy(table.pts_F[key_K]),
        variable_frame_rate=table.is_variable,
        start_seconds=float(int(table.pts_F[0]) * table.time_base),
        packet_bytes=torch.from_numpy(np.empty(0, np.int64) if bytes_F is None else bytes_F),
        **facts,
    )
