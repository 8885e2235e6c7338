"""Parts of a clip: the same frames under numbers and times of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from foveate.errors import FrameRequestError
from foveate.video import Clip
from foveate.video.part import ClipPart, split_clip


def numbered(num: int = 20, fps: float = 4.0) -> Clip:
    level = torch.arange(num, dtype=torch.uint8)[:, None, None, None]
    return Clip(level.expand(-1, 3, 8, 8).clone(), fps=fps)


def same_frames(part: ClipPart, whole: Clip, first: int, stop: int) -> None:
    assert len(part) == part.info.num_frames == stop - first
    seconds = whole.seconds[first:stop]
    torch.testing.assert_close(part.seconds, seconds - seconds[0], atol=1e-9, rtol=0)
    assert part.offset == pytest.approx(float(seconds[0]))
    expected = whole.take(range(first, stop))
    taken = part.take(range(len(part)))
    assert taken.pixels.equal(expected.pixels)
    assert taken.index.tolist() == list(range(len(part)))
    assert taken.seconds.equal(part.seconds) and not taken.damage
    backwards = part.take([len(part) - 1, 0])
    assert backwards.pixels.equal(expected.pixels[[-1, 0]])
    with part.stream(index=range(0, len(part), 2), chunk=3) as stream:
        assert stream.index.tolist() == list(range(0, len(part), 2))
        assert torch.cat([frames.pixels for frames in stream]).equal(expected.pixels[::2])
    assert part.at(0.0).pixels.equal(expected.pixels[:1])
    half = part.sample(2, size=(4, 6))
    assert half.pixels.shape == (2, 3, 4, 6) and half.index.tolist() == [0, len(part) - 1]
    with pytest.raises(FrameRequestError):
        part.take(len(part))
    with pytest.raises(FrameRequestError):
        part.at(part.info.duration)


def test_parts_of_frames_in_memory() -> None:
    whole = numbered()
    for first, part in zip((0, 7, 14), split_clip(whole, 3), strict=True):
        same_frames(part, whole, first, min(first + 7, 20))
    (all_of_it,) = split_clip(whole, 1)
    assert all_of_it.info.duration == whole.info.duration
    inner = ClipPart(ClipPart(whole, 5, 15), 2, 6)
    same_frames(inner, whole, 7, 11)


@pytest.mark.parametrize("settings", [{"max_b_frames": 2}, {"rotation": 90}, {}])
def test_parts_of_a_file(make_video: Callable[..., Path], settings: dict) -> None:
    whole = Clip(make_video(frames=33, options={"g": "10"}, **settings), threads=2)
    parts = split_clip(whole, 2)
    assert sum(map(len, parts)) == 33
    assert sum(part.info.duration for part in parts) == pytest.approx(whole.info.duration)
    same_frames(parts[0], whole, 0, len(parts[0]))
    same_frames(parts[1], whole, len(parts[0]), 33)
    keys = whole.info.keyframe_index
    assert (parts[1].info.keyframe_index + len(parts[0])).equal(keys[keys >= len(parts[0])])


def test_isolated_files_have_parts(make_video: Callable[..., Path]) -> None:
    path = make_video(frames=12)
    part = ClipPart(Clip(path, isolate=True), 4, 9)
    assert part.take([3]).pixels.equal(Clip(path).take([7]).pixels)


@pytest.mark.parametrize(("first", "stop"), [(3, 3), (5, 2), (-1, 4), (0, 21)])
def test_stretches_that_are_none(first: int, stop: int) -> None:
    with pytest.raises(FrameRequestError, match="part of a clip of 20 frames"):
        ClipPart(numbered(), first, stop)


@pytest.mark.parametrize("parts", [0, -1, 21, 1.5])
def test_bad_numbers_of_parts(parts: float) -> None:
    with pytest.raises(FrameRequestError):
        split_clip(numbered(), parts)  # type: ignore[arg-type]
