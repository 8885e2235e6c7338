"""Damaged and hostile videos, made from small sound ones; each builder says what it does."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

Write = Callable[..., Path]
#: Frames of every sound seed.
FRAMES = 24
FLAT = {"g": "8", "bf": "0", "x264-params": "scenecut=0"}


class Kit:
    """Sound videos, each made once, and a folder to write to."""

    def __init__(self, folder: Path, write: Write) -> None:
        self.folder = folder
        self.write = write
        self._made: dict[str, bytes] = {}

    def seed(self, name: str, **settings: Any) -> bytes:
        """The bytes of a video of a container ("ts"), or of a variant of it ("b.ts")."""
        if name not in self._made:
            settings = {"frames": FRAMES, "options": FLAT, **settings}
            self._made[name] = self.write(self.folder / f"seed-{name}", **settings).read_bytes()
        return self._made[name]

    def mp4(self) -> bytes:
        """Index first."""
        return self.seed("index.mp4", container_options={"movflags": "faststart"})

    def late(self) -> bytes:
        """Index last."""
        return self.seed("late.mp4")

    def ts(self) -> bytes:
        return self.seed("a.ts")

    def mkv(self) -> bytes:
        return self.seed("a.mkv")

    def file(self, name: str, data: bytes = b"") -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def field(data: bytes, name: bytes, offset: int, form: str, *values: int) -> bytes:
    """An MP4 in which numbers behind the first box of a name are others."""
    at = data.index(name) + len(name) + offset
    return patched(data, at, struct.pack(form, *values))


def flipped(data: bytes, first: float, last: float, count: int, seed: int = 0) -> bytes:
    """Some bits flipped between two fractions of the file."""
    dice, found = random.Random(seed), bytearray(data)
    for _ in range(count):
        at = dice.randrange(int(len(data) * first), int(len(data) * last))
        found[at] ^= 1 << dice.randrange(8)
    return bytes(found)


def packets(data: bytes) -> list[tuple[int, int, bool]]:
    """(offset, size, keyframe) of every packet, in decoding order."""
    with av.open(io.BytesIO(data)) as container:
        return [(p.pos, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size]


def wiped(data: bytes, which: Callable[[int, bool], bool]) -> bytes:
    """Packets overwritten by zeros, chosen by their number and whether they are keyframes."""
    found = bytearray(data)
    for number, (pos, size, is_key) in enumerate(packets(data)):
        if which(number, is_key):
            found[pos : pos + size] = bytes(size)
    return bytes(found)


def cut(data: bytes, number: int) -> bytes:
    """A file that ends a few bytes into a packet (frame), counted from 0."""
    return data[: packets(data)[number][0] + 10]


def inverted(data: bytes, which: range) -> bytes:
    """Every bit of some packets flipped."""
    found = bytearray(data)
    for pos, size, _ in packets(data)[which.start : which.stop]:
        found[pos : pos + size] = bytes(255 - byte for byte in found[pos : pos + size])
    return bytes(found)


def ts_without(data: bytes, first: int, last: int) -> bytes:
    """A transport stream that lost packets of 188 bytes."""
    return data[: first * 188] + data[last * 188 :]


def sound(path: Path, cover: bool = False) -> Path:
    """An audio file, with a cover picture or without."""
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        if cover:
            art = out.add_stream("mjpeg")
            art.width, art.height, art.pix_fmt = 64, 64, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
            out.mux(art.encode(picture))
            out.mux(art.encode())
        tone = av.AudioFrame.from_ndarray(
            np.zeros((1, 16384), np.float32), format="fltp", layout="mono"
        )
        tone.sample_rate = 16000
        out.mux(stream.encode(tone))
        out.mux(stream.encode())
    return path


def subtitles(path: Path) -> Path:
    path.write_text("WEBVTT\n\n00:00.000 --> 00:02.000\nhello\n")
    return path


def picture_bytes(form: str, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, form)
    return file.getvalue()


def png_bomb(side: int, animated: bool) -> bytes:
    """A PNG that says it is huge; a few kilobytes of compressed zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    if animated:
        head += chunk(b"acTL", struct.pack(">II", 2, 0))
        head += chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, side, side, 0, 0, 1, 10, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(4_000_000), 9))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def gif(delay: int, frames: int = 6) -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("P", (16, 16), color) for color in range(frames)]
    for number, picture in enumerate(pictures):
        picture.putpalette([number * 20, 0, 0] * 256)
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=delay)
    return file.getvalue()


def zero_delays(data: bytes) -> bytes:
    """A GIF whose graphic controls all ask for no delay."""
    found, at = bytearray(data), 0
    while (at := data.find(b"\x21\xf9\x04", at)) >= 0:
        found[at + 4 : at + 6] = b"\0\0"
        at += 3
    return bytes(found)


def gif_size(data: bytes, side: int) -> bytes:
    return patched(data, 6, struct.pack("<HH", side, side))


def gzip_bomb() -> bytes:
    return gzip.compress(bytes(30_000_000), 9)


def unsized_clusters(data: bytes) -> bytes:
    """A Matroska as live recorders write it: segment and clusters of unknown size."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(
            file,
            "w",
            format="matroska",
            container_options={"live": "1", "cluster_time_limit": "500"},
        ) as out,
    ):
        track = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = track
                out.mux(packet)
    return file.getvalue()


def remuxed(data: bytes, form: str, times: Callable[[int, int], int]) -> bytes:
    """The packets of a video with other timestamps: times(number, pts) in ticks."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=form) as out:
        track = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = times(number, packet.pts)
                packet.stream = track
                out.mux(packet)
    return file.getvalue()


def timed(kit: Kit, name: str, ticks: list[int]) -> bytes:
    """A video with frames at these milliseconds."""
    return kit.seed(name, pts=ticks, time_base=Fraction(1, 1000), frames=len(ticks))


def deep_boxes(depth: int) -> bytes:
    """Boxes in boxes in boxes."""
    body = b""
    for _ in range(depth):
        body = box(b"moov", body)
    return box(b"ftyp", b"isom\0\0\2\0isom") + body


def foreign_reference(data: bytes, path: str) -> bytes:
    """An MP4 whose data are said to lie in another file."""
    at = data.index(b"dref") - 4
    size = struct.unpack_from(">I", data, at)[0]
    name = path.encode() + b"\0"
    entry = box(b"url ", b"\0\0\0\0" + name)
    new = box(b"dref", struct.pack(">II", 0, 1) + entry)
    grown = len(new) - size
    found = bytearray(data[:at] + new + data[at + size :])
    for parent in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = found.index(parent) - 4
        old = struct.unpack_from(">I", found, place)[0]
        struct.pack_into(">I", found, place, old + grown)
    # Chunk offsets move with the index in front of them.
    place = found.index(b"stco") + 8
    for number in range(struct.unpack_from(">I", found, place)[0]):
        at = place + 4 + 4 * number
        struct.pack_into(">I", found, at, struct.unpack_from(">I", found, at)[0] + grown)
    return bytes(found)


def symlink(kit: Kit, name: str, target: str) -> Path:
    path = kit.folder / name
    path.symlink_to(target)
    return path


def fifo(kit: Kit) -> Path:
    path = kit.folder / "fifo.mp4"
    os.mkfifo(path)
    return path


def forbidden(kit: Kit) -> Path:
    path = kit.file("forbidden.mp4", kit.mp4())
    path.chmod(0)
    return path


def wrong_cues(data: bytes) -> bytes:
    """A Matroska whose list of keyframes is nonsense."""
    at = data.rindex(b"\x1c\x53\xbb\x6b")
    return flipped(data, (at + 5) / len(data), 1, 50)


def nan_duration(data: bytes) -> bytes:
    at = data.index(b"\x44\x89\x88")
    return patched(data, at + 3, struct.pack(">d", float("nan")))


def no_frames(data: bytes) -> bytes:
    """An MP4 whose sample table is empty."""
    for name, offset in ((b"stts", 4), (b"stsc", 4), (b"stsz", 8), (b"stco", 4), (b"ctts", 4)):
        if name in data:
            data = field(data, name, offset, ">I", 0)
    return data
