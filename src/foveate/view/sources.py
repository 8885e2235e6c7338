"""Frames at the size that a report shows them in."""

from __future__ import annotations

from torch import Tensor

from foveate.video.resize import resize

_PICTURE_SIDE = 640


def picture_sized(pixels_TCHW: Tensor) -> Tensor:
    """Frames no longer than a report can show, uint8 [T, 3, h, w] with sides up to 640 pixels."""
    height, width = pixels_TCHW.shape[-2:]
    scale = _PICTURE_SIDE / max(height, width)
    if scale >= 1:
        return pixels_TCHW
    return resize(pixels_TCHW, (max(1, round(height * scale)), max(1, round(width * scale))))
