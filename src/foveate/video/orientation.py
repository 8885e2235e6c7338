"""How a stored picture is turned to be looked at (the container's display matrix)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Orientation:
    """Transpose first, then flip: one of the eight ways to turn a rectangle.

    Attributes:
        transpose: rows become columns.
        flip_x: left becomes right, after transposing.
        flip_y: top becomes bottom, after transposing.

    Example:
        >>> Orientation.from_matrix(struct.pack("<9i", 0, 1 << 16, 0, -(1 << 16), *[0] * 5)).degrees
        90
    """

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def from_matrix(cls, data: bytes) -> Orientation:
        """Read a display matrix: nine little-endian int32 (a, b, u, c, d, v, x, y, w).

        A stored point (x, y) is shown at (a x + c y, b x + d y). Angles between quarter turns are
        rounded to the nearest one.
        """
        if len(data) < 36:
            return cls()
        a, b, _, c, d, *_ = struct.unpack("<9i", data[:36])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(transpose=True, flip_x=c < 0, flip_y=b < 0)
        return cls(transpose=False, flip_x=a < 0, flip_y=d < 0)

    @property
    def mirrored(self) -> bool:
        """Whether no rotation alone does it."""
        return (self.flip_x != self.flip_y) != self.transpose

    @property
    def degrees(self) -> int:
        """Clockwise rotation, after a left-right flip if `mirrored`."""
        if self.transpose:
            return 90 if self.flip_x else 270
        return 180 if self.flip_y else 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after turning; its own inverse."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, pixels_CHW: np.ndarray) -> np.ndarray:
        """Turn pictures [..., H, W] (a view)."""
        if self.transpose:
            pixels_CHW = np.swapaxes(pixels_CHW, -2, -1)
        axes = tuple(axis for axis, flip in ((-2, self.flip_y), (-1, self.flip_x)) if flip)
        return np.flip(pixels_CHW, axes) if axes else pixels_CHW
