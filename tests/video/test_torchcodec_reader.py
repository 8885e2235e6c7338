"""The torchcodec reader, against a stand-in with torchcodec's interface (and itself, if here)."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch

from foveate.errors import (
    DamagedVideoWarning,
    DecoderFailedError,
    MissingDependencyError,
    UnsupportedVideoError,
)
from foveate.video import Clip, TorchCodecReader
from foveate.video.resize import resize

av = pytest.importorskip("av")
pytestmark = pytest.mark.filterwarnings("error")


class FakeDecoder:
    """What torchcodec 0.13's `VideoDecoder` takes and gives, made with PyAV."""

    made: ClassVar[list[FakeDecoder]] = []
    lost: ClassVar[set[int]] = set()
    late = 0.0
    surplus = 0

    def __init__(self, source, *, num_ffmpeg_threads=1, transforms=None):
        FakeDecoder.made.append(self)
        self.settings = (source, num_ffmpeg_threads, transforms)
        if str(source).endswith("refused.mp4"):
            raise ValueError("no video stream")
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
            frames = list(container.decode(video=0))
        self.frames = [
            (torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1), float(f.time))
            for f in frames
        ]
        self.metadata = SimpleNamespace(num_frames=len(frames) + self.surplus)

    def get_frame_at(self, index):
        if index in self.lost:
            raise RuntimeError("Could not push packet to decoder: Invalid data")
        pixels, seconds = self.frames[index]
        for transform in self.settings[2]:
            pixels = resize(pixels, transform.size, "bilinear")
        return SimpleNamespace(data=pixels, pts_seconds=seconds + self.late, duration_seconds=0.1)


class FakeResize:
    def __init__(self, size):
        self.size = tuple(size)


@pytest.fixture
def fake(monkeypatch):
    modules = {name: ModuleType(name) for name in ("torchcodec", "decoders", "transforms")}
    modules["decoders"].VideoDecoder = FakeDecoder
    modules["transforms"].Resize = FakeResize
    monkeypatch.setitem(sys.modules, "torchcodec", modules["torchcodec"])
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", modules["decoders"])
    monkeypatch.setitem(sys.modules, "torchcodec.transforms", modules["transforms"])
    FakeDecoder.made.clear()
    return monkeypatch


def test_the_same_frames_by_the_same_numbers(fake, gop_video):
    clip = Clip(gop_video, reader=TorchCodecReader(gop_video, threads=3))
    plain = Clip(gop_video)
    assert clip.info == plain.info
    for wanted in ([0, 13, 59], [7], range(60)):
        assert torch.equal(clip.take(wanted).pixels, plain.take(wanted).pixels)
    chunks = [frames.pixels for frames in clip.stream(chunk=13)]
    assert torch.equal(torch.cat(chunks), plain.take(range(60)).pixels)
    (source, threads, transforms) = FakeDecoder.made[0].settings
    assert source == str(gop_video) and threads == 3 and transforms == []


def test_scaling_inside_and_outside(fake, gop_video):
    inside = Clip("x", reader=TorchCodecReader(gop_video, size=(24, 32)))
    full = Clip(gop_video).take([4]).pixels
    got = inside.take([4], size=(24, 32)).pixels
    assert torch.equal(got, resize(full, (24, 32), "bilinear"))
    outside = Clip("x", reader=TorchCodecReader(gop_video.read_bytes()))
    assert torch.equal(outside.take([4], size=(24, 32)).pixels, resize(full, (24, 32)))


def test_what_does_not_decode_is_replaced(fake, gop_video):
    fake.setattr(FakeDecoder, "lost", {20})
    clip = Clip(gop_video, reader=TorchCodecReader(gop_video))
    with pytest.warns(DamagedVideoWarning, match="1 of 3 frames"):
        frames = clip.take([10, 20, 22])
    assert frames.damage.replaced == {20: 22} and not frames.damage.suspect


def test_disagreement_is_an_error(fake, gop_video, make_video):
    fake.setattr(FakeDecoder, "late", 0.1)
    with pytest.raises(DecoderFailedError, match=r"frame 3 at 0\.400 s, its packet says 0\.300"):
        Clip(gop_video, reader=TorchCodecReader(gop_video)).take(3)
    fake.setattr(FakeDecoder, "late", 0.0)
    fake.setattr(FakeDecoder, "surplus", 2)
    with pytest.raises(UnsupportedVideoError, match="62 frames, its packets are 60"):
        Clip(gop_video, reader=TorchCodecReader(gop_video)).take(3)
    path = make_video("refused.mp4")
    with pytest.raises(UnsupportedVideoError, match="no video stream"):
        Clip(path, reader=TorchCodecReader(path)).take(3)


def test_it_is_optional(gop_video, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(MissingDependencyError, match=r"foveate\[torchcodec\]"):
        TorchCodecReader(gop_video)


def test_the_real_one_if_it_is_here(gop_video, make_video):
    try:
        reader = TorchCodecReader(gop_video)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    plain = Clip(gop_video).take(range(60)).pixels
    got = Clip(gop_video, reader=reader).take(range(60)).pixels
    assert (got.int() - plain.int()).abs().float().mean() < 1.0
    turned = make_video("turned.mp4", rotation=90)
    plain = Clip(turned).take([3, 9]).pixels
    got = Clip(turned, reader=TorchCodecReader(turned)).take([3, 9]).pixels
    assert (got.int() - plain.int()).abs().float().mean() < 1.0
