"""Pillow's resampling in torch: the same filters, weights, order of passes and rounding, batched.

Legend: B pictures (or colour channels); H, W pixels; S source pixels that a block of N output
pixels looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

# Pillow keeps 8 bits for the pixel and 2 for overshoot of its 32-bit accumulator.
_PRECISION_BITS = 32 - 8 - 2
# Output pixels per product: narrow blocks waste less of the band, wide ones multiply faster.
_BLOCK = 32
# Batches go through in steps of about this much scratch: near the caches on a CPU.
_SCRATCH_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
# Pillow 13 takes rows first where the height shrinks much more than the width (its pull 9549).
_ROWS_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def _box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.clip(1.0 - np.abs(x), 0.0, None)


def _hamming(x: np.ndarray) -> np.ndarray:
    window = np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x))
    return np.where(np.abs(x) < 1.0, window, 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)
"""Pillow's filter numbers (`PIL.Image.Resampling`)."""
_FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    LANCZOS: (_lanczos, 3.0),
    BILINEAR: (_bilinear, 1.0),
    BICUBIC: (_bicubic, 2.0),
    BOX: (_box, 0.5),
    HAMMING: (_hamming, 1.0),
}
_NAMES = {
    "nearest": NEAREST,
    "lanczos": LANCZOS,
    "bilinear": BILINEAR,
    "bicubic": BICUBIC,
    "box": BOX,
    "hamming": HAMMING,
}


def filter_number(resample: int | str) -> int:
    """Pillow's number of a filter given by number or name.

    Raises:
        ValueError: there is no such filter.
    """
    number = _NAMES.get(resample.lower(), -1) if isinstance(resample, str) else int(resample)
    if number not in _NAMES.values():
        raise ValueError(f"unknown resample filter {resample!r}; use one of {_NAMES}")
    return number


def resize(pixels_BHW: Tensor, size: tuple[int, int], resample: int | str = BICUBIC) -> Tensor:
    """Resize pictures as the installed Pillow's `Image.resize` does, antialiasing included.

    One banded matrix product per axis, rounded to uint8 after each, in float64, where Pillow's
    fixed-point sums are exact: the result is equal to Pillow's, bit for bit (on MPS, which has
    no float64, about one pixel in a thousand is one level off). O(B * H * W * taps), taps being the
    filter's width in source pixels.

    Args:
        pixels_BHW: uint8 [..., H, W], each picture or channel by itself.
        size: (height, width), pixels.
        resample: Pillow's filter number or its name.

    Returns:
        uint8 [..., height, width] on the same device.

    Raises:
        ValueError: not uint8, no pixels, or an unknown filter.

    Example:
        >>> resize(torch.arange(16, dtype=torch.uint8).view(1, 4, 4), (2, 2), "box").tolist()
        [[[3, 5], [11, 13]]]

    Source: Pillow, src/libImaging/Resample.c.
    """
    if pixels_BHW.dtype != torch.uint8 or pixels_BHW.dim() < 2 or pixels_BHW.numel() == 0:
        raise ValueError(
            f"resize takes uint8 [..., H, W] with pixels, got {pixels_BHW.dtype} "
            f"{tuple(pixels_BHW.shape)}"
        )
    number = filter_number(resample)
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least (1, 1) pixels, got {tuple(size)}")
    H, W = pixels_BHW.shape[-2:]
    device = pixels_BHW.device
    if number == NEAREST:
        rows, columns = _nearest_index(H, height), _nearest_index(W, width)
        return pixels_BHW.index_select(-2, rows.to(device)).index_select(-1, columns.to(device))
    flat_BHW = pixels_BHW.reshape(-1, H, W)
    out_BHW = flat_BHW.new_empty(len(flat_BHW), height, width)
    scratch = _SCRATCH_BYTES.get(device.type, _SCRATCH_BYTES["cpu"])
    step = max(1, scratch // (4 * H * max(W, width)))
    for first in range(0, len(flat_BHW), step):
        out_BHW[first : first + step] = _resize_step(
            flat_BHW[first : first + step], height, width, number
        )
    return out_BHW.view(*pixels_BHW.shape[:-2], height, width)


def _resize_step(pixels_BHW: Tensor, height: int, width: int, number: int) -> Tensor:
    H, W = pixels_BHW.shape[-2:]
    # A matrix product in TF32 or bf16 would be off by a level everywhere.
    dtype = torch.float32 if pixels_BHW.device.type == "mps" else torch.float64
    x_BHW = pixels_BHW.to(dtype)
    rows_first = _ROWS_FIRST and height < H and H - height > 2 * (W - width)
    with torch.autocast(pixels_BHW.device.type, enabled=False):
        for axis in (-2, -1) if rows_first else (-1, -2):
            size = width if axis == -1 else height
            if x_BHW.shape[axis] != size:
                x_BHW = _resample(x_BHW, size, number, axis)
    return x_BHW.to(torch.uint8)


def _resample(x_BHW: Tensor, size: int, number: int, axis: int) -> Tensor:
    """One pass along one axis; the loop is over blocks of the band, not over pixels."""
    shape = list(x_BHW.shape)
    in_size, shape[axis] = shape[axis], size
    out_BHW = x_BHW.new_empty(shape)
    for block in _band(in_size, size, number):
        weight_NS = torch.from_numpy(block.weight_NS).to(x_BHW.device, x_BHW.dtype)
        source = x_BHW.narrow(axis, block.source, weight_NS.shape[1])
        target = out_BHW.narrow(axis, block.target, weight_NS.shape[0])
        target.copy_(source @ weight_NS.t() if axis == -1 else weight_NS @ source)
    return out_BHW.mul_(0.5**_PRECISION_BITS).add_(0.5).floor_().clamp_(0, 255)


class _Block(NamedTuple):
    """Weights of a run of output pixels over the source pixels that they see."""

    source: int
    target: int
    weight_NS: np.ndarray


@lru_cache(maxsize=64)
def _band(in_size: int, out_size: int, number: int) -> tuple[_Block, ...]:
    low, weight = coefficients(in_size, out_size, number)
    taps = weight.shape[1]
    blocks = []
    for target in range(0, out_size, _BLOCK):
        end = min(target + _BLOCK, out_size)
        source = int(low[target])
        span = min(int(low[end - 1]) + taps, in_size) - source
        # Slack takes the taps beyond the picture, whose weights are zero.
        dense_NS = np.zeros((end - target, span + taps))
        place = low[target:end, None] - source + np.arange(taps)
        np.put_along_axis(dense_NS, place, weight[target:end], axis=1)
        blocks.append(_Block(source, target, np.ascontiguousarray(dense_NS[:, :span])))
    return tuple(blocks)


def coefficients(in_size: int, out_size: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's taps: first source pixel int64 [N] and integer-valued weights float64 [N, taps]."""
    kernel, support = _FILTERS[number]
    scale = in_size / out_size
    filter_scale = max(scale, 1.0)
    support *= filter_scale
    taps = math.ceil(support) * 2 + 1
    center = (np.arange(out_size) + 0.5) * scale
    low = np.maximum((center - support + 0.5).astype(np.int64), 0)
    high = np.minimum((center + support + 0.5).astype(np.int64), in_size)
    place = low[:, None] + np.arange(taps)
    weight = kernel((place - center[:, None] + 0.5) / filter_scale)
    weight = np.where(place < high[:, None], weight, 0.0)
    total = weight.sum(axis=1, keepdims=True)
    weight = np.divide(weight, total, out=weight, where=total != 0)
    fixed = weight * (1 << _PRECISION_BITS)
    return low, np.trunc(np.where(fixed < 0, fixed - 0.5, fixed + 0.5))


def _nearest_index(in_size: int, out_size: int) -> Tensor:
    # Pillow adds the step up in double precision and cuts down.
    scale = in_size / out_size
    place = np.cumsum(np.concatenate(([scale * 0.5], np.full(out_size - 1, scale))))
    return torch.from_numpy(np.minimum(place.astype(np.int64), in_size - 1))
