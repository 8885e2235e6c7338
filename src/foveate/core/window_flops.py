"""FLOPs of encoders whose blocks attend in windows (Swin), by the rule of `flops`.

Legend: C width, m width of the MLP, w side of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WindowDims:
    """A Swin transformer.

    Args:
        hidden: C of the first stage; it doubles from stage to stage.
        depths: blocks of every stage.
        mlp_ratio: m / C.
        patch_inputs: numbers in one patch.
    """

    hidden: int
    depths: tuple[int, ...]
    mlp_ratio: float
    patch_inputs: int

    def width(self, stage: int) -> int:
        """C of a stage."""
        return self.hidden << stage

    def inner(self, stage: int) -> int:
        """m of a stage."""
        return int(self.mlp_ratio * self.width(stage))


def block_flops(width: int, inner: int, queries: int, read: int, pairs: int) -> int:
    """FLOPs of a block whose tokens read others.

    Args:
        width: C.
        inner: m.
        queries: tokens.
        read: tokens that keys and values are made of.
        pairs: queries times the keys that each meets.

    Example:
        >>> block_flops(8, 32, 10, 10, 100)
        18560
    """
    linear = 4 * width * width * (queries + read)
    return linear + 4 * width * pairs + 4 * width * inner * queries


def window_block_flops(dims: WindowDims, stage: int, plane: tuple[int, int], window: int) -> int:
    """FLOPs of one block on a plane, which is padded to whole windows for its attention."""
    rows, columns = (-(-size // window) * window for size in plane)
    width, padded, tokens = dims.width(stage), rows * columns, plane[0] * plane[1]
    attention = 8 * width * width * padded + 4 * width * padded * window * window
    return attention + 4 * width * dims.inner(stage) * tokens


def window_flops(dims: WindowDims, plane: tuple[int, int], windows: Sequence[int]) -> int:
    """FLOPs of one image.

    Args:
        dims: the encoder.
        plane: rows and columns of patches.
        windows: w of every stage.

    Example:
        >>> swin_t = WindowDims(96, (2, 2, 6, 2), 4.0, 48)
        >>> round(window_flops(swin_t, (56, 56), (7, 7, 7, 7)) / 2e9, 2)  # multiply-adds
        4.49

    Source: Swin Transformer (arXiv 2103.14030), table 1: 4.5 G for Swin-T.
    """
    total = 2 * dims.patch_inputs * dims.hidden * plane[0] * plane[1]
    for stage, (depth, window) in enumerate(zip(dims.depths, windows, strict=True)):
        total += depth * window_block_flops(dims, stage, plane, window)
        if stage + 1 < len(dims.depths):
            plane = merged_plane(plane)
            width = dims.width(stage)
            total += 2 * 4 * width * 2 * width * plane[0] * plane[1]
    return total


def merged_plane(plane: tuple[int, int]) -> tuple[int, int]:
    """The plane of the next stage: 2 x 2 tokens become one, a last odd row or column alone.

    Example:
        >>> merged_plane((7, 10))
        (4, 5)
    """
    return (plane[0] + 1) // 2, (plane[1] + 1) // 2
