"""Sources that are still being made: read forward, in bounded memory, never waited for in vain."""

from __future__ import annotations

import gc
import http.server
import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.errors import (
    DamagedVideoError,
    DecoderFailedError,
    DecodeStalledError,
    EmptyVideoError,
    FrameRequestError,
    FrameTooLargeError,
    NoVideoStreamError,
    TruncatedVideoError,
    UnsupportedVideoError,
    VideoNotFoundError,
    VideoSourceError,
)
from foveate.video import Clip, Frames, Gap, Live
from foveate.video.live_clock import LiveClock, RateGate

av = pytest.importorskip("av")
pytestmark = pytest.mark.timeout(90)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="pipes are waited for on POSIX only")


@pytest.fixture(scope="module")
def ts(tmp_path_factory: pytest.TempPathFactory, written: Callable[..., Path]) -> Path:
    """An MPEG transport stream of 6 s, 60 frames, with B-frames."""
    path = tmp_path_factory.mktemp("live") / "live.ts"
    return written(path, frames=60, options={"g": "12", "bf": "2"})


@pytest.fixture(scope="module")
def whole(ts: Path) -> Frames:
    """All its frames."""
    return Clip(ts).take(range(60))


def collect(live: Live) -> Frames:
    parts = list(live)
    return Frames(
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.seconds for part in parts]),
        torch.cat([part.index for part in parts]),
    )


def no_threads_left() -> bool:
    for _ in range(200):
        gc.collect()
        if not any(thread.name == "foveate-live" for thread in threading.enumerate()):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    yield
    assert no_threads_left()


class Writer(threading.Thread):
    """Does something in the background; what goes wrong there is raised by `join`."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def done(self) -> None:
        self.join(30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["ts", "mkv", "mp4"])
@pytest.mark.parametrize("fps", [None, 2])
def test_the_frames_are_those_of_the_clip(
    container: str, fps: float | None, make_video: Callable[..., Path]
) -> None:
    fragmented = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else {}
    path = make_video(f"a.{container}", frames=40, container_options=fragmented)
    clip = Clip(path)
    expected = clip.uniform(fps) if fps else clip.take(range(40))
    live = Live(path, fps, chunk=3)
    found = collect(live)
    assert torch.equal(found.pixels, expected.pixels)
    assert torch.equal(found.index, expected.index)
    assert torch.allclose(found.seconds, expected.seconds, atol=1e-3)
    report = live.report
    assert (report.decoded, report.given, report.dropped) == (40, len(expected), 0)
    assert (report.damaged, report.gaps, report.ended) == (0, (), "the file ends here")


def test_scaled_like_a_clip(ts: Path) -> None:
    found = collect(Live(ts, 1, size=(20, 30)))
    assert torch.equal(found.pixels, Clip(ts).uniform(1, size=(20, 30)).pixels)


def test_turned_upright(make_video: Callable[..., Path]) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"}
    path = make_video("turned.mp4", frames=4, rotation=90, container_options=options)
    assert torch.equal(collect(Live(path)).pixels, Clip(path).take(range(4)).pixels)


@pytest.mark.parametrize("container", ["ts", "mkv", "mp4"])
def test_a_file_that_is_being_written(
    container: str, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    fragmented = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else {}
    source = make_video(
        f"a.{container}",
        frames=60,
        width=160,
        height=120,
        options={"g": "5", "crf": "1"},
        container_options=fragmented,
    )
    data, path = source.read_bytes(), tmp_path / f"growing.{container}"
    path.touch()  # not even a byte is there yet
    live = Live(path, growing=True, timeout=3)
    halfway, seen = threading.Event(), []

    def write() -> None:
        with path.open("ab", buffering=0) as out:
            for at in range(0, len(data), 500):
                if at > len(data) // 2:
                    # The second half is written when pictures of the first are out.
                    assert halfway.wait(30)
                out.write(data[at : at + 500])

    writer = Writer(write)
    for frames in live:
        seen.append(frames)
        halfway.set()
    writer.done()
    assert torch.equal(torch.cat([f.pixels for f in seen]), Clip(source).take(range(60)).pixels)
    assert live.report.ended == "the file did not grow for 3 s"


def test_a_file_that_never_comes_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "empty.ts").touch()
    with pytest.raises(EmptyVideoError, match=r"did not grow for 0\.3 s"):
        next(Live(tmp_path / "empty.ts", growing=True, timeout=0.3))


def test_a_file_that_is_cut_back(ts: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.ts"
    path.write_bytes(ts.read_bytes())
    live = Live(path, growing=True, timeout=30)
    next(live)
    path.write_bytes(b"begun anew")
    with pytest.raises(DecoderFailedError, match="cut back to 10 bytes"):
        list(live)


@needs_posix
def test_a_file_that_is_deleted_is_read_to_its_end(ts: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.ts"
    path.write_bytes(ts.read_bytes())
    live = Live(path, growing=True, timeout=0.5, ahead=2)
    count = len(next(live))
    path.unlink()
    assert count + sum(len(frames) for frames in live) == 60


@pytest.mark.parametrize("growing", [False, True])
def test_an_mp4_without_its_index_says_so(
    growing: bool, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_video("unfinished.mp4", frames=10)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(TruncatedVideoError, match="index comes behind its data"):
        next(Live(path, growing=growing, timeout=20))


# -- pipes ----------------------------------------------------------------------------------------


@needs_posix
def test_a_pipe(ts: Path, whole: Frames) -> None:
    read, write = os.pipe()
    data = ts.read_bytes()

    def pump() -> None:
        with os.fdopen(write, "wb") as out:
            out.write(data)

    writer = Writer(pump)
    with os.fdopen(read, "rb") as file:
        assert file.peek(1)  # What a reader has read ahead is not lost.
        live = Live(file, size=None)
        assert torch.equal(collect(live).pixels, whole.pixels)
    writer.done()
    assert live.report.ended == "the source ended"


@needs_posix
def test_standard_input(ts: Path, whole: Frames, monkeypatch: pytest.MonkeyPatch) -> None:
    class Standard:
        buffer = ts.open("rb")

    monkeypatch.setattr("sys.stdin", Standard)
    assert torch.equal(collect(Live("-")).pixels, whole.pixels)
    Standard.buffer.close()
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(VideoSourceError, match="standard input"):
        Live("-")


def test_any_object_with_read(ts: Path, whole: Frames) -> None:
    class Odd:
        def __init__(self) -> None:
            self.file = io.BytesIO(ts.read_bytes())

        def read(self, count: int) -> bytes:
            return self.file.read(min(count, 777))

    assert torch.equal(collect(Live(Odd())).pixels, whole.pixels)  # type: ignore[arg-type]


@needs_posix
def test_a_named_pipe_waits_for_its_writer(ts: Path, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(DecodeStalledError, match=r"gave nothing for 0\.3 s"):
        next(Live(path, timeout=0.3))
    live = Live(path, 1, timeout=30)
    writer = Writer(lambda: path.write_bytes(ts.read_bytes()) and None)
    assert len(collect(live)) == 6
    writer.done()


@needs_posix
def test_a_pipe_that_falls_silent(ts: Path) -> None:
    read, write = os.pipe()
    data = ts.read_bytes()
    # Nothing at all, and silence after two thirds: pictures first, then the error.
    with (
        os.fdopen(read, "rb") as file,
        pytest.raises(DecodeStalledError, match=r"nothing for 0\.5"),
    ):
        next(Live(file, timeout=0.5))
    os.close(write)
    read, write = os.pipe()
    writer = Writer(lambda: os.write(write, data[: len(data) * 2 // 3]) and None)
    with os.fdopen(read, "rb") as file:
        live = Live(file, timeout=1.5)
        count = 0
        with pytest.raises(DecodeStalledError, match=r"nothing for 1\.5 s"):
            for frames in live:
                count += len(frames)
        assert 20 < count < 60
        assert list(live) == []  # an error is raised once
    writer.done()
    os.close(write)


def test_a_reader_that_fails(ts: Path) -> None:
    class Breaks(io.BytesIO):
        def read1(self, count: int = -1) -> bytes:
            if self.tell() > 20_000:
                raise OSError("the cable is out")
            return super().read1(count)

    live = Live(Breaks(ts.read_bytes()))
    with pytest.raises(DecoderFailedError, match="the cable is out"):
        list(live)
    assert "cable" in live.report.ended
    for give, words in (((lambda n: "text"), "instead of bytes"), ((lambda n: None), "None")):
        odd = type("Odd", (), {"read": staticmethod(give)})()
        with pytest.raises(VideoSourceError, match=words):
            next(Live(odd))


# -- consumers ------------------------------------------------------------------------------------


def test_a_slow_consumer_lets_the_source_wait(ts: Path) -> None:
    live = Live(ts, behind="wait", ahead=3, chunk=2)
    first = next(live)
    for _ in range(100):
        if live.report.taken >= 4:
            break
        time.sleep(0.05)
    time.sleep(0.3)
    # Three wait, and one is held by the thread that cannot put it down.
    assert live.report.decoded <= 3 + len(first) + 1
    assert len(first) + sum(len(frames) for frames in live) == 60
    assert live.report.dropped == 0


def test_a_slow_consumer_loses_the_oldest(ts: Path) -> None:
    live = Live(ts, behind="drop_oldest", ahead=5)
    first = next(live)
    for _ in range(600):
        if live.report.ended:
            break
        time.sleep(0.05)
    # The reader may have been through before the first call came back.
    found = [*first.index.tolist(), *(rank for frames in live for rank in frames.index.tolist())]
    assert found[-5:] == [55, 56, 57, 58, 59]
    report = live.report
    assert report.given == len(found) <= len(first) + 5
    assert report.given + report.dropped == report.taken == report.decoded == 60
    assert report.dropped >= 60 - len(first) - 5 > 0
    assert f"{report.dropped} dropped" in report.summary


@needs_posix
def test_closing_ends_a_next_that_waits() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file:
        live = Live(file, timeout=600)
        ended = threading.Event()

        def loop() -> None:
            for _ in live:
                pass
            ended.set()

        waiter = Writer(loop)
        time.sleep(0.2)
        assert not ended.is_set()
        live.close()
        waiter.done()
        assert ended.is_set()
        assert live.report.ended == "it was closed"
        assert no_threads_left()
    os.close(write)


def test_a_source_that_is_forgotten_is_let_go(ts: Path) -> None:
    live = Live(ts, ahead=1)
    next(live)
    del live
    assert no_threads_left()


def test_closing_before_and_after(ts: Path) -> None:
    with Live(ts) as live:
        pass
    assert list(live) == []
    live.close()
    with Live(ts) as live:
        next(live)
    assert list(live) == []
    assert "live.ts" in repr(live)


# -- damage and limits ----------------------------------------------------------------------------


def test_damaged_packets_are_passed_over_and_counted(ts: Path) -> None:
    data = bytearray(ts.read_bytes())
    at = len(data) // 2 // 188 * 188
    for packet in range(at, at + 188 * 20, 188):
        data[packet + 8 : packet + 188] = bytes(180)
    live = Live(io.BytesIO(bytes(data)))
    found = collect(live)
    assert 40 <= len(found) < 60 or live.report.damaged
    assert bool(torch.all(found.seconds.diff() > 0))


def test_joined_in_the_middle(ts: Path) -> None:
    data = ts.read_bytes()
    cut = len(data) * 2 // 5 // 188 * 188 + 50  # not even at the border of a packet
    live = Live(io.BytesIO(data[cut:]))
    found = collect(live)
    assert 20 <= len(found) < 40
    assert found.seconds[0] == 0


def test_garbage(tmp_path: Path) -> None:
    (tmp_path / "noise.ts").write_bytes(os.urandom(50_000))
    (tmp_path / "words.mp4").write_text("hello, this is no video\n" * 400)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:4.0,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    for name in ("noise.ts", "words.mp4", "list.m3u8"):
        with pytest.raises(UnsupportedVideoError, match="not a video"):
            next(Live(tmp_path / name))

    # Something that opens as video and goes on as noise for ever.
    class Endless:
        def __init__(self, head: bytes) -> None:
            self.head = head

        def read(self, count: int) -> bytes:
            if self.head:
                found, self.head = self.head[:count], self.head[count:]
                return found
            return b"\x00" * count

    mkv = b"\x1aE\xdf\xa3" + b"\x01\xff\xff\xff\xff\xff\xff\xff"
    with pytest.raises((DamagedVideoError, TruncatedVideoError)):
        list(Live(Endless(mkv)))  # type: ignore[arg-type]


def test_pictures_that_are_too_large(ts: Path) -> None:
    with pytest.raises(FrameTooLargeError, match="64x48 pixels, more than max_pixels=1000"):
        next(Live(ts, max_pixels=1000))


def test_sound_alone(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=8000)
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(NoVideoStreamError, match="sound alone"):
        next(Live(path))


def test_a_change_of_size_on_the_way(
    ts: Path, make_video: Callable[..., Path], written: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_video("other.ts", frames=20, width=96, height=64)
    joined = io.BytesIO(ts.read_bytes() + other.read_bytes())
    live = Live(joined, chunk=50, ahead=50)
    shapes = [tuple(frames.pixels.shape[1:]) for frames in live]
    assert set(shapes) == {(3, 48, 64), (3, 64, 96)}
    # The second recording begins at its own time zero again.
    assert [gap.kind for gap in live.report.gaps] == ["backwards"]
    scaled = collect(Live(io.BytesIO(ts.read_bytes() + other.read_bytes()), size=(24, 32)))
    assert len(scaled) >= 75
    assert bool(torch.all(scaled.seconds.diff() > 0))


# -- time -----------------------------------------------------------------------------------------


def test_times_that_go_back_or_leap() -> None:
    clock = LiveClock(0.5)
    raw = [3.0, 3.5, 4.0, 1.0, 1.5, 11.5, 12.0, 90_000.0, 90_000.5]
    assert [clock(time) for time in raw] == [0, 0.5, 1, 1.5, 2, 12, 12.5, 13, 13.5]
    kinds = [(gap.kind, gap.seconds, gap.jump) for gap in clock.gaps]
    assert kinds == [("backwards", 1, -3), ("forward", 2, 10), ("reset", 12.5, 89_988)]
    assert str(Gap("forward", 2, 10)) == "forward jump of +10.00 s after 2.00 s"
    for _ in range(3000):
        clock(50.0), clock(0.0)
    assert len(clock.gaps) == 1000 < clock.num_gaps


def test_times_that_are_missing_or_no_numbers() -> None:
    ticks = iter([100.0, 100.25, 103.0])
    clock = LiveClock(now=lambda: next(ticks))
    assert [clock(None), clock(None), clock(7.0)] == [0, 0.25, 3]  # by the wall clock for good
    clock = LiveClock(0.1)
    assert [clock(time) for time in (5.0, None, float("nan"), 5.3)] == [0, 0.1, 0.2, 0.3]
    clock = LiveClock(0.1)
    assert [clock(time) for time in (0.0, 0.0, 0.0, 0.1)] == [0, 0.001, 0.002, 0.1]


def test_a_rate_of_irregular_times() -> None:
    gate = RateGate(1)
    times = [0, 0.9, 1.0, 1.1, 5.5, 5.9, 6.0, 6.99951, 7.0]
    assert [time for time in times if gate(time)] == [0, 1, 5.5, 6, 6.99951]


def test_raw_video_is_timed_by_the_wall_clock(make_video: Callable[..., Path]) -> None:
    path = make_video("raw.264", frames=12, container="h264")
    found = collect(Live(path))
    assert len(found) == 12
    assert found.seconds[0] == 0
    assert bool(torch.all(found.seconds.diff() > 0))


def test_a_gap_in_a_file(make_video: Callable[..., Path]) -> None:
    from fractions import Fraction

    ticks = [*range(0, 1000, 100), *range(21_000, 22_000, 100)]
    path = make_video("gap.mkv", frames=20, pts=ticks, time_base=Fraction(1, 1000))
    live = Live(path, 10)
    found = collect(live)
    assert len(found) == 20
    assert found.seconds[-1] == pytest.approx(21.9)
    (gap,) = live.report.gaps
    assert (gap.kind, gap.jump) == ("forward", pytest.approx(20.1))


# -- addresses ------------------------------------------------------------------------------------


def has_protocol(name: str) -> bool:
    try:
        av.open(f"{name}://127.0.0.1:1/", timeout=5).close()
    except Exception as error:
        return "Protocol not found" not in str(error)
    return True


def serve(data: bytes, *, keep_open: bool = False) -> tuple[int, Callable[[], None]]:
    """Serve one client through TCP; the port, and what ends it."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(30)
    over = threading.Event()

    def give() -> None:
        with suppress(OSError):
            client, _ = server.accept()
            with client:
                client.sendall(data)
                if keep_open:
                    over.wait(30)

    thread = Writer(give)

    def stop() -> None:
        over.set()
        server.close()
        thread.done()

    return server.getsockname()[1], stop


@pytest.fixture(scope="module")
def tcp() -> None:
    if not has_protocol("tcp"):
        pytest.skip("this FFmpeg has no tcp")


@pytest.mark.usefixtures("tcp")
def test_an_address(ts: Path, whole: Frames) -> None:
    port, stop = serve(ts.read_bytes())
    live = Live(f"tcp://127.0.0.1:{port}", behind="wait", timeout=30)
    assert torch.equal(collect(live).pixels, whole.pixels)
    stop()
    # Without a word about it, frames that nobody takes in time are dropped.
    assert Live("tcp://127.0.0.1:9")._feed.settings.drops
    assert not Live(ts)._feed.settings.drops


@pytest.mark.usefixtures("tcp")
def test_a_source_that_never_answers() -> None:
    port, stop = serve(b"", keep_open=True)
    live = Live(f"tcp://me:secret@127.0.0.1:{port}/cam", timeout=1)
    with pytest.raises(DecodeStalledError, match="gave nothing for 1 s") as caught:
        next(live)
    assert "secret" not in f"{caught.value!r} {live!r} {caught.value.__cause__!r}"
    stop()


@pytest.mark.usefixtures("tcp")
def test_a_source_that_dies_on_the_way(ts: Path) -> None:
    data = ts.read_bytes()
    port, stop = serve(data[: len(data) * 2 // 3], keep_open=True)
    live = Live(f"tcp://127.0.0.1:{port}", timeout=1.5, behind="wait")
    count = 0
    with pytest.raises(DecodeStalledError):
        for frames in live:
            count += len(frames)
    assert 20 < count < 60
    assert live.report.given == count
    stop()


@pytest.mark.usefixtures("tcp")
def test_nobody_listens() -> None:
    with pytest.raises(VideoSourceError, match="refused"):
        next(Live("tcp://127.0.0.1:1", timeout=10))


@pytest.fixture(scope="module")
def web(ts: Path) -> Iterator[str]:
    """A server on this machine."""
    if not has_protocol("http"):
        pytest.skip("this FFmpeg has no http")
    data = ts.read_bytes()
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{}\n#EXT-X-ENDLIST\n"
    pages = {
        "/all.ts": data,
        "/files.m3u8": playlist.format(f"file://{ts}").encode(),
        "/own.m3u8": playlist.format("all.ts").encode(),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", f"file://{ts}")
                self.end_headers()
                return
            if self.path == "/half.ts":
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) * 2 // 3])
                return
            if self.path not in pages:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(pages[self.path])))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(pages[self.path])

        def log_message(self, *arguments: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_http(web: str, whole: Frames) -> None:
    assert torch.equal(collect(Live(f"{web}/all.ts", behind="wait")).pixels, whole.pixels)
    with pytest.raises(VideoSourceError, match="cannot be opened"):
        next(Live(f"{web}/nothing.ts"))
    live = Live(f"{web}/half.ts", behind="wait")
    with pytest.raises(DecoderFailedError, match="broke off"):
        list(live)
    assert 20 < live.report.given < 60


def test_an_address_leads_to_no_file(web: str) -> None:
    for page in ("elsewhere", "files.m3u8"):
        with pytest.raises(VideoSourceError, match="cannot be opened"):
            next(Live(f"{web}/{page}"))
    with pytest.raises((UnsupportedVideoError, VideoSourceError, EmptyVideoError)):
        next(Live(f"{web}/files.m3u8", format="hls", timeout=10))


def test_a_playlist_that_is_asked_for(web: str, whole: Frames) -> None:
    found = collect(Live(f"{web}/own.m3u8", format="hls", behind="wait", timeout=20))
    assert torch.equal(found.pixels, whole.pixels)


@pytest.mark.parametrize(
    "address",
    [
        "file:/etc/passwd",
        "concat:a.ts|b.ts",
        "data:video/mp4;base64,AAAA",
        "pipe:0",
        "lavfi:testsrc",
        "unix:/run/socket",
        "ftp://host/a.ts",
    ],
)
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(VideoSourceError, match="are not allowed"):
        Live(address)


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        ("missing.ts", {}, VideoNotFoundError, "no such file"),
        ("nul\0byte", {}, VideoNotFoundError, "cannot read it"),
        (".", {}, VideoSourceError, "directory"),
        ("http://a/b", {"growing": True}, VideoSourceError, "for files"),
        ("http://a/b", {"protocols": ("https",)}, VideoSourceError, "allowed are https"),
        ("http://a/b", {"protocols": ("gopher",)}, VideoSourceError, "got gopher"),
        ("http://a/b", {"format": "concat"}, VideoSourceError, "'concat' is not allowed"),
        (
            "http://a/b",
            {"options": {"protocol_whitelist": "ALL"}},
            VideoSourceError,
            "may not set protocol_whitelist",
        ),
        (io.BytesIO(b"x"), {"growing": True}, VideoSourceError, "paths of files"),
        (torch.zeros(1, 3, 4, 4), {}, VideoSourceError, "cannot watch Tensor"),
        (io.BytesIO(b"x"), {"fps": 0}, FrameRequestError, "fps"),
        (io.BytesIO(b"x"), {"timeout": float("nan")}, FrameRequestError, "timeout"),
        (io.BytesIO(b"x"), {"chunk": 0}, FrameRequestError, "chunk"),
        (io.BytesIO(b"x"), {"ahead": 1.5}, FrameRequestError, "ahead"),
        (io.BytesIO(b"x"), {"threads": -1}, FrameRequestError, "threads"),
        (io.BytesIO(b"x"), {"behind": "panic"}, FrameRequestError, "behind"),
        (io.BytesIO(b"x"), {"size": (0, 3)}, FrameRequestError, "size"),
        (io.BytesIO(b"x"), {"size": 3}, FrameRequestError, "size"),
    ],
)
def test_what_makes_no_sense(source: Any, options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Live(source, **options)


@needs_posix
def test_a_device_wants_its_format() -> None:
    with pytest.raises(VideoSourceError, match="format='v4l2'"):
        Live("/dev/null")
    with pytest.raises((VideoSourceError, UnsupportedVideoError)):
        next(Live("/dev/no-camera", format="v4l2", timeout=5))


# -- streams --------------------------------------------------------------------------------------


def test_live_is_public() -> None:
    assert foveate.Live is Live
