"""The decoder seam: what a reader must do, and the one that uses PyAV.

Nothing here imports torch, so that a process that only decodes starts at once.

Legend: C colour channels (3); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from foveate.errors import (
    DamagedVideoError,
    DecodeLimitError,
    FrameTooLargeError,
    NoVideoStreamError,
    TruncatedVideoError,
    UnsupportedVideoError,
)
from foveate.video import packets
from foveate.video.nal import PacketParser
from foveate.video.orientation import Orientation
from foveate.video.source import MediaSource, import_av
from foveate.video.table import Group, Packet, PacketTable

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Packets to try for a first picture, which alone tells the rotation.
_PROBE_PACKETS = 64
# Packets of a file that are kept until it is first read.
_HEAD_BYTES = 4 << 20
# Pixels of a picture from which codec threads beyond the cores cost more than they give.
_LARGE_PICTURE = 1 << 19
# The code for "unspecified" in FFmpeg's enumerations of colour.
_UNSPECIFIED = 2


class Decoded(NamedTuple):
    """A frame that came out of a decoder; its pixels are converted only if somebody wants them."""

    rank: int
    write: Callable[[Any], None]
    """Writes RGB into a uint8 array [3, H, W] (display orientation), scaling to its size."""
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

    def decode(self, groups: Iterable[Group]) -> Iterator[Decoded]:
        """Decode groups of a plan one after the other, giving at least their wanted frames.

        Frames come in presentation order; others met on the way may be given, too (they stand in
        for damaged neighbours, and one that is not given counts as lost unless the reader has an
        attribute ``gives_every_frame = False``). A frame that cannot be decoded is left out, not
        raised.
        """
        ...


class Session(Protocol):
    """One open decoder."""

    def run(self, group: Group, skip: Collection[int] = ()) -> Iterator[Decoded]:
        """Decode one group, in any order of groups; see `Reader.decode`.

        Args:
            group: the run.
            skip: decoding positions of packets to leave out (see `foveate.video.table.needed`).
        """
        ...


class SessionReader(Reader, Protocol):
    """A reader of which several decoders may be open at once, each in a thread of its own."""

    @property
    def max_sessions(self) -> int:
        """How many; 1 where the source cannot be opened twice."""
        ...

    def session(self, threads: int, tick: Callable[[], None]) -> AbstractContextManager[Session]:
        """Open a decoder with so many codec threads; it calls `tick` at every packet."""
        ...


class PyAVReader:
    """Reads files through PyAV (FFmpeg).

    Args:
        source: where the bytes are.
        max_pixels: largest picture (pixels) that is decoded; checked before decoding.
        threads: codec threads of a decoder that works alone; 0 lets FFmpeg choose.
        interpolation: swscale filter used where frames are scaled while they are converted.
        max_frames: most packets that are listed.

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
        max_frames: int | None = None,
    ) -> None:
        self.source = source
        self.max_pixels = max_pixels
        self.threads = threads
        self.interpolation = interpolation
        self.max_frames = max_frames
        self._scan: Scan | None = None
        self._head: _Head | None = None

    @property
    def max_sessions(self) -> int:
        """1 for a file object, which has one place to read from."""
        return 1 if self.source.is_shared else 1 << 16

    def scan(self) -> Scan:
        """List the packets; the first picture alone is decoded, for its rotation."""
        if self._scan is None:
            with self.source.open() as container:
                self._scan = self._read_table(container)
                # Opening has cost as much as decoding some ten frames: keep it for the first read.
                if self._can_rewind(self._scan):
                    self.source.keep(container, self._head)
                self._head = None
        return self._scan

    def decode(self, groups: Iterable[Group]) -> Iterator[Decoded]:
        """Decode groups of a plan; see `Reader.decode`."""
        with self.session(self.threads, _no_tick) as session:
            for group in groups:
                yield from session.run(group)

    @contextmanager
    def session(self, threads: int, tick: Callable[[], None]) -> Iterator[PyAVSession]:
        """Open a decoder; see `SessionReader.session`."""
        scan = self.scan()
        with ExitStack() as stack:
            session = PyAVSession(self, scan, stack, threads, tick)
            yield session
            if self._can_rewind(scan):
                session.stream.codec_context.flush_buffers()
                self.source.keep(session.container)

    @staticmethod
    def _can_rewind(scan: Scan) -> bool:
        # Formats with an index; in others, and where an edit list hides the head, a seek to the
        # beginning may miss it.
        name = scan.container
        table = scan.table
        return (
            name.startswith(("mov", "matroska"))
            and table.is_regular
            and len(table) > 0
            and int(table.sorted_position[0]) == 0
        )

    def video_stream(self, container: InputContainer) -> VideoStream:
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
        stream = self.video_stream(container)
        context = stream.codec_context
        found: list[Packet] = []
        discarded = 0
        head = _Head()
        set_threads(context, self.threads)
        parse = PacketParser(context.name, context.extradata)
        layers = []
        for position, packet in enumerate(packets.demux(container, stream)):
            head.add(packet)
            if not head.frames and position < _PROBE_PACKETS:
                head.frames += packets.decode_packet(stream, packet)
                head.count = position + 1
            if position >= (self.max_frames or position + 1):
                raise DecodeLimitError(
                    f"it has more than the {self.max_frames} frames that are allowed",
                    source=self.source.name,
                    limit="frames",
                )
            if packet.is_discard:
                discarded += 1
                continue
            facts = parse(memoryview(packet))
            layers.append(facts.layer)
            # A container's word for "keyframe" is taken back where the bytes say otherwise.
            is_key = packet.is_keyframe and facts.is_entry is not False
            found.append(
                Packet(
                    position,
                    packet.pts,
                    is_key,
                    packet.duration or 0,
                    facts.is_disposable,
                    packet.size,
                )
            )
        if max(layers, default=0) > 0:
            # Pictures of higher sub-layers may refer to any below.
            found = [
                packet._replace(is_disposable=packet.is_disposable and layer == max(layers))
                for packet, layer in zip(found, layers, strict=True)
            ]
        picture: Any = head.frames[0] if head.frames else None
        if picture is None:
            picture = next(packets.decode_packet(stream, None), None)
        else:
            self._head = head
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


class _Head:
    """A short file's packets, of which a decoder has had the first `count` and given `frames`."""

    def __init__(self) -> None:
        self.packets: list[Any] = []
        self.num_bytes = 0
        self.frames: list[VideoFrame] = []
        self.count = 0

    def add(self, packet: Any) -> None:
        self.num_bytes += packet.size
        if self.num_bytes <= _HEAD_BYTES:
            self.packets.append(packet)

    def covers(self, group: Group) -> bool:
        """Whether a run from the head can go on from here."""
        return group.seek_pts is None and self.count <= group.stop < len(self.packets)


class PyAVSession:
    """One open container with its decoder and its converter."""

    container: InputContainer
    stream: VideoStream

    def __init__(
        self,
        reader: PyAVReader,
        scan: Scan,
        stack: ExitStack,
        threads: int,
        tick: Callable[[], None],
    ) -> None:
        self.reader = reader
        self.scan = scan
        self.threads = threads
        self.tick = tick
        self._stack = stack
        # One converter for all frames: setting up swscale costs more than a conversion.
        self.converter = import_av().video.reformatter.VideoReformatter()
        self._count = 0
        # Timestamps of packets of which the container itself says that parts are missing.
        self._incomplete: set[int | None] = set()
        self._open(reuse=True)

    def _open(self, *, reuse: bool) -> None:
        self._stack.close()
        self.container = self._stack.enter_context(self.reader.source.open(reuse=reuse))
        self.stream = self.reader.video_stream(self.container)
        # The decoder of a container that was kept runs already, with the threads it has.
        self._is_fresh = self._is_clean = not self.stream.codec_context.is_open
        # It may even have begun to decode the head, as most requests do.
        self._head: _Head | None = self.reader.source.state_of(self.container)

    def run(self, group: Group, skip: Collection[int] = ()) -> Iterator[Decoded]:
        """Decode one group; see `Session.run`."""
        scan = self.scan
        ranks = scan.table.rank_of_pts
        for frame in self._frames(group, skip):
            if scan.table.by_order:
                rank, self._count = self._count, self._count + 1
            else:
                rank = -1 if frame.pts is None else ranks.get(frame.pts, -1)
            if rank >= group.key_rank:
                write = FrameWriter(
                    frame, self.converter, scan.orientation, self.reader.interpolation
                )
                is_corrupt = bool(frame.is_corrupt) or frame.pts in self._incomplete
                yield Decoded(rank, write, is_corrupt)

    def _frames(self, group: Group, skip: Collection[int]) -> Iterator[VideoFrame]:
        """Frames of one group: packets from its keyframe to its last, then what is left inside."""
        head, self._head = self._head, None
        if head is not None and head.covers(group):
            self._is_clean = False
            self._incomplete.update(p.pts for p in head.packets[: head.count] if p.is_corrupt)
            yield from head.frames
            for position in range(head.count, group.stop + 1):
                self.tick()
                if position not in skip:
                    yield from self._decode(head.packets[position])
            yield from packets.decode_packet(self.stream, None)
            return
        if not self._is_clean:
            # The group before was drained; the decoder accepts nothing until flushed.
            self.stream.codec_context.flush_buffers()
        was_fresh, self._is_fresh, self._is_clean = self._is_fresh, False, False
        num_packets = 0
        run = packets.locate(
            self.container, self.stream, self.scan.table, group, is_fresh=was_fresh
        )
        with closing(run):
            for position, packet in run:
                num_packets += 1
                self.tick()
                if position not in skip:
                    yield from self._decode(packet)
                if position >= group.stop:
                    break
        if not num_packets and not was_fresh and group.seek_pts is None:
            # The head was not found again.
            self._open(reuse=False)
            yield from self._frames(group, skip)
            return
        yield from packets.decode_packet(self.stream, None)

    def _decode(self, packet: Any) -> Iterator[VideoFrame]:
        if packet.is_corrupt and packet.pts is not None:
            self._incomplete.add(packet.pts)
        return packets.decode_packet(self.stream, packet)


def set_threads(context: Any, threads: int) -> None:
    """Codec threads, before the decoder opens: 0 is FFmpeg's choice, frame and slice threading."""
    context.thread_type = "NONE" if threads == 1 else "AUTO"
    # Two more than cores: they work ahead while a picture is being converted, and one more alone
    # leaves a core idle at times (measured on two cores: 2 to 10 % slower on short clips). With
    # large pictures, more than cores compete for the cache (7 % slower where few are converted).
    ahead = 2 if context.width * context.height < _LARGE_PICTURE else 0
    context.thread_count = threads + ahead if threads > 1 else threads


def _no_tick() -> None:
    """For callers that wait in the thread that decodes."""


class FrameWriter:
    """Converts one frame to RGB in a single swscale call, into a given tensor."""

    def __init__(
        self, frame: VideoFrame, converter: Any, orientation: Orientation, interpolation: str
    ) -> None:
        self.frame = frame
        self.converter = converter
        self.orientation = orientation
        self.interpolation = interpolation

    def __call__(self, out_CHW: Any) -> None:
        out_CHW = np.asarray(out_CHW)
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
        if rgb.format.name == "gbrp":
            for row_HW, plane in zip(out_CHW, (2, 0, 1), strict=True):
                np.copyto(row_HW, self.orientation.apply(_rows(rgb.planes[plane])[:, :width]))
            return
        rgb_HWC = _rows(rgb.planes[0])[:, : 3 * width].reshape(height, width, 3)
        np.copyto(out_CHW, self.orientation.apply(rgb_HWC.transpose(2, 0, 1)))

    def _convert(self, height: int, width: int) -> VideoFrame:
        is_scaled = (self.frame.height, self.frame.width) != (height, width)
        # Planes take half the time of packed pixels, with full colour resolution. At full size the
        # filter only spreads colour, and PyAV's own choice gives the pixels that everybody gets.
        # One thread: waking others costs more than a picture this small gains.
        return self.converter.reformat(
            self.frame,
            width,
            height,
            format="gbrp" if is_scaled else "rgb24",
            interpolation=self.interpolation if is_scaled else "BILINEAR",
            threads=1,
        )


def _rows(plane: Any) -> np.ndarray:
    """uint8 [H, S], rows with their padding."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
