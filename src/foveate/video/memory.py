"""Frames that are in memory already: tensors, numpy arrays and lists of pictures.

Legend: T frames; C colour channels (3); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import EmptyVideoError, VideoSourceError
from foveate.video.table import PacketTable


def pixels_from(source: Any) -> Tensor | None:
    """Frames as uint8 [T, 3, H, W], or None if the source is none that is kept in memory.

    Args:
        source: tensor [T, 3, H, W] or numpy array [T, H, W, 3], uint8 or floating in 0..1 (rounded
            to the nearest of 256 levels); or a sequence of PIL images of one size. A uint8 tensor
            is taken as it is, without a copy.

    Raises:
        VideoSourceError: another shape, dtype or range, or pictures of several sizes.
        EmptyVideoError: no frames.
    """
    if isinstance(source, Tensor):
        return _checked(source, "tensor [T, 3, H, W]", channel=1)
    if isinstance(source, np.ndarray):
        kind = "numpy array [T, H, W, 3]"
        if source.dtype != np.uint8 and not np.issubdtype(source.dtype, np.floating):
            raise VideoSourceError(f"a {kind} must be uint8 or floating, got {source.dtype}")
        return _checked(torch.from_numpy(np.ascontiguousarray(source)), kind, channel=3)
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray, memoryview)):
        return _from_images(source)
    return None


def _checked(frames: Tensor, kind: str, *, channel: int) -> Tensor:
    if frames.dim() != 4 or frames.shape[channel] != 3:
        raise VideoSourceError(
            f"frames must be a {kind}, got shape {tuple(frames.shape)}; "
            "convert grey or RGBA pictures to RGB first"
        )
    if frames.shape[0] == 0 or frames.numel() == 0:
        raise EmptyVideoError(f"the {kind} holds no pixels, its shape is {tuple(frames.shape)}")
    if channel == 3:
        frames = frames.permute(0, 3, 1, 2)
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise VideoSourceError(f"a {kind} must be uint8 or floating, got {frames.dtype}")
    low, high = frames.min().item(), frames.max().item()
    if not (low >= 0 and high <= 1):
        raise VideoSourceError(
            f"floating frames must lie in 0..1, got {low:.6g}..{high:.6g}; undo normalisation, or "
            "convert 0..255 values to uint8"
        )
    return frames.float().mul(255).round().to(torch.uint8)


def _from_images(images: Sequence[Any]) -> Tensor:
    if not images:
        raise EmptyVideoError("the list of images is empty")
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise VideoSourceError(
                f"item {i} of the list is {type(image).__name__}, not a PIL image; stack tensors "
                "or arrays into one"
            )
        if image.size != images[0].size:
            raise VideoSourceError(
                f"image {i} is {image.width}x{image.height} pixels, image 0 is "
                f"{images[0].width}x{images[0].height}; frames of a clip have one size"
            )
    stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


def table_of(num_frames: int, fps: float) -> PacketTable:
    """The packet table of frames in memory: one tick per frame, every frame a keyframe."""
    ticks = np.arange(num_frames, dtype=np.int64)
    tick = 1 / Fraction(fps).limit_denominator(1_000_000)
    return PacketTable(ticks, ticks, np.ones(num_frames, dtype=bool), tick, num_frames)
