"""Outlines and textures of sprites, as masks of any size.

Legend: S side of a sprite's patch in pixels; K supersamples along each side of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from foveate.world.vocabulary import SHAPES, TEXTURES

_SUPERSAMPLES = 4


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: the radius of the outline swings between 0.42 and 1 with the angle."""
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / 5
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    # The straight edge from the tip (radius 1, angle 0) to the notch (radius 0.42, angle 36 deg).
    notch_x, notch_y = 0.42 * np.sin(sector / 2), 0.42 * np.cos(sector / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(folded), radius * np.cos(folded)
    return (notch_x - 0.0) * (py - 1.0) - (notch_y - 1.0) * (px - 0.0) <= 0


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = x * 1.18, -y * 1.12 + 0.12
    return (u * u + v * v - 0.78) ** 3 - 1.3 * u * u * v**3 <= 0


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y <= 0.78) & (y >= 1.75 * np.abs(x) - 0.95)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inside = np.maximum(np.abs(x), np.abs(y)) <= 0.92
    return inside & (np.minimum(np.abs(x), np.abs(y)) <= 0.3)


#: Shape -> whether the points (x to the right, y down, both in [-1, 1]) lie inside.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) <= 0.92,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.8,
    "triangle": _triangle,
    "diamond": lambda x, y: np.abs(x) * 1.25 + np.abs(y) <= 1.0,
    "cross": _cross,
    "star": _star,
    "ring": lambda x, y: (np.hypot(x, y) <= 0.95) & (np.hypot(x, y) >= 0.52),
    "heart": _heart,
}
assert tuple(_INSIDE) == SHAPES


def _coordinates(side: int, supersamples: int) -> tuple[np.ndarray, np.ndarray]:
    points = (np.arange(side * supersamples) + 0.5) / (side * supersamples) * 2 - 1
    x, y = np.meshgrid(points, points)
    return x, y


@lru_cache(maxsize=1024)
def shape_alpha(shape: str, side: int) -> np.ndarray:
    """Coverage of a shape's pixels: uint8 [S, S], 255 inside, smooth at the edge.

    Args:
        shape: one of `SHAPES`.
        side: of the patch, pixels.

    Raises:
        ValueError: unknown shape, or a side below 1 pixel.

    Example:
        >>> int(shape_alpha("ring", 15)[7, 7])
        0
    """
    if shape not in _INSIDE:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}.")
    if side < 1:
        raise ValueError(f"side must be at least 1 pixel, got {side}.")
    x, y = _coordinates(side, _SUPERSAMPLES)
    inside = _INSIDE[shape](x, y)
    blocks = inside.reshape(side, _SUPERSAMPLES, side, _SUPERSAMPLES)
    alpha = np.round(blocks.mean(axis=(1, 3)) * 255).astype(np.uint8)
    alpha.setflags(write=False)
    return alpha


@lru_cache(maxsize=256)
def texture_shade(texture: str, side: int) -> np.ndarray:
    """Brightness of a texture's pixels in 1/256: uint16 [S, S]; 256 leaves the colour as it is.

    Raises:
        ValueError: unknown texture.

    Example:
        >>> int(texture_shade("plain", 4).min())
        256
    """
    if texture not in TEXTURES:
        raise ValueError(f"unknown texture {texture!r}; choose one of {', '.join(TEXTURES)}.")
    period = max(2.0, side / 3.5)
    row, column = np.mgrid[:side, :side] / period
    if texture == "plain":
        dark = np.zeros((side, side), dtype=bool)
    elif texture == "striped":
        dark = (row + column) % 1 < 0.4
    elif texture == "dotted":
        dark = np.hypot(row % 1 - 0.5, column % 1 - 0.5) < 0.3
    else:
        dark = (np.floor(row * 1.2) + np.floor(column * 1.2)) % 2 == 1
    shade = np.where(dark, 168, 256).astype(np.uint16)
    shade.setflags(write=False)
    return shade
