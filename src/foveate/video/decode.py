"""The decoder seam: what a reader must do, and the one that uses PyAV.

A reader is stateless: every call opens the source anew, so several may run at once (one for each
group of a plan, say) and nothing is left over from a failed one.

Legend: C colour channels (3); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foveate.errors import (
    DamagedVideoError,
    FrameTooLargeError,
    NoVideoStreamError,
    TruncatedVideoError,
    UnsupportedVideoError,
)
from foveate.video import packets
from foveate.video.orientation import Orientation
from foveate.video.source import MediaSource, import_av
from foveate.video.table import Group, Packet, PacketTable

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Packets to try for a first picture, which alone tells the rotation.
_PROBE_PACKETS = 64
# The code for "unspecified" in FFmpeg's enumerations of colour.
_UNSPECIFIED = 2


class Decoded(NamedTuple):
    """A frame that came out of a decoder; its pixels are converted only if somebody wants them."""

    rank: int
    write: Callable[[Tensor], None]
    """Writes RGB into a uint8 tensor [3, H, W] (display orientation), scaling to its size."""
    is_corrupt: bool = False


@dataclass(frozen=True)
class Scan:
    """What a reader learns without decoding: the packet table and the track's header."""

    table: PacketTable
    codec: str
    container: str
    height: int
    width: int
    orientation: Orientation
    has_audio: bool
    lost_frames: int


class Reader(Protocol):
    """Reads one video; the seam for other decoders."""

    def scan(self) -> Scan:
        """List the packets without decoding them (O(file size) reading)."""
        ...

    def decode(self, groups: Sequence[Group]) -> Iterator[Decoded]:
        """Decode groups of a plan one after the other, giving at least their wanted frames.

        Frames come in presentation order; others met on the way may be given, too (they stand in
        for damaged neighbours). A frame that cannot be decoded is left out, not raised.
        """
        ...


class PyAVReader:
    """Reads files through PyAV (FFmpeg).

    Args:
        source: where the bytes are.
        max_pixels: largest picture (pixels) that is decoded; checked before decoding.
        threads: codec threads; 0 lets FFmpeg choose (frame and slice threading), 1 is for callers
            that run several readers at once.
        interpolation: swscale filter used where frames are scaled while they are converted.

    Raises:
        VideoError: the source has no video that can be read.
    """

    def __init__(
        self,
        source: MediaSource,
        *,
        max_pixels: int,
        threads: int = 0,
        interpolation: str = "BICUBIC",
    ) -> None:
        self.source = source
        self.max_pixels = max_pixels
        self.threads = threads
        self.interpolation = interpolation
        self._scan: Scan | None = None

    def scan(self) -> Scan:
        """List the packets; the first picture alone is decoded, for its rotation."""
        if self._scan is None:
            with self.source.open() as container:
                self._scan = self._read_table(container)
        return self._scan

    def decode(self, groups: Sequence[Group]) -> Iterator[Decoded]:
        """Decode groups of a plan; see `Reader.decode`."""
        scan = self.scan()
        with self.source.open() as container:
            stream = self._video_stream(container)
            context = stream.codec_context
            context.thread_type = "AUTO" if self.threads != 1 else "NONE"
            context.thread_count = self.threads
            # One converter for all frames: setting up swscale costs more than a conversion.
            converter = import_av().video.reformatter.VideoReformatter()
            ranks = scan.table.rank_of_pts
            count = 0
            for i, group in enumerate(groups):
                if i:
                    # The group before was drained; the decoder accepts nothing until flushed.
                    context.flush_buffers()
                for frame in self._run(container, stream, scan.table, group):
                    if scan.table.by_order:
                        rank = count
                        count += 1
                    else:
                        rank = -1 if frame.pts is None else ranks.get(frame.pts, -1)
                    if rank >= group.key_rank:
                        write = _Writer(frame, converter, scan.orientation, self.interpolation)
                        yield Decoded(rank, write, bool(frame.is_corrupt))

    def _run(
        self, container: InputContainer, stream: VideoStream, table: PacketTable, group: Group
    ) -> Iterator[VideoFrame]:
        """Frames of one group: packets from its keyframe to its last, then what is left inside."""
        with closing(packets.locate(container, stream, table, group)) as run:
            for position, packet in run:
                yield from packets.decode_packet(stream, packet)
                if position >= group.stop:
                    break
        yield from packets.decode_packet(stream, None)

    def _video_stream(self, container: InputContainer) -> VideoStream:
        """The video track to read, its picture size checked and other tracks switched off."""
        av = import_av()
        name = self.source.name
        # Cover art of music files is listed as a video track, too.
        streams = [s for s in container.streams.video if not packets.is_cover(s)]
        if not streams and container.streams.audio:
            raise NoVideoStreamError("there is no video track; this is an audio file", source=name)
        if not streams and not container.streams.subtitles:
            raise TruncatedVideoError("its header ends before any usable track", source=name)
        if not streams:
            raise NoVideoStreamError("there is no video track", source=name)
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        context: Any = stream.codec_context
        if context is None:
            raise UnsupportedVideoError("no decoder for the codec of its video track", source=name)
        if context.width * context.height > self.max_pixels:
            raise FrameTooLargeError(
                f"frames are {context.width}x{context.height} pixels, more than max_pixels="
                f"{self.max_pixels}; raise max_pixels if you trust the file",
                source=name,
            )
        # The size may change on the way: the decoder checks every picture, too. It counts padding,
        # so it gets some room.
        context.options = {"max_pixels": str(2 * self.max_pixels + (1 << 20))}
        with suppress(AttributeError, av.error.FFmpegError):
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = av.stream.Discard.all
        return stream  # type: ignore[return-value]

    def _read_table(self, container: InputContainer) -> Scan:
        stream = self._video_stream(container)
        context = stream.codec_context
        found: list[Packet] = []
        discarded = 0
        picture: Any = None
        # One thread: frame threading would hold the first picture back.
        context.thread_type = "SLICE"
        for position, packet in enumerate(packets.demux(container, stream)):
            if picture is None and position < _PROBE_PACKETS:
                picture = next(packets.decode_packet(stream, packet), None)
            if packet.is_discard:
                discarded += 1
                continue
            found.append(Packet(position, packet.pts, packet.is_keyframe, packet.duration or 0))
        if picture is None:
            picture = next(packets.decode_packet(stream, None), None)
        # Only a decoded picture tells the rotation in PyAV, and the true size in raw streams.
        orientation = packets.orientation(picture) if picture is not None else Orientation()
        height, width = (
            (picture.height, picture.width)
            if picture is not None
            else (context.height, context.width)
        )
        rate = stream.average_rate
        name = container.format.name
        # AVI stores no presentation times, so with reordering codecs its packet times are wrong; a
        # program stream stores one for some pictures only. Such files are read by counting.
        by_order = name == "mpeg" or (name == "avi" and context.name in ("h264", "hevc"))
        ticks = stream.time_base or Fraction(1, 90_000)
        table = PacketTable.from_packets(found, ticks, rate, by_order=by_order)
        height, width = orientation.size(height, width)
        return Scan(
            table=table,
            codec=context.name,
            container=name,
            height=height,
            width=width,
            orientation=orientation,
            has_audio=bool(container.streams.audio),
            lost_frames=packets.lost_frames(container, stream, table, len(found) + discarded),
        )


class _Writer:
    """Converts one frame to RGB in a single swscale call, into a given tensor."""

    def __init__(
        self, frame: VideoFrame, converter: Any, orientation: Orientation, interpolation: str
    ) -> None:
        self.frame = frame
        self.converter = converter
        self.orientation = orientation
        self.interpolation = interpolation

    def __call__(self, out_CHW: Tensor) -> None:
        height, width = self.orientation.size(*out_CHW.shape[-2:])
        try:
            rgb = self._convert(height, width)
        except import_av().error.FFmpegError:
            # A colour description that is damaged or unknown: go by the pixel format alone.
            for field in ("colorspace", "color_primaries", "color_trc"):
                with suppress(AttributeError, ValueError):
                    setattr(self.frame, field, _UNSPECIFIED)
            try:
                rgb = self._convert(height, width)
            except import_av().error.FFmpegError as error:
                raise DamagedVideoError(
                    f"a picture in {self.frame.format.name} cannot be converted to RGB ({error})"
                ) from error
        rgb_CHW = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)
        out_CHW.copy_(self.orientation.apply(rgb_CHW))

    def _convert(self, height: int, width: int) -> VideoFrame:
        return self.converter.reformat(
            self.frame, width, height, format="rgb24", interpolation=self.interpolation
        )
