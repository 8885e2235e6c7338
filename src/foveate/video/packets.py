"""Packets of one video track through PyAV: reading, finding and decoding them, come what may."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from foveate.video.orientation import Orientation
from foveate.video.source import import_av
from foveate.video.table import Group, PacketTable

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# A demuxer that fails over and over on one file is given up.
_DEMUX_ATTEMPTS = 8
# AV_DISPOSITION_ATTACHED_PIC
_ATTACHED_PICTURE = 0x400
# Frames to go back before a keyframe that a seek has overshot.
_SEEK_BACK = 64


def is_cover(stream: VideoStream) -> bool:
    """Whether a "video" track is the cover picture of a music file."""
    return bool(int(getattr(stream, "disposition", 0)) & _ATTACHED_PICTURE)


def orientation(frame: VideoFrame) -> Orientation:
    """How a decoded frame is to be turned."""
    side_data: Any = frame.side_data
    for data in side_data:
        if "DISPLAYMATRIX" in str(data.type):
            return Orientation.from_matrix(bytes(data))
    return Orientation()


def demux(container: InputContainer, stream: VideoStream) -> Iterator[Any]:
    """Packets of one track in file order; a broken place is passed, a hopeless file ends here."""
    av = import_av()
    failures = 0
    while failures < _DEMUX_ATTEMPTS:
        try:
            for packet in container.demux(stream):
                if packet.size:
                    failures = 0
                    yield packet
            return
        except av.error.FFmpegError:
            failures += 1
        except IndexError:
            # PyAV knows no track that turns up after the header (transport streams); that packet
            # is gone, the next call goes on after it.
            continue


def decode_packet(stream: VideoStream, packet: Any) -> Iterator[VideoFrame]:
    """Frames that a packet (None: the end) sets free; what does not decode is left out."""
    av = import_av()
    try:
        yield from stream.codec_context.decode(packet)
    except av.error.FFmpegError as error:
        # Out of memory is no damage: going on would lose frames without a word.
        if isinstance(error, MemoryError):
            raise


def locate(
    container: InputContainer,
    stream: VideoStream,
    table: PacketTable,
    group: Group,
    *,
    is_fresh: bool = True,
) -> Generator[tuple[int, Any]]:
    """(position, packet) from the group's first packet on, wherever the seek lands.

    Demuxers land early, late or between keyframes, depending on the container. Packets before
    the wanted one are passed over undecoded; after a late landing the search starts farther ahead,
    at last at the head of the file. A container that was read before (not ``is_fresh``) may fail to
    find the head again; then nothing is given.
    """
    av = import_av()
    if group.seek_pts is None and is_fresh:
        yield from enumerate(demux(container, stream))
        return
    head = int(table.pts_F[table.rank_by_position[0]])
    if group.seek_pts is None:
        targets = [head]
    else:
        earlier = int(table.pts_F[max(group.key_rank - _SEEK_BACK, 0)])
        targets = [group.seek_pts, earlier, int(table.pts_F[0])]
    for target in targets:
        with suppress(av.error.FFmpegError):
            container.seek(target, stream=stream, backward=True)
        position = -1
        for packet in demux(container, stream):
            known = table.position_of_pts.get(packet.pts)
            if position < 0 and (known is None or known < group.start):
                continue
            if position < 0 and known != group.start:
                break
            position = position + 1 if known is None else known
            yield position, packet
        if position >= 0:
            return


def lost_frames(
    container: InputContainer, stream: VideoStream, table: PacketTable, num_packets: int
) -> int:
    """Frames that the header promises and the file lacks; an estimate where it counts seconds."""
    name = container.format.name
    if name.startswith("mov"):
        # The sample index, after edit lists; not the header's count, which ignores them.
        return max(len(getattr(stream, "index_entries", ())) - num_packets, 0)
    if len(table) < 2:
        return 0
    seconds = None
    if name == "avi" and stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif name.startswith("matroska") and len(container.streams) == 1 and container.duration:
        seconds = container.duration / 1e6
    if seconds is None:
        return 0
    # Some writers count the duration from time zero, others from the first frame.
    present = max(table.duration, float(table.end_pts * table.time_base))
    lost = round((seconds - present) * len(table) / table.duration)
    # A frame or two is rounding, or the duration of the last frame.
    return lost if lost > max(2, 0.01 * len(table)) else 0
