"""Pictures of three bright shapes on a dark ground, and in which band the ring lies.

Legend: B pictures, H rows and columns, D dots of clutter, G bands, T shapes of a picture.
"""

from __future__ import annotations

import numpy as np

#: The first is looked for; two of the others lie in other bands.
SHAPES = ("ring", "disc", "square", "triangle", "plus")
#: Horizontal bands of equal height; the label of a picture is the one with the ring.
BANDS = 4
#: Half the width of a shape, as a fraction of the side.
_RADIUS = (0.1, 0.13)
#: Shapes of a picture, each in a band of its own.
_COUNT = 3
#: Dots of another colour that lie anywhere, of one pixel to three.
_DOTS = 6


def draw_pictures(
    draw: np.random.Generator, count: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and the band of the ring in each.

    Args:
        draw: source of everything that is random.
        count: B.
        side: H in pixels.

    Returns:
        uint8 [B, 3, H, H] and int64 [B] below `BANDS`, counted from the top.

    Example:
        >>> pictures, labels = draw_pictures(np.random.default_rng(0), 4, 32)
        >>> pictures.shape, pictures.dtype, bool((labels < BANDS).all())
        ((4, 3, 32, 32), dtype('uint8'), True)
    """
    picture_B3HH = _ground(draw, count, (np.arange(side) + 0.5) / side)
    band_BG = draw.random((count, BANDS)).argsort(1)
    kind_BT = 1 + draw.random((count, len(SHAPES) - 1)).argsort(1)[:, :_COUNT]
    kind_BT[:, 0] = 0
    for number in range(_COUNT):
        inside_BHH = _shape(draw, kind_BT[:, number], band_BG[:, number], side)
        colour_B311 = draw.uniform(0.6, 1, (count, 3))[:, :, None, None]
        picture_B3HH = np.where(inside_BHH[:, None], colour_B311, picture_B3HH)
    picture_B3HH = picture_B3HH + draw.normal(0, 0.03, picture_B3HH.shape)
    return (picture_B3HH.clip(0, 1) * 255).astype(np.uint8), band_BG[:, 0]


def _shape(
    draw: np.random.Generator, kind_B: np.ndarray, band_B: np.ndarray, side: int
) -> np.ndarray:
    """Which pixels one shape of every picture covers, bool [B, H, H]."""
    count, axis_H = len(kind_B), np.arange(side) + 0.5
    radius_B = draw.uniform(*_RADIUS, count) * side
    x_B = draw.uniform(0, 1, count) * (side - 2.2 * radius_B) + 1.1 * radius_B
    y_B = (band_B + 0.5 + draw.uniform(-0.1, 0.1, count)) * side / BANDS
    turn_B = draw.uniform(-0.3, 0.3, count)
    x_B1H = (axis_H - x_B[:, None, None]) / radius_B[:, None, None]
    y_BH1 = (axis_H[:, None] - y_B[:, None, None]) / radius_B[:, None, None]
    cos_B11, sin_B11 = np.cos(turn_B)[:, None, None], np.sin(turn_B)[:, None, None]
    u_BHH, v_BHH = cos_B11 * x_B1H + sin_B11 * y_BH1, cos_B11 * y_BH1 - sin_B11 * x_B1H
    return _inside(u_BHH, v_BHH, kind_B)


def _inside(u: np.ndarray, v: np.ndarray, kind_B: np.ndarray) -> np.ndarray:
    """Which pixels each shape covers, in units of its radius, bool [B, H, H]."""
    r2, far = u * u + v * v, np.maximum(abs(u), abs(v))
    third = np.maximum(v, np.maximum(-0.5 * v + 0.866 * u, -0.5 * v - 0.866 * u))
    cases = [
        (r2 < 1) & (r2 > 0.3),
        r2 < 1,
        far < 0.85,
        third < 0.6,
        (far < 1) & (np.minimum(abs(u), abs(v)) < 0.33),
    ]
    return np.select([(kind_B == number)[:, None, None] for number in range(len(SHAPES))], cases)


def _ground(draw: np.random.Generator, count: int, axis_H: np.ndarray) -> np.ndarray:
    """A dark colour, a slope of brightness and dots, float [B, 3, H, H]."""
    base_B3 = draw.uniform(0.0, 0.06, (count, 3))
    slope_2B = draw.uniform(0, 0.04, (2, count))
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
