"""Every damaged or hostile input ends in what is stated here: a typed error, or what is left.

The table names the input, what `Clip` makes of it, and where it says so, what a process of its own
(`isolate=True`) and `Live` do. None may hang, crash, print or raise anything but a `VideoError`.
"""

from __future__ import annotations

import gzip
import os
import random
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")
sys.path.insert(0, str(Path(__file__).parent))

import hostile_inputs as hostile
from hostile_inputs import FLAT, FRAMES, Kit

from foveate.errors import (
    DamagedVideoError,
    DamagedVideoWarning,
    DecodeLimitError,
    EmptyVideoError,
    FrameTooLargeError,
    NoVideoStreamError,
    TruncatedVideoError,
    UnsupportedVideoError,
    VideoError,
    VideoNotFoundError,
    VideoSourceError,
)
from foveate.video import Clip, Limits, Live

pytestmark = pytest.mark.timeout(60)
POSIX = os.name == "posix"


@dataclass(frozen=True)
class Fails:
    """It cannot be used, and this error says why."""

    error: type[VideoError]
    words: str


@dataclass(frozen=True)
class Gives:
    """Frames come out; the report says what is lost ("": nothing)."""

    frames: int
    damage: str = ""
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: what is wrong.
        make: gives a path or bytes.
        outcome: of `Clip`, and of `Clip(isolate=True)` if ``apart``.
        live: of `Live` on the bytes; None: not tried.
        needs: reason why it cannot be tried here; empty if it can.
    """

    name: str
    make: Callable[[Kit], Any]
    outcome: Fails | Gives
    live: Fails | Gives | None = None
    apart: bool = False
    needs: str = ""


NOT_A_VIDEO = Fails(UnsupportedVideoError, "not a video in a known container")
A_PICTURE = Fails(UnsupportedVideoError, "this is a picture")
CUT_HEADER = Fails(TruncatedVideoError, "cut off or broken")
NO_TRACK = Fails(TruncatedVideoError, "ends before any usable track")
LATE_INDEX = Fails(TruncatedVideoError, "index comes behind its data")
NOTHING_LIVE = Fails(EmptyVideoError, "no picture came out")
ALL = Gives(FRAMES)
posix = "" if POSIX else "a POSIX system"
no_root = "" if POSIX and os.geteuid() else "a user without all rights"

B_FRAMES = {"g": "8", "bf": "3", "x264-params": "scenecut=0"}
FIRST = {"container_options": {"movflags": "faststart"}}


CASES = [
    # -- no video at all
    Case("empty", lambda k: k.file("empty.mp4"), Fails(EmptyVideoError, "0 bytes"), apart=True),
    Case("one byte", lambda k: b"x", NOT_A_VIDEO, NOT_A_VIDEO),
    Case("noise", lambda k: random.Random(1).randbytes(20_000), NOT_A_VIDEO, NOT_A_VIDEO, True),
    Case("text as mp4", lambda k: k.file("text.mp4", b"no video, just words\n" * 99), NOT_A_VIDEO),
    Case("png as mp4", lambda k: k.file("a.mp4", hostile.picture_bytes("PNG")), A_PICTURE),
    Case("jpeg as mkv", lambda k: k.file("a.mkv", hostile.picture_bytes("JPEG")), A_PICTURE),
    Case("webp", lambda k: hostile.picture_bytes("WEBP"), A_PICTURE, A_PICTURE),
    Case("tiff", lambda k: hostile.picture_bytes("TIFF"), A_PICTURE, A_PICTURE),
    Case("svg", lambda k: b"<svg xmlns='http://www.w3.org/2000/svg'/>" * 30, NOT_A_VIDEO),
    Case("subtitles", lambda k: hostile.subtitles(k.folder / "s.mp4"), NOT_A_VIDEO),
    Case("gzip of a video", lambda k: gzip.compress(k.mp4()), NOT_A_VIDEO, NOT_A_VIDEO),
    Case("gzip bomb", lambda k: hostile.gzip_bomb(), NOT_A_VIDEO, NOT_A_VIDEO, True),
    Case(
        "sound alone",
        lambda k: hostile.sound(k.folder / "sound.m4a"),
        Fails(NoVideoStreamError, "audio file"),
    ),
    Case(
        "cover art",
        lambda k: hostile.sound(k.folder / "cover.m4a", cover=True),
        Fails(NoVideoStreamError, "audio file"),
        apart=True,
    ),
    Case(
        "wav without an end",
        lambda k: (
            b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data"
            + b"\xff\xff\xff\xff"
            + bytes(2000)
        ),
        Fails(NoVideoStreamError, "audio file"),
        Fails(NoVideoStreamError, "sound alone"),
    ),
    # -- things that lead elsewhere
    Case(
        "hls playlist",
        lambda k: k.file("list.mp4", b"#EXTM3U\n#EXTINF:4,\n/etc/passwd\n#EXT-X-ENDLIST\n" * 9),
        NOT_A_VIDEO,
        NOT_A_VIDEO,
        True,
    ),
    Case(
        "concat script",
        lambda k: b"ffconcat version 1.0\nfile /etc/passwd\n" * 20,
        NOT_A_VIDEO,
        NOT_A_VIDEO,
    ),
    Case(
        "session description",
        lambda k: b"v=0\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n",
        NOT_A_VIDEO,
        NOT_A_VIDEO,
    ),
    Case(
        "dash manifest",
        lambda k: b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'/>" * 9,
        NOT_A_VIDEO,
        NOT_A_VIDEO,
    ),
    Case("data in another file", lambda k: hostile.foreign_reference(k.mp4(), "/etc/passwd"), ALL),
    Case(
        "concat: address",
        lambda k: "concat:a.mp4|b.mp4",
        Fails(VideoNotFoundError, "no such file"),
        Fails(VideoSourceError, "not allowed"),
    ),
    Case("missing", lambda k: k.folder / "no.mp4", Fails(VideoNotFoundError, "no such file")),
    Case("directory", lambda k: k.folder, Fails(VideoSourceError, "directory"), apart=True),
    Case("nul in the name", lambda k: "nul\0.mp4", Fails(VideoNotFoundError, "cannot read it")),
    Case("endless name", lambda k: "a" * 9000, Fails(VideoNotFoundError, "cannot read it")),
    Case("fifo", hostile.fifo, Fails(VideoSourceError, "regular file"), needs=posix),
    Case(
        "device",
        lambda k: Path("/dev/zero"),
        Fails(VideoSourceError, "regular file"),
        Fails(VideoSourceError, "name its format"),
        needs=posix,
    ),
    Case(
        "symlink loop",
        lambda k: hostile.symlink(k, "loop.mp4", "loop.mp4"),
        Fails(VideoNotFoundError, "cannot read it"),
        needs=posix,
    ),
    Case(
        "dangling symlink",
        lambda k: hostile.symlink(k, "dangling.mp4", "nowhere.mp4"),
        Fails(VideoNotFoundError, "no such file"),
        needs=posix,
    ),
    Case(
        "no permission",
        lambda k: hostile.forbidden(k),
        Fails(VideoSourceError, "no permission"),
        needs=no_root,
    ),
    Case("odd characters", lambda k: k.file("a %03d 'q\"\n;ü*?.mp4", k.mp4()), ALL, needs=posix),
    Case("name like an address", lambda k: k.file("concat:a|b.mp4", k.mp4()), ALL, needs=posix),
    Case(
        "name that is no text",
        lambda k: k.file(os.fsdecode(b"\xff\xfe.mp4"), k.mp4()),
        ALL,
        needs="" if sys.platform == "linux" else "Linux",
    ),
    # -- bombs
    Case("png bomb", lambda k: hostile.png_bomb(30_000, False), A_PICTURE, A_PICTURE, True),
    Case("apng bomb", lambda k: hostile.png_bomb(30_000, True), A_PICTURE, A_PICTURE),
    Case(
        "gif bomb",
        lambda k: hostile.gif_size(hostile.gif(50), 12_000),
        Fails(FrameTooLargeError, "12000x12000"),
        Fails(FrameTooLargeError, "12000x12000"),
        True,
    ),
    Case(
        "gif beyond all bounds",
        lambda k: hostile.gif_size(hostile.gif(50), 60_000),
        Fails(EmptyVideoError, "picture size"),
        NOTHING_LIVE,
    ),
    Case(
        "raw video of huge frames",
        lambda k: b"YUV4MPEG2 W99999 H99999 F25:1 Ip C420\nFRAME\n" + bytes(999),
        NOT_A_VIDEO,
        NOT_A_VIDEO,
    ),
    Case(
        "table of two billion entries",
        lambda k: hostile.field(k.mp4(), b"stts", 4, ">I", 0x7FFFFFFF),
        Fails(DecodeLimitError, "memory"),
        Fails(DecodeLimitError, "more memory than there is"),
        True,
    ),
    Case("boxes in boxes", lambda k: hostile.deep_boxes(2000), CUT_HEADER, CUT_HEADER, True),
    Case("huge ebml header", lambda k: b"\x1aE\xdf\xa3\1" + b"\xff" * 6 + bytes(5000), CUT_HEADER),
    # -- cut off
    Case(
        "mp4 cut in its data",
        lambda k: hostile.cut(k.mp4(), 7),
        Gives(8, "ends about 16"),
        Gives(7),
    ),
    Case("mp4 cut in its index", lambda k: k.mp4()[:300], NO_TRACK, apart=True),
    Case("late index, cut before", lambda k: hostile.cut(k.late(), 12), CUT_HEADER, LATE_INDEX),
    Case("late index, cut inside", lambda k: k.late()[:-200], CUT_HEADER, LATE_INDEX),
    Case("mkv cut", lambda k: hostile.cut(k.mkv(), 7), Gives(7, "ends about 17"), Gives(7), True),
    Case("mkv cut in its header", lambda k: k.mkv()[:100], CUT_HEADER, CUT_HEADER),
    Case(
        "clusters without a size, cut",
        lambda k: hostile.cut(hostile.unsized_clusters(k.mkv()), 7),
        Gives(7),
        Gives(7),
    ),
    Case(
        "ts cut inside a packet",
        lambda k: hostile.cut(k.ts(), 11),
        Gives(11),
        Gives(11),
    ),
    Case("ts cut in its tables", lambda k: k.ts()[: 188 * 2], NOT_A_VIDEO, NOT_A_VIDEO),
    Case(
        "avi cut",
        lambda k: hostile.cut(k.seed("a.avi", codec="mpeg4", options={"g": "8"}), 7),
        Gives(8, "before its header says"),
        Gives(8),
    ),
    Case("nothing but ftyp", lambda k: hostile.box(b"ftyp", b"isom\0\0\2\0isom"), CUT_HEADER),
    Case(
        "box of four exabytes",
        lambda k: (
            hostile.box(b"ftyp", b"isom\0\0\2\0isom") + struct.pack(">I4sQ", 1, b"moov", 1 << 62)
        ),
        NO_TRACK,
        Fails(NoVideoStreamError, "no track"),
    ),
    # -- flipped bits and lying headers
    Case("bits flipped in the header", lambda k: k.mp4().replace(b"trak", b"tsak"), NO_TRACK),
    Case(
        "bits flipped in the index",
        lambda k: k.mp4().replace(b"stbl", b"stcl"),
        Fails(UnsupportedVideoError, "no decoder"),
        apart=True,
    ),
    Case(
        "bits flipped in the middle",
        lambda k: hostile.inverted(k.mp4(), range(8, 16)),
        Gives(FRAMES, "8 of 24 frames did not decode"),
        Gives(16),
        True,
    ),
    Case(
        "index of too many frames",
        lambda k: hostile.field(k.mp4(), b"stsz", 8, ">I", 0x7FFFFFFF),
        CUT_HEADER,
    ),
    Case(
        "frame of two gigabytes",
        lambda k: hostile.field(k.mp4(), b"stsz", 52, ">I", 0x7FFFFFFF),
        Gives(10),
        Gives(10),
    ),
    Case(
        "more times than frames",
        lambda k: hostile.field(k.mp4(), b"stts", 8, ">I", 0x7FFFFFFF),
        ALL,
        ALL,
    ),
    Case(
        "frames beyond the end",
        lambda k: hostile.field(k.mp4(), b"stco", 8, ">I", 0x7FFFFF00),
        Fails(EmptyVideoError, "no frames"),
        NOTHING_LIVE,
        True,
    ),
    Case(
        "frames inside the index",
        lambda k: hostile.field(k.mp4(), b"stco", 8, ">I", 0),
        Fails(DamagedVideoError, "none of the 24"),
        NOTHING_LIVE,
        True,
    ),
    Case(
        "huge size in the header",
        lambda k: hostile.field(k.mp4(), b"avc1", 24, ">HH", 65535, 65535),
        Gives(FRAMES, size=(48, 64)),
    ),
    Case(
        "zero time scale",
        lambda k: hostile.field(k.mp4(), b"mdhd", 12, ">I", 0),
        Gives(1),
        Gives(1),
    ),
    Case("endless duration", lambda k: hostile.field(k.mp4(), b"mdhd", 16, ">I", 0xFFFFFFFF), ALL),
    Case(
        "turned by 45 degrees",
        lambda k: hostile.field(
            k.mp4(), b"tkhd", 40, ">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30
        ),
        Gives(FRAMES, size=(48, 64)),
    ),
    Case(
        "matrix of zeros",
        lambda k: hostile.field(k.mp4(), b"tkhd", 40, ">9i", *[0] * 9),
        Gives(FRAMES, size=(48, 64)),
    ),
    Case(
        "edit list that points outside",
        lambda k: hostile.field(k.mp4(), b"elst", 8, ">Ii", 1000, 999_999),
        Fails(EmptyVideoError, "no frames"),
        NOTHING_LIVE,
    ),
    Case(
        "edit list before the beginning",
        lambda k: hostile.field(k.mp4(), b"elst", 8, ">Ii", 1000, -2),
        Gives(10),
    ),
    Case(
        "two indexes",
        lambda k: k.late() + k.late()[k.late().index(b"moov") - 4 :],
        ALL,
        LATE_INDEX,
    ),
    Case("two files in one", lambda k: k.mp4() * 2, ALL, ALL),
    Case(
        "video called sound",
        lambda k: hostile.field(k.mp4(), b"hdlr", 8, ">4s", b"soun"),
        Fails(NoVideoStreamError, "audio file"),
    ),
    Case(
        "unknown codec",
        lambda k: k.mp4().replace(b"avc1", b"zzzz"),
        Fails(UnsupportedVideoError, "no decoder"),
        Fails(UnsupportedVideoError, "no decoder"),
        True,
    ),
    Case(
        "codec header wiped",
        lambda k: hostile.field(k.mp4(), b"avcC", 0, ">12s", bytes(12)),
        Fails(DamagedVideoError, "none of the 24"),
        NOTHING_LIVE,
    ),
    Case("wrong cues", lambda k: hostile.wrong_cues(k.mkv()), ALL, ALL),
    Case("duration that is no number", lambda k: hostile.nan_duration(k.mkv()), ALL, ALL),
    # -- frames that are missing
    Case(
        "first keyframe missing",
        lambda k: hostile.wiped(k.mp4(), lambda n, key: n == 0),
        Gives(FRAMES, "8 of 24 frames did not decode"),
        Gives(16),
    ),
    Case(
        "all keyframes missing",
        lambda k: hostile.wiped(k.mp4(), lambda n, key: key),
        Fails(DamagedVideoError, "none of the 24"),
        NOTHING_LIVE,
        True,
    ),
    Case(
        "nothing but keyframes",
        lambda k: hostile.wiped(k.mp4(), lambda n, key: not key),
        Gives(FRAMES, "21 of 24 frames did not decode"),
        Gives(3),
    ),
    Case(
        "nothing but B-frames",
        lambda k: hostile.wiped(
            k.seed("b.mp4", options=B_FRAMES, **FIRST), lambda n, key: n % 4 in (0, 1)
        ),
        Fails(DamagedVideoError, "none of the 24"),
        NOTHING_LIVE,
    ),
    Case(
        "everything wiped",
        lambda k: hostile.wiped(k.mp4(), lambda n, key: True),
        Fails(DamagedVideoError, "none of the 24"),
        NOTHING_LIVE,
    ),
    Case(
        "ts with lost packets",
        lambda k: hostile.ts_without(k.ts(), 20, 26),
        Gives(FRAMES - 1, "follow a damaged one"),
        Gives(FRAMES - 1),
        True,
    ),
    Case("ts without its tables", lambda k: k.ts()[188 * 3 :], ALL, ALL),
    Case("garbage before a ts", lambda k: b"garbage" * 100 + k.ts(), ALL, ALL),
    Case(
        "no frame at all",
        lambda k: hostile.no_frames(k.mp4()),
        Fails(EmptyVideoError, "no frames"),
        NOTHING_LIVE,
    ),
    # -- odd times
    Case(
        "times before zero",
        lambda k: hostile.remuxed(k.mp4(), "matroska", lambda n, pts: pts - 5000),
        ALL,
        ALL,
    ),
    Case(
        "one time for all",
        lambda k: hostile.remuxed(k.mkv(), "nut", lambda n, pts: 0),
        ALL,
        ALL,
    ),
    Case(
        "frames that last no time",
        lambda k: hostile.field(k.mp4(), b"stts", 12, ">I", 0),
        ALL,
        ALL,
    ),
    Case(
        "frames that last less than nothing",
        lambda k: hostile.field(k.mp4(), b"stts", 12, ">i", -5),
        ALL,
        ALL,
    ),
    Case(
        "a leap of eleven days",
        lambda k: hostile.timed(
            k, "leap.mkv", [*range(0, 1200, 100), *range(10**9, 10**9 + 1200, 100)]
        ),
        ALL,
        ALL,
        True,
    ),
    Case(
        "a recording that begins anew",
        lambda k: k.ts() * 2,
        Gives(2 * FRAMES, "follow a damaged one"),
        Gives(2 * FRAMES),
        True,
    ),
    Case("gif without delays", lambda k: hostile.zero_delays(hostile.gif(50)), Gives(6), Gives(6)),
    Case("a single frame", lambda k: k.seed("one.mp4", frames=1, **FIRST), Gives(1), Gives(1)),
    # -- odd pictures
    Case(
        "another size on the way",
        lambda k: k.ts() + k.seed("big.ts", width=96, height=80),
        Gives(2 * FRAMES, "follow a damaged one", size=(48, 64)),
        Gives(2 * FRAMES),
        True,
    ),
    Case(
        "another codec on the way",
        lambda k: k.ts() + k.seed("m2.ts", codec="mpeg2video", rate=25, options={}),
        Gives(47, "did not decode"),
        Gives(25),
    ),
    Case(
        "grey", lambda k: k.seed("g.mkv", codec="ffv1", pixel_format="gray", options={}), ALL, ALL
    ),
    Case(
        "grey in 16 bits",
        lambda k: k.seed("g16.mkv", codec="ffv1", pixel_format="gray16le", options={}),
        ALL,
        ALL,
    ),
    Case("colour in full", lambda k: k.seed("444.mkv", pixel_format="yuv444p"), ALL, ALL),
    Case("ten bits", lambda k: k.seed("10.mkv", pixel_format="yuv420p10le"), ALL, ALL),
    Case(
        "alpha",
        lambda k: k.seed("alpha.mkv", codec="ffv1", pixel_format="yuva420p", options={}),
        ALL,
        ALL,
    ),
    Case(
        "alpha in rgb",
        lambda k: k.seed("alpha.mov", codec="qtrle", pixel_format="argb", options={}, **FIRST),
        ALL,
        ALL,
    ),
    Case(
        "interlaced",
        lambda k: k.seed("i.ts", codec="mpeg2video", rate=25, options={"flags": "+ildct+ilme"}),
        ALL,
        ALL,
    ),
    Case("rotated", lambda k: k.seed("r.mp4", rotation=90, **FIRST), Gives(FRAMES, size=(64, 48))),
    Case(
        "one pixel",
        lambda k: k.seed("1.mkv", codec="ffv1", width=1, height=1, options={}),
        Gives(FRAMES, size=(1, 1)),
        ALL,
    ),
    Case(
        "odd sides",
        lambda k: k.seed("17.mkv", codec="ffv1", width=17, height=13, options={}),
        Gives(FRAMES, size=(13, 17)),
        ALL,
    ),
    Case("no container", lambda k: k.seed("raw.264", container="h264"), ALL, ALL),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, written: Callable[..., Path]) -> Kit:
    return Kit(tmp_path_factory.mktemp("hostile"), written)


def names(cases: list[Case]) -> list[Any]:
    return [
        pytest.param(
            case,
            id=case.name.replace(" ", "-"),
            marks=[pytest.mark.skip(reason=f"needs {case.needs}")] if case.needs else [],
        )
        for case in cases
    ]


def test_there_are_as_many_as_claimed() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100


def check(outcome: Fails | Gives, source: Any, **options: Any) -> None:
    """What a clip does, to the letter of its outcome."""

    def read() -> tuple[Clip, Any]:
        clip = Clip(source, max_pixels=1 << 20, max_bytes=1 << 26, timeout=30, **options)
        return clip, clip.take(range(len(clip)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(outcome, Fails):
            with pytest.raises(outcome.error, match=outcome.words) as raised:
                read()
            assert type(raised.value) is outcome.error
            assert raised.value.source
            return
        clip, frames = read()
    assert len(frames) == len(clip) == outcome.frames
    assert bool(torch.all(frames.seconds.diff() > 0))
    assert bool(frames.damage) == bool(outcome.damage)
    assert outcome.damage in frames.damage.reason
    told = [str(w.message) for w in caught if issubclass(w.category, DamagedVideoWarning)]
    assert bool(told) == bool(outcome.damage)
    if outcome.size is not None:
        assert (frames.height, frames.width) == outcome.size


@pytest.mark.parametrize("case", names(CASES))
def test_clip(case: Case, kit: Kit) -> None:
    check(case.outcome, case.make(kit))


@pytest.mark.skipif(not POSIX, reason="processes are limited on POSIX systems only")
@pytest.mark.parametrize("case", names([case for case in CASES if case.apart]))
def test_clip_in_a_process_of_its_own(case: Case, kit: Kit) -> None:
    check(case.outcome, case.make(kit), isolate=Limits(memory=1 << 30, seconds=40))


@pytest.mark.parametrize("case", names([case for case in CASES if case.live is not None]))
def test_live(case: Case, kit: Kit) -> None:
    import io

    source = case.make(kit)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    outcome = case.live
    if isinstance(outcome, Fails):
        with pytest.raises(outcome.error, match=outcome.words):
            list(Live(source, max_pixels=1 << 20, timeout=20))
        return
    assert outcome is not None
    live = Live(source, max_pixels=1 << 20, timeout=20)
    seconds = torch.cat([frames.seconds for frames in live])
    assert len(seconds) == live.report.given == outcome.frames
    assert bool(torch.all(seconds.diff() > 0))
    assert live.report.ended in ("the source ended", "the file ends here")


# -- while it is read -----------------------------------------------------------------------------


@pytest.fixture
def nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short files are kept in memory after they were listed; these tests are about longer ones."""
    from foveate.video import decode

    monkeypatch.setattr(decode, "_HEAD_BYTES", 0)


def long_clip(kit: Kit, name: str) -> Path:
    return kit.file(
        name, kit.seed("long.mkv", frames=300, width=160, height=120, options={**FLAT, "crf": "1"})
    )


@pytest.mark.skipif(not POSIX, reason="open files can be deleted on POSIX systems only")
@pytest.mark.usefixtures("nothing_in_memory")
def test_deleted_while_it_is_read(kit: Kit) -> None:
    path = long_clip(kit, "deleted.mkv")
    clip = Clip(path, threads=1)
    with clip.stream(chunk=4, ahead=0) as stream:
        count = len(next(stream))
        path.unlink()
        try:
            count += sum(len(frames) for frames in stream)
        except VideoError as error:  # a decoder that had to open it again
            assert "deleted.mkv" in str(error)
        else:
            assert count == 300
    with pytest.raises(VideoNotFoundError):
        Clip(path)


@pytest.mark.parametrize("left", [0, 2000])
@pytest.mark.usefixtures("nothing_in_memory")
def test_cut_back_while_it_is_read(left: int, kit: Kit) -> None:
    path = long_clip(kit, f"cut{left}.mkv")
    clip = Clip(path, threads=1, timeout=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        with clip.stream(chunk=4, ahead=0) as stream:
            found = [next(stream)]
            with path.open("r+b") as file:
                file.truncate(left)
            try:
                found += list(stream)
            except VideoError as error:
                assert error.reason
            else:
                assert sum(len(frames) for frames in found) == 300
                assert any(frames.damage for frames in found)


def test_another_file_in_its_place(kit: Kit) -> None:
    path = long_clip(kit, "other.mkv")
    clip = Clip(path, threads=1, timeout=20)
    path.write_bytes(kit.mkv())  # the same name, but 24 other frames
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        for wanted in ([0], [0, 299], [290, 299]):
            try:
                frames = clip.take(wanted)
            except VideoError as error:
                assert error.reason
            else:
                assert len(frames) == len(wanted)


def test_a_file_object_that_lies(kit: Kit) -> None:
    import io

    class Liar(io.BytesIO):
        """Gives other bytes at every second read, and fails at last."""

        reads = 0

        def read(self, count: int | None = -1) -> bytes:
            self.reads += 1
            if self.reads > 200:
                raise OSError("enough")
            found = super().read(count)
            return found if self.reads % 2 else found[::-1]

    try:
        clip = Clip(Liar(kit.mkv()), timeout=20)
        clip.take(range(len(clip)))
    except (VideoError, OSError) as error:
        assert str(error)


# -- on the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["show", "ask"])
@pytest.mark.parametrize(
    "name",
    ["empty", "text as mp4", "mp4 cut in its index", "cover art", "gif bomb", "hls playlist"],
)
def test_the_command_says_so_in_one_line(
    command: str,
    name: str,
    kit: Kit,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("typer")
    from foveate.cli import main

    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(kit.folder)
    (case,) = [case for case in CASES if case.name == name]
    source = case.make(kit)
    if isinstance(source, bytes):
        source = kit.file("command.mp4", source)
    question = ["what is blue ?"] if command == "ask" else []
    code = main([command, str(source), *question])
    out, err = capsys.readouterr()
    assert code == 2
    assert not out
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ")
    assert Path(source).name in line
