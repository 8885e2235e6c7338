"""Clips give the right frames at the right times, whatever the container does."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.video import Clip, FrameRequestError, VideoSourceError

B_FRAMES = {"g": "12", "bf": "3", "x264-params": "scenecut=0"}
KINDS = {
    "h264_b_frames.mp4": {"options": B_FRAMES},
    "h264_open_gop.mkv": {
        "options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}
    },
    "h264_single_gop.mp4": {"options": {"g": "250", "bf": "2"}},
    "h264_intra.mp4": {"options": {"g": "1"}},
    "h264_short_gop.ts": {"options": {"g": "3", "bf": "3", "x264-params": "scenecut=0"}},
    "h264.ts": {"options": B_FRAMES},
    "h264.avi": {"options": B_FRAMES},
    "h264.flv": {"options": B_FRAMES},
    "h264_fragmented.mp4": {
        "options": B_FRAMES,
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
    "raw.h264": {"options": B_FRAMES, "container": "h264"},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "10"}},
    "mpeg4_b.avi": {"codec": "mpeg4", "max_b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "options": {"g": "12", "bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "8", "deadline": "realtime"}},
    "vp8.webm": {
        "codec": "libvpx",
        "options": {"g": "8", "auto-alt-ref": "1", "lag-in-frames": "9"},
    },
    "mjpeg.mov": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "animation.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


def as_hwc(frames):
    return frames.pixels.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", KINDS)
def test_seeking_gives_the_same_pixels_as_reading_on(name, make_video, decoded):
    path = make_video(name, frames=50, **KINDS[name])
    reference = decoded(path)
    clip = Clip(path)
    assert clip.info.num_frames == len(clip) == len(reference) == 50
    for wanted in ([49], [0, 49], [13, 14, 38], [30], [11, 12, 23, 24], list(range(50))):
        frames = clip.take(wanted)
        assert frames.index.tolist() == wanted
        assert not frames.damage
        np.testing.assert_array_equal(as_hwc(frames), reference[wanted])


@pytest.mark.parametrize("name", KINDS)
def test_groups_of_a_plan_decode_by_themselves(name, make_video, decoded):
    """Every group may go to a decoder of its own: what parallel decoding rests on."""
    from foveate.video.decode import PyAVReader
    from foveate.video.source import MediaSource
    from foveate.video.table import plan

    path = make_video(name, frames=50, **KINDS[name])
    reference = decoded(path)
    reader = PyAVReader(MediaSource(path), max_pixels=1 << 20, threads=1)
    table = reader.scan().table
    groups = plan(table, range(50), min_skip=-8)
    assert len(groups) == (1 if table.by_order else max(int(table.key_F.sum()), 1))
    picture = torch.empty(3, 48, 64, dtype=torch.uint8)
    for group in reversed(groups):
        given = set()
        for rank, write, is_corrupt in reader.decode([group]):
            if rank in group.ranks:
                write(picture)
                given.add(rank)
                np.testing.assert_array_equal(picture.permute(1, 2, 0).numpy(), reference[rank])
                assert not is_corrupt
        assert given == set(group.ranks)


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone"])
def test_real_clips_equal_a_plain_decode(name, real_clip, decoded):
    path = real_clip(name)
    reference = decoded(path)
    clip = Clip(path)
    frames = clip.sample(8)
    assert frames.index.tolist() == np.linspace(0, len(reference) - 1, 8).astype(int).tolist()
    np.testing.assert_array_equal(as_hwc(frames), reference[frames.index.numpy()])


def test_info_without_decoding(make_video):
    path = make_video(options=B_FRAMES, frames=40, audio=True)
    info = Clip(path).info
    assert (info.width, info.height, info.num_frames, info.codec) == (64, 48, 40, "h264")
    assert info.duration == pytest.approx(4.0)
    assert info.frame_rate == pytest.approx(10.0)
    assert info.keyframe_index.tolist() == [0, 12, 24, 36]
    assert info.keyframe_seconds.tolist() == pytest.approx([0, 1.2, 2.4, 3.6])
    assert len(info.keyframe_pts) == 4
    assert info.has_audio and not info.variable_frame_rate
    assert (info.rotation, info.mirrored, info.start_seconds, info.lost_frames) == (0, False, 0, 0)


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv", "vfr.ts"])
def test_variable_rate_and_late_start(name, make_video, decoded):
    ticks = np.cumsum([5000] + [40, 40, 200, 1000, 20] * 8)[:40]
    path = make_video(
        name, options=B_FRAMES, frames=40, pts=ticks.tolist(), time_base=Fraction(1, 1000), rate=50
    )
    clip = Clip(path)
    assert clip.info.variable_frame_rate
    if not name.endswith("mp4"):  # the MP4 muxer hides a late start behind an edit list
        assert clip.info.start_seconds > 4.9
    np.testing.assert_allclose(clip.seconds.numpy(), (ticks - ticks[0]) / 1000, atol=2e-3)
    frames = clip.take([3, 17, 33])
    np.testing.assert_array_equal(as_hwc(frames), decoded(path)[[3, 17, 33]])
    # Frame 3 stays on screen for a second; rate arithmetic would name a later one.
    assert clip.at(0.9).index.tolist() == [3]
    assert clip.at(clip.seconds).index.tolist() == list(range(40))
    late = clip.at(2.0).index.item()
    assert clip.at([2.0, 0.0, 2.0]).index.tolist() == [late, 0, late]


@pytest.mark.parametrize(("ccw", "turns"), [(90, 1), (180, 2), (-90, 3)])
@pytest.mark.parametrize("size", [None, (30, 20)])
def test_rotation_is_applied(ccw, turns, size, make_video):
    flat = Clip(make_video("flat.mp4")).take([0, 5], size=size)
    turned = Clip(make_video("turned.mp4", rotation=ccw))
    assert turned.info.rotation == (-ccw) % 360
    if turns % 2:
        assert (turned.info.width, turned.info.height) == (48, 64)
    inner = size if size is None or turns % 2 == 0 else (size[1], size[0])
    expected = torch.rot90(flat.pixels, turns, (-2, -1))
    assert torch.equal(turned.take([0, 5], size=inner).pixels, expected)


def test_mirrored_display_matrix(make_video):
    flat = Clip(make_video("flat.mp4")).take(3).pixels
    mirrored = Clip(make_video("mirrored.mp4", hflip=True))
    assert mirrored.info.mirrored and mirrored.info.rotation == 0
    assert torch.equal(mirrored.take(3).pixels, flat.flip(-1))


def test_scaling_while_converting(gop_video):
    clip = Clip(gop_video)
    full, small = clip.sample(5), clip.sample(5, size=(24, 32))
    assert small.pixels.shape == (5, 3, 24, 32)
    means = [f.pixels.float().mean(dim=(2, 3)) for f in (full, small)]
    torch.testing.assert_close(*means, atol=5.0, rtol=0)


def test_every_source_gives_the_same_frames(gop_video, decoded):
    data = gop_video.read_bytes()

    class Unseekable(io.RawIOBase):
        name = "pipe"

        def __init__(self):
            self.inner = io.BytesIO(data)

        def read(self, size=-1):
            return self.inner.read(size)

        def seekable(self):
            return False

    expected = Clip(gop_video).sample(6).pixels
    handle = io.BytesIO(data)
    handle.seek(77)
    with gop_video.open("rb") as file:
        for source in (str(gop_video), data, bytearray(data), handle, file, Unseekable()):
            clip = Clip.open(source)
            assert torch.equal(clip.sample(6).pixels, expected)
            assert torch.equal(clip.sample(6).pixels, expected)  # a second read is no different
    assert handle.tell() == 77
    arrays = decoded(gop_video)
    for source in (
        torch.from_numpy(arrays).permute(0, 3, 1, 2),
        torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255,
        arrays,
        arrays / 255.0,
        [Image.fromarray(a) for a in arrays],
    ):
        clip = Clip(source, fps=10)
        assert torch.equal(clip.sample(6).pixels, expected)
        assert clip.info.duration == pytest.approx(6.0)
        assert clip.sample(6).seconds.tolist() == pytest.approx(Clip(gop_video).sample(6).seconds)
        assert clip.sample(2, size=(8, 8)).pixels.shape == (2, 3, 8, 8)


def test_a_file_object_is_not_read_twice_at_once(gop_video):
    with gop_video.open("rb") as file:
        clip = Clip(file)
        chunks = clip.stream(chunk=4)
        next(chunks)
        with pytest.raises(VideoSourceError, match="in use"):
            clip.sample(2)
        chunks.close()
        assert len(clip.sample(2)) == 2


def test_stream_covers_the_clip_once(gop_video, decoded):
    reference = decoded(gop_video)
    chunks = list(Clip(gop_video).stream(chunk=25))
    assert [len(c) for c in chunks] == [25, 25, 10]
    np.testing.assert_array_equal(np.concatenate([as_hwc(c) for c in chunks]), reference)
    assert torch.cat([c.index for c in chunks]).tolist() == list(range(60))
    assert sum(1 for _ in Clip(gop_video)) == 60
    at_rate = torch.cat([c.index for c in Clip(gop_video).stream(2.5, chunk=4)])
    assert at_rate.tolist() == Clip(gop_video).uniform(2.5).index.tolist()


def test_uniform_takes_what_is_on_screen(gop_video):
    clip = Clip(gop_video)
    assert clip.uniform(fps=1).index.tolist() == [0, 10, 20, 30, 40, 50]
    assert clip.uniform(fps=1).seconds.tolist() == pytest.approx([0, 1, 2, 3, 4, 5])
    assert clip.uniform(fps=1000).index.tolist() == list(range(60))
    assert clip.uniform(fps=0.01).index.tolist() == [0]


@pytest.mark.parametrize("tick", [1 / 1000, 1 / 90000])
@pytest.mark.parametrize("fps", [1, 7, 10, 29.97, 30])
def test_rate_arithmetic_survives_rounded_timestamps(tick, fps):
    from foveate.video.sampling import rate_ranks

    seconds = np.round(np.arange(300) / 30 / tick) * tick
    ranks = rate_ranks(seconds, 10.0, 0.5 * tick, fps)
    assert len(ranks) == np.ceil(10 * fps - 1e-6)
    wanted = np.arange(len(ranks)) / fps
    assert np.all(np.abs(seconds[ranks] - wanted) < 1 / 30 + tick)


def test_sampling_policies(gop_video):
    clip = Clip(gop_video)
    assert clip.sample(1).index.tolist() == [0]
    assert clip.sample(4).index.tolist() == [0, 19, 39, 59]
    assert clip.sample(4, policy="centers").index.tolist() == [7, 22, 37, 52]
    assert clip.sample(60).index.tolist() == list(range(60))
    repeated = clip.sample(120, allow_repeat=True)
    assert repeated.index.tolist() == np.linspace(0, 59, 120).astype(int).tolist()
    assert torch.equal(repeated.pixels[0], clip.take(0).pixels[0])


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.sample(0),
        lambda c: c.sample(-3),
        lambda c: c.sample(61),
        lambda c: c.sample(2.5),
        lambda c: c.sample(True),
        lambda c: c.sample(3, policy="middle"),
        lambda c: c.at(-0.1),
        lambda c: c.at(6.0),
        lambda c: c.at(float("nan")),
        lambda c: c.at([0.0, 99.0]),
        lambda c: c.at([]),
        lambda c: c.at("soon"),
        lambda c: c.take(60),
        lambda c: c.take(-1),
        lambda c: c.take([]),
        lambda c: c.take([0.5]),
        lambda c: c.uniform(0),
        lambda c: c.uniform(float("inf")),
        lambda c: c.uniform("fast"),
        lambda c: c.stream(chunk=0),
        lambda c: c.sample(2, size=(0, 5)),
        lambda c: c.sample(2, size=5),
        lambda c: c.sample(2, size=(1.5, 2)),
    ],
)
def test_requests_that_make_no_sense(ask, gop_video):
    with pytest.raises(FrameRequestError) as caught:
        ask(Clip(gop_video))
    assert isinstance(caught.value, ValueError)
    assert caught.value.reason


def test_a_reader_of_ones_own(gop_video):
    from foveate.video.decode import PyAVReader
    from foveate.video.source import MediaSource

    inner = PyAVReader(MediaSource(gop_video), max_pixels=1 << 20, threads=1)
    asked = []

    class Spy:
        def scan(self):
            return inner.scan()

        def decode(self, groups):
            asked.append([group.ranks for group in groups])
            return inner.decode(groups)

    clip = Clip("not looked at", reader=Spy())
    frames = clip.take([0, 40, 41])
    assert asked == [[(0,), (40, 41)]]
    assert torch.equal(frames.pixels, Clip(gop_video).take([0, 40, 41]).pixels)


def test_position_is_that_of_the_last_frame_given_out() -> None:
    clip = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8), fps=2)
    assert clip.position == 0.0
    with clip.stream(chunk=4) as stream:
        assert [(len(frames), clip.position) for frames in stream] == [(4, 1.5), (4, 3.5), (2, 4.5)]
    clip.take([3, 1])
    assert clip.position == 1.5
