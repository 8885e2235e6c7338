"""Small maps between encoder tokens, language-model tokens and pixels, shared by the adapters.

Legend: P patches of one image as the encoder sees them, T planes, h and w in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def checked_scores(scores: Tensor, expected: int) -> Tensor:
    """Scores in float32, checked for their number.

    Raises:
        ValueError: there are not `expected` scores.
    """
    if scores.numel() != expected:
        raise ValueError(
            f"token_scores expects one score per patch of the encoder, {expected} in all (without "
            f"[CLS] and registers), got a tensor of shape {tuple(scores.shape)}."
        )
    return scores.to(torch.float32)


def prepend_nan(scores: Tensor, count: int) -> Tensor:
    """NaN for `count` special tokens in front of the last dimension: the method decides on them."""
    return nn.functional.pad(scores, (count, 0), value=float("nan")) if count else scores


def append_nan(scores: Tensor, count: int) -> Tensor:
    """NaN for `count` special tokens behind the last dimension."""
    return nn.functional.pad(scores, (0, count), value=float("nan")) if count else scores


def stretch(pixels: Tensor) -> Tensor:
    """Normalised pixels of one item as uint8, minimum to 0 and maximum to 255.

    The processor's mean and deviation are not known here, and a picture needs only contrast.
    """
    pixels = pixels.detach().to("cpu", torch.float32)
    low, high = pixels.amin(), pixels.amax()
    return ((pixels - low) * (255 / (high - low).clamp(min=1e-12))).round().to(torch.uint8)


def stretch_each(items_N3hw: Tensor) -> list[Tensor]:
    """Every image of a batch [N, 3, h, w] as an item of one plane, uint8 [1, 3, h, w]."""
    return [stretch(image[None]) for image in items_N3hw]


def unpatchify(
    patches: Tensor,
    grid_thw: tuple[int, int, int],
    merge: int,
    patch_size: tuple[int, int],
    temporal: int = 1,
) -> Tensor:
    """Pixels [T, 3, h, w] of packed patches in blocks of `merge` x `merge`.

    Args:
        patches: [t * h * w, 3 * temporal * patch height * patch width], as the processors of
            Qwen-VL and VideoLLaMA 3 write them: block by block, row by row within a block.
        grid_thw: planes, rows and columns of patches.
        merge: side of a block in patches.
        patch_size: (height, width) in pixels.
        temporal: frames in one patch; the first of them is returned.
    """
    t, h, w = grid_thw
    x = patches.reshape(t, h // merge, w // merge, merge, merge, -1, temporal, *patch_size)
    # t, block row, block column, row, column, channel, y, x -> t, channel, y of plane, x of plane
    x = x[:, :, :, :, :, :, 0].permute(0, 5, 1, 3, 6, 2, 4, 7)
    return x.reshape(t, x.shape[1], h * patch_size[0], w * patch_size[1])


def grid_rows(grid_thw: Any) -> list[tuple[int, int, int]]:
    """`image_grid_thw` or `video_grid_thw` as a list of (planes, rows, columns) of patches."""
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    return [(int(t), int(h), int(w)) for t, h, w in rows]
