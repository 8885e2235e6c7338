"""Pictures of one bright shape on a dark, cluttered ground, drawn many at a time.

Legend: B pictures, H rows and columns, D dots of clutter.
"""

from __future__ import annotations

import numpy as np

#: What is told apart; the label of a picture is a place in this list.
SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "stripes", "half")
#: Half the width of a shape, as a fraction of the side.
_RADIUS = (0.16, 0.24)
#: Dots of another colour that lie anywhere, of one pixel to three.
_DOTS = 6


def draw_pictures(
    draw: np.random.Generator, count: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and the number of the shape in each.

    Args:
        draw: source of everything that is random.
        count: B.
        side: H in pixels.

    Returns:
        uint8 [B, 3, H, H] and int64 [B], a place in `SHAPES`.

    Example:
        >>> pictures, labels = draw_pictures(np.random.default_rng(0), 4, 32)
        >>> pictures.shape, pictures.dtype, bool((labels < len(SHAPES)).all())
        ((4, 3, 32, 32), dtype('uint8'), True)
    """
    label_B = draw.integers(0, len(SHAPES), count)
    radius_B = draw.uniform(*_RADIUS, count) * side
    centre_2B = draw.uniform(0, 1, (2, count)) * (side - 2.6 * radius_B) + 1.3 * radius_B
    turn_B = draw.uniform(-0.3, 0.3, count)
    axis_H = np.arange(side) + 0.5
    x_BHH = (axis_H[None, None] - centre_2B[0][:, None, None]) / radius_B[:, None, None]
    y_BHH = (axis_H[None, :, None] - centre_2B[1][:, None, None]) / radius_B[:, None, None]
    cos_B11, sin_B11 = np.cos(turn_B)[:, None, None], np.sin(turn_B)[:, None, None]
    u_BHH, v_BHH = cos_B11 * x_BHH + sin_B11 * y_BHH, cos_B11 * y_BHH - sin_B11 * x_BHH
    inside_BHH = _inside(u_BHH, v_BHH, label_B)
    ground_B3HH = _ground(draw, count, axis_H / side)
    colour_B3 = draw.uniform(0.6, 1, (count, 3))
    picture_B3HH = np.where(inside_BHH[:, None], colour_B3[:, :, None, None], ground_B3HH)
    picture_B3HH = picture_B3HH + draw.normal(0, 0.05, picture_B3HH.shape)
    return (picture_B3HH.clip(0, 1) * 255).astype(np.uint8), label_B


def _inside(u: np.ndarray, v: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Which pixels each shape covers, in units of its radius, bool [B, H, H]."""
    r2, far = u * u + v * v, np.maximum(abs(u), abs(v))
    third = np.maximum(v, np.maximum(-0.5 * v + 0.866 * u, -0.5 * v - 0.866 * u))
    disc = r2 < 1
    cases = [
        disc,
        disc & (r2 > 0.36),
        far < 0.85,
        (far < 0.9) & (far > 0.55),
        third < 0.6,
        (far < 1) & (np.minimum(abs(u), abs(v)) < 0.33),
        (far < 0.9) & (abs(v) > 0.3),
        disc & (v > 0),
    ]
    return np.select([(label_B == number)[:, None, None] for number in range(len(SHAPES))], cases)


def _ground(draw: np.random.Generator, count: int, axis_H: np.ndarray) -> np.ndarray:
    """A dark colour, a slope of brightness and dots, float [B, 3, H, H]."""
    base_B3 = draw.uniform(0.1, 0.3, (count, 3))
    slope_2B = draw.uniform(-0.1, 0.1, (2, count))
    light_BHH = slope_2B[0][:, None, None] * axis_H + slope_2B[1][:, None, None] * axis_H[:, None]
    ground_B3HH = base_B3[:, :, None, None] + light_BHH[:, None]
    side = len(axis_H)
    row_BD, column_BD = draw.integers(0, side, (2, count, _DOTS))
    size_BD = draw.integers(1, 4, (count, _DOTS))
    dot_BD3 = draw.uniform(0, 0.6, (count, _DOTS, 3))
    place_H = np.arange(side)
    down_BDH = (place_H >= row_BD[..., None]) & (place_H < (row_BD + size_BD)[..., None])
    along_BDH = (place_H >= column_BD[..., None]) & (place_H < (column_BD + size_BD)[..., None])
    for dot in range(_DOTS):
        covered_BHH = down_BDH[:, dot, :, None] & along_BDH[:, dot, None]
        colour_B311 = dot_BD3[:, dot, :, None, None]
        ground_B3HH = np.where(covered_BHH[:, None], colour_B311, ground_B3HH)
    return ground_B3HH
