"""A decoder in a process of its own may do anything but harm its caller."""

from __future__ import annotations

import gc
import io
import os
import signal
import struct
import subprocess
import time
import warnings

import pytest
import torch

from foveate.errors import (
    DamagedVideoWarning,
    DecodeLimitError,
    DecoderFailedError,
    FrameTooLargeError,
    TruncatedVideoError,
    UnsupportedVideoError,
    VideoError,
)
from foveate.video import Clip, Limits, isolate

pytest.importorskip("av")
pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(os.name != "posix", reason="processes are limited on POSIX systems only"),
]


@pytest.fixture
def children(monkeypatch):
    """Every process that was started; none is left at the end, not even as a zombie."""
    started = []
    create = subprocess.Popen.__init__

    def noted(self, *arguments, **options):
        create(self, *arguments, **options)
        started.append(self)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    yield started
    gc.collect()
    for process in started:
        assert process.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_the_same_frames_through_a_process(gop_video, children):
    plain = Clip(gop_video)
    apart = Clip(gop_video, isolate=True)
    assert apart.info == plain.info and len(children) == 1
    assert torch.equal(apart.seconds, plain.seconds)
    for wanted in (range(60), [5, 58], [31]):
        assert torch.equal(apart.take(wanted).pixels, plain.take(wanted).pixels)
    small = {"size": (20, 30)}
    assert torch.equal(apart.sample(9, **small).pixels, plain.sample(9, **small).pixels)
    for chunk in (1, 7, 12):
        for a, b in zip(apart.stream(chunk=chunk), plain.stream(chunk=chunk), strict=True):
            assert torch.equal(a.pixels, b.pixels) and torch.equal(a.index, b.index)
    assert len(children) == 1  # it stays for the clip
    with apart.stream(chunk=4) as first, apart.stream(chunk=4) as second:
        assert torch.equal(next(first).pixels, next(second).pixels)
    assert len(children) == 2
    del apart, first, second


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_bytes_are_sent_to_the_process(kind, gop_video, children):
    data = gop_video.read_bytes()
    source = data if kind == "bytes" else io.BytesIO(data)
    clip = Clip(source, isolate=Limits(seconds=60))
    assert torch.equal(clip.take([3, 40]).pixels, Clip(gop_video).take([3, 40]).pixels)
    del clip


def test_killed_from_outside(gop_video, children):
    clip = Clip(gop_video, isolate=True)
    stream = clip.stream(chunk=1, ahead=0)
    next(stream)
    children[0].send_signal(signal.SIGKILL)
    with pytest.raises(DecoderFailedError, match=r"gop\.mp4: .*SIGKILL"):
        for _ in stream:
            pass
    assert list(stream) == []
    assert len(clip.take([1, 2])) == 2  # by a new one
    assert len(children) == 2
    children[1].kill()
    children[1].wait()
    assert len(clip.take(5)) == 1
    del clip, stream


def test_stopped_while_it_decodes(gop_video, children):
    clip = Clip(gop_video, isolate=True)
    stream = clip.stream(chunk=1)
    next(stream)
    stream.close()
    assert children[0].returncode is not None
    assert list(stream) == []
    del clip


def test_it_may_keep_its_caller_waiting_only_so_long(gop_video, children):
    clip = Clip(gop_video, isolate=Limits(seconds=20))
    clip._reader.limits = Limits(seconds=0.3)
    children[0].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(DecodeLimitError, match="longer than allowed") as caught:
        clip.take(3)
    assert caught.value.limit == "seconds" and time.monotonic() - begin < 15
    del clip


def test_processor_time_is_limited(gop_video, children):
    # Sixty frames of twelve million pixels take several seconds to make.
    clip = Clip(gop_video, isolate=Limits(cpu_seconds=1))
    with pytest.raises(DecodeLimitError, match="processor time") as caught:
        for _ in clip.stream(chunk=1, size=(3000, 4000)):
            pass
    assert caught.value.limit == "cpu_seconds"
    assert len(clip.take(3)) == 1
    del clip


def test_memory_is_limited(gop_video, children):
    with pytest.raises(DecodeLimitError, match="memory") as caught:
        clip = Clip(gop_video, isolate=Limits(memory=1 << 20), threads=1)
        clip.take(range(8), size=(3000, 4000))
    assert caught.value.limit == "memory"
    clip = Clip(gop_video, isolate=Limits(memory=1 << 30), threads=1)
    assert len(clip.take(range(2), size=(3000, 4000))) == 2
    del clip


def test_frames_and_pixels_are_limited(gop_video, make_video, children):
    with pytest.raises(DecodeLimitError, match="59 frames") as caught:
        Clip(gop_video, isolate=Limits(frames=59))
    assert caught.value.limit == "frames"
    assert len(Clip(gop_video, isolate=Limits(frames=60))) == 60
    bomb = bytearray(make_video("bomb.gif", codec="gif", pixel_format="rgb8").read_bytes())
    bomb[6:10] = struct.pack("<HH", 12_000, 12_000)
    with pytest.raises(FrameTooLargeError, match="12000x12000"):
        Clip(bytes(bomb), isolate=True)


def test_errors_come_through_by_name(gop_video, tmp_path, children):
    (tmp_path / "text.txt").write_text("hello, this is not a video\n" * 40)
    with pytest.raises(UnsupportedVideoError, match=r"text\.txt: it is not a video"):
        Clip(tmp_path / "text.txt", isolate=True)
    with pytest.raises(TruncatedVideoError):
        Clip(gop_video.read_bytes()[:200], isolate=True)


def test_damage_is_reported_through_the_process(gop_video, children):
    data = gop_video.read_bytes()
    broken = data[: len(data) * 3 // 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        apart, plain = (Clip(broken, isolate=flag).sample(8) for flag in (True, False))
    assert apart.damage == plain.damage and apart.damage
    assert torch.equal(apart.pixels, plain.pixels)


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack("<Q", 1 << 40),
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 25) + b'{"shown": [], "suspect": []}'[:25],
        struct.pack("<Q", 28) + b'{"shown": [], "suspect": []}',
        b"",
    ],
)
def test_what_it_says_is_not_believed(reply, gop_video, children):
    """A process that was taken over can say what it likes; it gets an error out of us."""
    clip = Clip(gop_video, isolate=True)
    (child,) = clip._reader._idle
    read, write = os.pipe()
    os.write(write, reply)
    os.close(write)
    os.dup2(read, child._from)
    os.close(read)
    os.set_blocking(child._from, False)
    with pytest.raises(DecoderFailedError):
        clip.take(3)
    del clip, child


def test_the_process_does_without_torch(gop_video, children):
    clip = Clip(gop_video, isolate=True)
    if not os.path.exists(f"/proc/{children[0].pid}/maps"):  # noqa: PTH110
        pytest.skip("no /proc here")
    with open(f"/proc/{children[0].pid}/maps") as maps:  # noqa: PTH123
        assert "libtorch" not in maps.read()
    del clip


def test_limits_make_sense():
    for bad in ({"memory": 0}, {"seconds": -1}, {"cpu_seconds": float("inf")}, {"frames": 0}):
        with pytest.raises(ValueError, match="positive"):
            Limits(**bad)


def test_systems_without_limits_say_so(gop_video, monkeypatch):
    monkeypatch.setattr(isolate.os, "name", "nt")
    with pytest.raises(VideoError, match="POSIX"):
        isolate.IsolatedReader(
            isolate.MediaSource(gop_video.read_bytes()), Limits(), max_pixels=1, threads=1
        )
