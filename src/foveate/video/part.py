"""A stretch of a clip as a clip of its own.

Legend: F frames of the whole clip, T frames given out.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from foveate.errors import FrameRequestError
from foveate.video import sampling
from foveate.video.clip import Clip, Size
from foveate.video.parallel import Filled
from foveate.video.stream import FrameStream
from foveate.video.table import PacketTable


class ClipPart(Clip):
    """Some consecutive frames of a clip; nothing is opened or scanned anew.

    Frames are numbered from the first of them, and seconds count from it.

    Args:
        clip: the whole.
        first, stop: ranks of the first frame and of the one behind the last.

    Raises:
        FrameRequestError: that is no stretch of the clip.

    Attributes:
        offset: seconds of the whole clip that lie before it.

    Example:
        >>> whole = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8), fps=2)
        >>> part = ClipPart(whole, 4, 8)
        >>> len(part), part.offset, part.info.duration, part.sample(2).seconds.tolist()
        (4, 2.0, 2.0, [0.0, 1.5])
    """

    def __init__(self, clip: Clip, first: int, stop: int) -> None:
        if not 0 <= first < stop <= len(clip):
            raise FrameRequestError(
                f"a part of a clip of {len(clip)} frames has at least one of them, got those from "
                f"{first} to {stop} (exclusive)"
            )
        vars(self).update(vars(clip))
        # A part of a part is one of the whole.
        is_part = isinstance(clip, ClipPart)
        self._whole: Clip = clip._whole if is_part else clip
        self._first: int = clip._first + first if is_part else first
        self.offset = float(self._whole._table.seconds_F[self._first])
        self._table = _stretch(clip._table, first, stop)
        table, key_K = self._table, np.flatnonzero(self._table.key_F)
        self.info = replace(
            clip.info,
            duration=table.duration,
            frame_rate=len(table) / table.duration,
            num_frames=len(table),
            keyframe_index=torch.from_numpy(key_K),
            keyframe_seconds=torch.from_numpy(table.seconds_F[key_K]),
            keyframe_pts=torch.from_numpy(table.pts_F[key_K]),
            variable_frame_rate=table.is_variable,
            start_seconds=self._whole.info.start_seconds + self.offset,
            packet_bytes=clip.info.packet_bytes[first:stop],
            lost_frames=clip.info.lost_frames if stop == len(clip) else 0,
        )

    def _stream(
        self,
        ranks: np.ndarray,
        chunk: int,
        ahead: int,
        size: Size,
        strict: bool,
        stacklevel: int = 3,
    ) -> FrameStream:
        """Frames of the whole clip under the numbers that they have here."""
        whole = self._whole._stream(ranks + self._first, chunk, ahead, size, strict, stacklevel)

        def renumbered(filled: Filled) -> Filled:
            shown = [rank - self._first for rank in filled.shown]
            return Filled(filled.pixels_nCHW, shown, tuple(s - self._first for s in filled.suspect))

        return FrameStream(
            whole._source,
            ranks,
            chunk,
            lambda ranks, filled: self._frames(ranks, renumbered(filled)),
            strict=strict,
            name=self.name,
            stacklevel=stacklevel,
        )


def split_clip(clip: Clip, parts: int) -> list[ClipPart]:
    """Cut a clip into parts that last equally long, as nearly as frames allow.

    Args:
        clip: the whole.
        parts: how many.

    Raises:
        FrameRequestError: a part would have no frame, or `parts` is no whole number of at least 1.

    Example:
        >>> whole = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8), fps=2)
        >>> [(part.offset, len(part)) for part in split_clip(whole, 3)]
        [(0.0, 4), (2.0, 3), (3.5, 3)]
    """
    if sampling.whole(parts, "parts") < 1:
        raise FrameRequestError(f"parts must be at least 1, got {parts}")
    cuts = clip.info.duration * np.arange(1, parts) / parts
    # A hair of slack: a frame that begins with a part belongs to it.
    ranks = np.searchsorted(clip._table.seconds_F, cuts - 1e-6).tolist()
    edges = [0, *ranks, len(clip)]
    if any(stop <= first for first, stop in pairwise(edges)):
        raise FrameRequestError(
            f"a clip of {len(clip)} frames in {clip.info.duration:.3f} s cannot be cut into "
            f"{parts} equal parts: one would have no frame"
        )
    return [ClipPart(clip, first, stop) for first, stop in pairwise(edges)]


def _stretch(table: PacketTable, first: int, stop: int) -> PacketTable:
    """The table of some consecutive frames; for facts and times, not for decoding."""
    end_pts = table.end_pts if stop == len(table) else int(table.pts_F[stop])
    here = slice(first, stop)
    return replace(
        table,
        pts_F=table.pts_F[here],
        position_F=table.position_F[here],
        key_F=table.key_F[here],
        end_pts=end_pts,
        disposable_F=None if table.disposable_F is None else table.disposable_F[here],
        bytes_F=None if table.bytes_F is None else table.bytes_F[here],
    )
