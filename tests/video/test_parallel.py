"""Decoding side by side gives what decoding in a row gives, and ends whatever happens."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from foveate.errors import (
    DamagedVideoError,
    DamagedVideoWarning,
    DecoderFailedError,
    DecodeStalledError,
    FrameRequestError,
    VideoError,
    VideoSourceError,
)
from foveate.video import Clip, jobs, parallel
from foveate.video.decode import PyAVReader, PyAVSession
from foveate.video.idle import IDLE, IdleContainers
from foveate.video.source import MediaSource

av = pytest.importorskip("av")
pytestmark = pytest.mark.timeout(60)

B_FRAMES = {"g": "12", "bf": "3", "x264-params": "scenecut=0"}
TICKS = np.cumsum([5000] + [40, 40, 200, 1000, 20] * 10)[:50].tolist()
KINDS = {
    "b_frames.mp4": {"options": B_FRAMES},
    "no_b_frames.mp4": {"options": {"g": "10", "bf": "0"}},
    "pyramid.mp4": {"options": {"g": "25", "bf": "7", "x264-params": "b-pyramid=strict:b-adapt=0"}},
    "open_gop.mkv": {
        "options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}
    },
    "open_gop.mp4": {
        "options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}
    },
    "refreshes_itself.mkv": {
        "options": {"g": "12", "bf": "0", "x264-params": "intra-refresh=1:keyint=12:scenecut=0"}
    },
    "all_keyframes.mp4": {"options": {"g": "1"}},
    "one_group.mp4": {"options": {"g": "250", "bf": "2"}},
    "annexb.ts": {"options": B_FRAMES},
    "variable_rate.mkv": {
        "options": B_FRAMES,
        "pts": TICKS,
        "time_base": Fraction(1, 1000),
        "rate": 50,
    },
    "late_start.ts": {
        "options": B_FRAMES,
        "pts": TICKS,
        "time_base": Fraction(1, 1000),
        "rate": 50,
    },
    "edit_list.mp4": {
        "options": B_FRAMES,
        "pts": TICKS,
        "time_base": Fraction(1, 1000),
        "rate": 50,
    },
    "turned.mp4": {"options": B_FRAMES, "rotation": 90},
    "odd_size.mp4": {"options": B_FRAMES, "width": 65, "height": 47, "pixel_format": "yuv444p"},
    "ten_bits.mp4": {"options": B_FRAMES, "pixel_format": "yuv420p10le"},
    "hevc.mp4": {
        "codec": "libx265",
        "options": {"x265-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:log-level=none"},
    },
    "hevc_layers.mkv": {
        "codec": "libx265",
        "options": {
            "x265-params": "keyint=16:min-keyint=16:bframes=3:temporal-layers=1:log-level=none"
        },
    },
    "hevc_ten_bits.mkv": {
        "codec": "libx265",
        "pixel_format": "yuv420p10le",
        "options": {"x265-params": "keyint=12:min-keyint=12:open-gop=0:log-level=none"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "10", "preset": "12"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "10", "bf": "2"}},
    "mpeg2.mkv": {"codec": "mpeg2video", "rate": 25, "options": {"g": "12", "bf": "2"}},
}


@pytest.fixture
def eager(monkeypatch):
    """Cut clips wherever they can be cut, as if opening a file and seeking cost nothing."""
    monkeypatch.setattr(jobs, "_OPEN", -(10**9))
    monkeypatch.setattr(jobs, "_SMALLEST", 1)
    monkeypatch.setattr(jobs, "_PIECES_EACH", 10**6)


@pytest.fixture
def sessions(monkeypatch):
    """Every group that any decoder was given, with the thread and the packets left out."""
    log = []
    run = PyAVSession.run

    def logged(self, group, skip=()):
        log.append((threading.get_ident(), group, frozenset(skip)))
        return run(self, group, skip)

    monkeypatch.setattr(PyAVSession, "run", logged)
    return log


def decoding_threads():
    return sum(thread.name.startswith("foveate-decode") for thread in threading.enumerate())


def in_a_row(path):
    """Every frame as one decoder gives them, read from the head, turned upright."""
    reader = PyAVReader(MediaSource(path), max_pixels=1 << 20, threads=1)
    scan = reader.scan()
    frames = {}
    from foveate.video.table import Group

    for decoded in reader.decode([Group((), 0, int(scan.table.position_F.max()))]):
        picture = np.empty((3, scan.height, scan.width), np.uint8)
        decoded.write(picture)
        frames.setdefault(decoded.rank, picture)
    return np.stack([frames[rank] for rank in range(len(scan.table))])


@pytest.mark.parametrize("name", KINDS)
def test_side_by_side_equals_in_a_row(name, make_video, decoded, eager, sessions):
    path = make_video(name, frames=50, **KINDS[name])
    reference = in_a_row(path)
    if "turned" not in name:  # plain PyAV, which turns nothing
        np.testing.assert_array_equal(reference, decoded(path).transpose(0, 3, 1, 2))
    clip = Clip(path, threads=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wanted in (range(50), [49], [2, 14, 47], range(0, 50, 7), [11, 12, 23, 24, 36]):
            frames = clip.take(wanted)
            np.testing.assert_array_equal(frames.pixels.numpy(), reference[list(wanted)])
        sessions.clear()
        # In order, with chunks that have nothing to do with groups of pictures.
        chunks = list(clip.stream(chunk=7, ahead=1))
        np.testing.assert_array_equal(np.concatenate([c.pixels for c in chunks]), reference)
    num_keys = len(clip.info.keyframe_index)
    assert (len(sessions) > 1) == (num_keys > 1)
    sessions.clear()
    clip.take(range(0, 50, 7))
    if name in ("b_frames.mp4", "pyramid.mp4", "hevc.mp4", "hevc_layers.mkv", "annexb.ts"):
        assert any(skip for *_, skip in sessions)
    if name in ("no_b_frames.mp4", "all_keyframes.mp4"):
        assert not any(skip for *_, skip in sessions)


def test_a_keyframe_that_is_none_is_unmasked(make_video, eager):
    """Pictures that refresh themselves bit by bit are called keyframes by their container."""
    path = make_video("refresh.mkv", frames=50, **KINDS["refreshes_itself.mkv"])
    with av.open(str(path)) as container:
        flagged = sum(p.is_keyframe for p in container.demux(video=0) if p.size)
    assert flagged > 1
    assert Clip(path).info.keyframe_index.tolist() == [0]


def test_a_codec_whose_keyframe_flags_lie(make_video, eager, monkeypatch):
    """Even where the bytes are not looked at, a wrong keyframe costs time and no frame."""
    from foveate.video import decode, nal

    path = make_video("refresh.mkv", frames=50, **KINDS["refreshes_itself.mkv"])
    reference = in_a_row(path)
    monkeypatch.setattr(decode, "PacketParser", lambda *_: lambda data: nal.UNKNOWN)
    clip = Clip(path, threads=2)
    assert len(clip.info.keyframe_index) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        frames = clip.take(range(50))
    sound = [r for r in range(50) if r not in {*frames.damage.missing, *frames.damage.suspect}]
    assert len(sound) > 40
    np.testing.assert_array_equal(frames.pixels.numpy()[sound], reference[sound])


def test_pieces_are_spread_over_threads(make_video, eager, sessions):
    path = make_video(frames=60, options={"g": "6", "bf": "2", "x264-params": "scenecut=0"})
    clip = Clip(path, threads=3)
    sessions.clear()
    clip.take(range(60))
    assert len(sessions) == 10
    assert sorted(rank for _, group, _ in sessions for rank in group.ranks) == list(range(60))
    assert decoding_threads() == 0


def test_only_what_is_needed_is_decoded(make_video, sessions):
    path = make_video(frames=60, options={"g": "30", "bf": "3", "x264-params": "scenecut=0"})
    clip = Clip(path, threads=1)
    sessions.clear()
    clip.take([40])
    ((_, group, skip),) = sessions
    assert group.start == 30 and len(skip) >= 3  # the group before, and B-frames on the way
    kept = group.stop - group.start + 1 - len(skip)
    assert jobs.schedule(clip._table, [40], 1).costs == [kept]


def test_a_stream_decodes_ahead_and_no_further(make_video):
    clip = Clip(make_video(frames=60, options={"g": "6", "bf": "2"}), threads=2)
    stream = clip.stream(chunk=5, ahead=2)
    assert len(stream) == 12 and stream.index.tolist() == list(range(60))
    assert next(stream).index.tolist() == [0, 1, 2, 3, 4]
    board = stream._source._board
    deadline = time.monotonic() + 20
    while None in board.shown[5:20] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert None not in board.shown[5:20]  # the next, and two ahead of it
    # Frames already inside a decoder may be written, and few they are.
    assert len(board._chunks) <= 5 and board.shown[40] is None
    assert [f.index[0].item() for f in stream] == list(range(5, 60, 5))
    assert decoding_threads() == 0
    assert next(stream, None) is None


@pytest.mark.parametrize("how", ["close", "with", "forget", "other thread"])
def test_cancelling(how, gop_video):
    stream = Clip(gop_video, threads=2).stream(chunk=1, ahead=0)
    next(stream)
    if how == "close":
        stream.close()
    elif how == "with":
        with pytest.raises(KeyError), stream:
            raise KeyError
    elif how == "forget":
        del stream
        gc.collect()
    else:
        blocked = Clip(gop_video, reader=Sluggish(gop_video, at=3)).stream(chunk=1)
        next(blocked)
        timer = threading.Timer(0.2, blocked.close)
        timer.start()
        assert len(list(blocked)) == 2
        timer.join()
        stream.close()
    deadline = time.monotonic() + 20
    while decoding_threads() > 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert decoding_threads() == 0
    if how != "forget":
        assert list(stream) == []


class Sluggish:
    """A decoder that gives nothing any more from a frame on."""

    def __init__(self, path, *, at):
        self.inner = PyAVReader(MediaSource(path), max_pixels=1 << 20, threads=1)
        self.at = at
        self.over = threading.Event()

    def scan(self):
        return self.inner.scan()

    def decode(self, groups):
        for i, decoded in enumerate(self.inner.decode(groups)):
            if i == self.at:
                self.over.wait(1)
            yield decoded


def test_a_decoder_that_hangs(gop_video):
    reader = Sluggish(gop_video, at=7)
    clip = Clip(gop_video, reader=reader, timeout=0.1)
    with pytest.raises(DecodeStalledError, match=r"0\.1 s.*frame at 0\.70 s"):
        clip.take(range(20))
    reader.over.set()


class Breaks:
    """A reader whose sessions break down at a packet."""

    max_sessions = 4

    def __init__(self, path, error, *, at):
        self.inner = PyAVReader(MediaSource(path), max_pixels=1 << 20, threads=1)
        self.error = error
        self.at = at

    def scan(self):
        return self.inner.scan()

    def decode(self, groups):
        return self.inner.decode(groups)

    def session(self, threads, tick):
        count = itertools.count()

        def failing():
            tick()
            if next(count) == self.at:
                raise self.error

        return self.inner.session(threads, failing)


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_crash_in_a_worker_surfaces_once(as_stream, gop_video, eager):
    clip = Clip("x", reader=Breaks(gop_video, RuntimeError("out of luck"), at=5), threads=3)
    clip.name = "film.mp4"
    stream = clip.stream(chunk=4)
    with pytest.raises(DecoderFailedError, match=r"film\.mp4: .* near \d\.\d\d s .*out of luck"):
        list(stream) if as_stream else clip.take(range(60))
    if as_stream:
        assert list(stream) == []
    assert decoding_threads() == 0


def test_errors_of_ours_keep_their_kind(gop_video):
    clip = Clip("x", reader=Breaks(gop_video, DamagedVideoError("no colours"), at=5), threads=1)
    with pytest.raises(DamagedVideoError, match=r"PyAV|Breaks: near \d.\d\d s: no colours"):
        clip.take(range(60))


def wiped(path, ranks):
    """The file with the packets of these frames overwritten by zeros."""
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size]
    order = {pts: rank for rank, pts in enumerate(sorted(s[2] for s in spans))}
    data = bytearray(path.read_bytes())
    for pos, size, pts in spans:
        if order[pts] in ranks:
            data[pos : pos + size] = bytes(size)
    return bytes(data)


@pytest.mark.parametrize("chunk", [60, 11, 1])
@pytest.mark.parametrize("lost", [range(12, 24), range(24), [0], [25], [59], [13, 26, 50]])
def test_damage_side_by_side(lost, chunk, gop_video, decoded, eager):
    """Sound frames are exact wherever the damage is, and decoding finds its way back."""
    reference = decoded(gop_video).transpose(0, 3, 1, 2)
    clip = Clip(wiped(gop_video, lost), threads=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        chunks = list(clip.stream(chunk=chunk))
    assert torch.cat([c.index for c in chunks]).tolist() == list(range(60))
    pixels = np.concatenate([c.pixels for c in chunks])
    missing = {rank for c in chunks for rank in c.damage.missing}
    suspect = {rank for c in chunks for rank in c.damage.suspect}
    assert missing | suspect
    sound = [rank for rank in range(60) if rank not in missing | suspect]
    assert (len(sound) >= 60 - 12 * 3 and 45 in sound) or 50 in lost
    if chunk > 1:  # in chunks of one, a frame is given before those behind it can be missed
        np.testing.assert_array_equal(pixels[sound], reference[sound])
    for part in chunks:
        for first, last in part.damage.gaps:
            assert set(range(first, last + 1)) <= missing


def test_gaps_name_the_places():
    from foveate.video import Damage

    assert Damage(9, {3: 2, 4: 2, 5: 6, 8: 7}).gaps == ((3, 5), (8, 8))
    assert Damage(9).gaps == ()


def test_timestamps_that_go_backwards(make_video, tmp_path):
    """Two transport streams glued together: every time occurs twice."""
    data = make_video("one.ts", frames=30, options=B_FRAMES).read_bytes()
    (tmp_path / "two.ts").write_bytes(data + data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        clip = Clip(tmp_path / "two.ts", threads=3)
        frames = clip.take(range(len(clip)))
    assert len(frames) >= 30
    assert torch.all(frames.seconds[1:] > frames.seconds[:-1])


def test_a_header_that_promises_too_much(make_video):
    """A frame that the index lists and the file lacks is replaced, and nobody waits for it."""
    path = make_video(options=B_FRAMES, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    with av.open(str(path)) as container:
        places = sorted(p.pos for p in container.demux(video=0) if p.size)
    clip = Clip(data[: places[-3]], threads=2)
    assert 0 < len(clip) < 40 and clip.info.lost_frames == 40 - len(clip)
    with pytest.warns(DamagedVideoWarning, match="ends about"):
        assert len(clip.take(range(len(clip)))) == len(clip)


def test_a_file_object_is_read_by_one_decoder(gop_video, eager, sessions, decoded):
    with gop_video.open("rb") as file:
        clip = Clip(file, threads=3)
        frames = clip.take(range(60))
        np.testing.assert_array_equal(
            frames.pixels.numpy(), decoded(gop_video).transpose(0, 3, 1, 2)
        )
        assert len({thread for thread, *_ in sessions}) == 1
        with clip.stream(chunk=2) as stream:
            next(stream)
            with pytest.raises(VideoSourceError, match="in use"):
                clip.take(3)
        assert len(clip.take(3)) == 1


def test_streams_take_an_index(gop_video):
    clip = Clip(gop_video)
    wanted = [3, 17, 18, 40, 59]
    frames = list(clip.stream(index=wanted, chunk=2))
    assert [f.index.tolist() for f in frames] == [[3, 17], [18, 40], [59]]
    assert torch.equal(torch.cat([f.pixels for f in frames]), clip.take(wanted).pixels)
    for bad in (
        {"index": [3, 3]},
        {"index": [4, 3]},
        {"index": [60]},
        {"index": [1], "fps": 2},
        {"ahead": -1},
        {"chunk": 1.5},
    ):
        with pytest.raises(FrameRequestError):
            clip.stream(**bad)
    with pytest.raises(FrameRequestError, match="threads"):
        Clip(gop_video, threads=-1)


def test_containers_are_kept_a_few_at_a_time(gop_video):
    clips = [Clip(gop_video) for _ in range(7)]
    assert len(IDLE) <= 4
    first = clips[0].take([5, 50]).pixels
    assert torch.equal(clips[0].take([5, 50]).pixels, first)
    del clips
    gc.collect()
    before = len(IDLE)
    clip = Clip(gop_video)
    assert len(IDLE) == before + 1
    os.truncate(gop_video, gop_video.stat().st_size)  # the file is not locked
    del clip
    gc.collect()
    assert len(IDLE) == before


def test_the_first_read_goes_on_where_the_scan_was(gop_video, monkeypatch, sessions):
    from foveate.video import packets

    opened, fed = [], []
    source_open, decode_packet = MediaSource._open, packets.decode_packet
    monkeypatch.setattr(
        MediaSource, "_open", lambda self, at: opened.append(at) or source_open(self, at)
    )

    def noted(stream, packet):
        fed.append(None if packet is None else packet.pts)
        return decode_packet(stream, packet)

    monkeypatch.setattr(packets, "decode_packet", noted)
    clip = Clip(gop_video, threads=1)
    frames = clip.take(range(12))
    assert len(opened) == 1
    assert len(fed) == len(set(fed)) and None in fed  # nothing is decoded twice
    assert torch.equal(clip.take(range(12)).pixels, frames.pixels)
    assert len(opened) == 1


def test_a_forked_process_opens_anew():
    class Source:
        pass

    class Container:
        closed = False

        def close(self):
            self.closed = True

    idle, source, container = IdleContainers(most=1), Source(), Container()
    idle.put(source, container)
    idle._forget()  # what a child does first
    assert idle.take(source) is None and not container.closed
    idle.put(source, container)
    other = Source()
    idle.put(other, Container())
    assert container.closed and len(idle) == 1


def test_running_in_many_threads_of_the_caller(gop_video, decoded):
    reference = decoded(gop_video).transpose(0, 3, 1, 2)
    clip = Clip(gop_video, threads=2)
    failures = []

    def read(wanted):
        try:
            np.testing.assert_array_equal(clip.take(wanted).pixels.numpy(), reference[wanted])
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read, args=([i, 30 + i],)) for i in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert not failures


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(40)), raising=False)
    assert parallel.cores() == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert parallel.cores() == 3


def test_failures_are_video_errors():
    assert issubclass(DecodeStalledError, DecoderFailedError)
    assert issubclass(DecoderFailedError, VideoError)
