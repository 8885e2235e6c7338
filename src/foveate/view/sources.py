"""Frames at the size that a report shows them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from foveate.video.resize import resize

if TYPE_CHECKING:
    from foveate.video import Clip

_PICTURE_SIDE = 640
#: Pixels that the pictures of one clip may take together.
_MAX_PIXELS = 64 << 20


def picture_sized(pixels_TCHW: Tensor) -> Tensor:
    """Frames no longer than a report can show, uint8 [T, 3, h, w] with sides up to 640 pixels."""
    height, width = pixels_TCHW.shape[-2:]
    size = _fitted(height, width, 1)
    return pixels_TCHW if size == (height, width) else resize(pixels_TCHW, size)


def small_pictures(clip: Clip, index: Sequence[int]) -> Tensor:
    """Frames of a clip at the size that a report can show of so many, uint8 [T, 3, h, w]."""
    size = _fitted(clip.info.height, clip.info.width, len(index))
    return clip.take(index, size=size).pixels


def _fitted(height: int, width: int, count: int) -> tuple[int, int]:
    scale = min(1.0, _PICTURE_SIDE / max(height, width))
    if count > 1:
        scale = min(scale, (_MAX_PIXELS / (count * height * width)) ** 0.5)
    if scale >= 1:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))
