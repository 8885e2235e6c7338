"""Pictures of shapes on textured backgrounds: which one is marked, and what every patch shows.

Every shape has a fine texture, a colour and a black outline; that of one of them is white. Its
texture and the group of its colour are the picture's class. Forms are signed distances, drawn with
soft edges.

Legend: B pictures, S pixels of a side, h and w rows and columns of patches, b pixels of a side of
the box around one shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Textures of shapes; the class of a patch is one more than its texture's place here, 0 elsewhere.
TEXTURES = ("plain", "rows", "columns", "checks", "diagonals")
#: Forms, which say nothing about the class.
FORMS = ("disc", "square", "triangle")
#: Red, green, blue of the middle of each group of colours.
COLOURS = ((0.85, 0.4, 0.2), (0.2, 0.45, 0.85))
#: Classes of a picture (texture and colour of the marked shape) and of a patch.
NUM_LABELS, NUM_CLASSES = len(TEXTURES) * len(COLOURS), len(TEXTURES) + 1
#: Side of a picture and of a patch in pixels.
SIDE, PATCH = 56, 4
#: Smallest and largest half extent of a shape; most shapes of a picture.
RADII, MOST = (5.0, 9.0), 5
#: Half extents of needles, smaller than any shape of the training.
NEEDLE_RADII = (3.0, 4.0)
#: Regions of a mosaic.
REGIONS = 16
#: A shape and its soft edge never reach further than this from its middle.
_REACH = 12
#: Cells of a side in which the middles of shapes lie; width of outlines in pixels.
_CELLS, _OUTLINE = 3, 1.6
#: Contrast of a texture, and its radians per pixel.
_CONTRAST, _FINE = 0.3, np.float32(np.pi / 2)


@dataclass(frozen=True)
class Pictures:
    """Pictures with their labels.

    Attributes:
        pixels_B3SS: float32, about -1 to 1.
        label_B: class of the picture, int64.
        patch_Bhw: class of every patch, int64.
        marked_Bhw: fraction of every patch that the marked shape covers, float32.
        corner_B2: row and column of the first patch in the whole picture, int64.
        clutter_B: 0, one shape on a flat ground, to 1, many on a rough one.

    Example:
        >>> drawn = draw_pictures(np.random.Generator(np.random.PCG64(0)), 3)
        >>> drawn.pixels_B3SS.shape, drawn.patch_Bhw.shape, drawn.label_B.shape
        ((3, 3, 56, 56), (3, 14, 14), (3,))
    """

    pixels_B3SS: np.ndarray
    label_B: np.ndarray
    patch_Bhw: np.ndarray
    marked_Bhw: np.ndarray
    corner_B2: np.ndarray
    clutter_B: np.ndarray


def draw_pictures(
    rng: np.random.Generator,
    count: int,
    *,
    window: int | None = None,
    clutter: tuple[float, float] = (0.0, 1.0),
    radii: tuple[float, float] = RADII,
) -> Pictures:
    """New pictures, O(count S^2).

    Args:
        rng: every number is drawn from it.
        count: B.
        window: side in patches of a part around the marked shape that is shown; None: all.
        clutter: smallest and largest.
        radii: of the shapes, smallest and largest, in pixels.
    """
    clutter_B = rng.uniform(*clutter, count).astype(np.float32)
    shapes = _cast(rng, clutter_B, radii)
    ground_BSS3 = _grounds(rng, clutter_B)
    size = SIDE + 2 * _REACH
    pixels = np.zeros((count, size, size, 3), np.float32)
    inside = slice(_REACH, -_REACH)
    pixels[:, inside, inside] = ground_BSS3
    classes, marked = np.zeros((2, count, size, size), np.int8)
    for slot in range(MOST):
        who = np.flatnonzero(shapes["present"][:, slot])
        _paint(pixels, classes, marked, {k: v[who, slot] for k, v in shapes.items()}, who)
    pixels, classes, marked = (x[:, inside, inside] for x in (pixels, classes, marked))
    corner_B2 = np.zeros((count, 2), np.int64)
    if window is not None:
        corner_B2 = _corners(rng, shapes["middle"][:, -1], shapes["radius"][:, -1], window)
        pixels, classes, marked = (_cut(x, corner_B2, window) for x in (pixels, classes, marked))
    noise_BSS1 = rng.standard_normal((*classes.shape, 1), np.float32)
    pixels = pixels + (0.02 + 0.05 * clutter_B)[:, None, None, None] * noise_BSS1
    return Pictures(
        np.ascontiguousarray((2 * pixels - 1).transpose(0, 3, 1, 2)),
        (shapes["texture"] + len(TEXTURES) * shapes["colour"])[:, -1],
        _most_common(classes),
        _patches(marked).mean((2, 4), dtype=np.float32),
        corner_B2,
        clutter_B,
    )


@dataclass(frozen=True)
class Mosaics:
    """Pictures that regions of texture cover wholly.

    Attributes:
        pixels_B3SS: float32, about -1 to 1.
        share_BT: fraction of every picture that each texture covers, float32.
        patch_Bhw: class of every patch, int64, as of `Pictures`; never 0.

    Example:
        >>> drawn = draw_mosaics(np.random.Generator(np.random.PCG64(0)), 3)
        >>> drawn.pixels_B3SS.shape, drawn.share_BT.sum(1).round(3).tolist()
        ((3, 3, 56, 56), [1.0, 1.0, 1.0])
    """

    pixels_B3SS: np.ndarray
    share_BT: np.ndarray
    patch_Bhw: np.ndarray


def draw_mosaics(rng: np.random.Generator, count: int) -> Mosaics:
    """New pictures of regions of three textures, in one colour, O(count regions S^2).

    Args:
        rng: every number is drawn from it.
        count: B.
    """
    B, at_S = count, np.arange(SIDE, dtype=np.float32) + 0.5
    seed_BR2 = rng.uniform(0, SIDE, (B, REGIONS, 2)).astype(np.float32)
    away_BR2S = (seed_BR2[..., None] - at_S) ** 2
    region_BSS = (away_BR2S[:, :, 0, :, None] + away_BR2S[:, :, 1, None]).argmin(1)
    few_B3 = rng.random((B, len(TEXTURES))).argsort(1)[:, :3]
    kind_BR = np.take_along_axis(few_B3, rng.integers(3, size=(B, REGIONS)), 1)
    phase_BR2 = rng.uniform(0, 2 * np.pi, (B, REGIONS, 2)).astype(np.float32)
    picture_B11 = np.arange(B)[:, None, None]
    kind_BSS, phase_BSS2 = kind_BR[picture_B11, region_BSS], phase_BR2[picture_B11, region_BSS]
    across_BSS = _FINE * at_S + phase_BSS2[..., 0]
    down_BSS = _FINE * at_S[:, None] + phase_BSS2[..., 1]
    bright_BSS = _CONTRAST * _texture(kind_BSS, across_BSS, down_BSS)
    base_B3 = rng.uniform(0.35, 0.6, (B, 1)) + rng.uniform(-0.08, 0.08, (B, 3))
    pixels = base_B3.astype(np.float32)[..., None, None] + bright_BSS[:, None]
    pixels += 0.05 * rng.standard_normal((B, 1, SIDE, SIDE), np.float32)
    share_BT = np.stack([(kind_BSS == kind).mean((1, 2)) for kind in range(len(TEXTURES))], 1)
    return Mosaics(2 * pixels - 1, share_BT.astype(np.float32), _most_common(kind_BSS + 1))


def _cast(
    rng: np.random.Generator, clutter_B: np.ndarray, radii: tuple[float, float]
) -> dict[str, np.ndarray]:
    """Shapes of every picture, [B, MOST, ...], in the order they are drawn; the marked one last."""
    B = len(clutter_B)
    others_B = (clutter_B * MOST).astype(np.int64).clip(0, MOST - 1)
    radius = rng.uniform(*radii, (B, MOST)).astype(np.float32)
    cell = rng.random((B, _CELLS**2)).argsort(1)[:, :MOST]
    middle = (np.stack([cell // _CELLS, cell % _CELLS], 2) + 0.5) * SIDE / _CELLS
    middle = middle + rng.uniform(-3.5, 3.5, middle.shape)
    middle = middle.clip(radius[..., None], SIDE - radius[..., None]).astype(np.float32)
    colour = rng.integers(len(COLOURS), size=(B, MOST))
    rgb = np.array(COLOURS, np.float32)[colour]
    rgb = rgb + rng.uniform(-0.15, 0.15, rgb.shape).astype(np.float32)
    return {
        "present": np.arange(MOST) >= MOST - 1 - others_B[:, None],
        "form": rng.integers(len(FORMS), size=(B, MOST)),
        "texture": rng.integers(len(TEXTURES), size=(B, MOST)),
        "phase": rng.uniform(0, 2 * np.pi, (B, MOST, 2)).astype(np.float32),
        "colour": colour,
        "rgb": rgb.clip(0, 1),
        "radius": radius,
        "middle": middle,
        "turn": rng.uniform(0, 2 * np.pi, (B, MOST)).astype(np.float32),
        "marked": np.broadcast_to(np.arange(MOST) == MOST - 1, (B, MOST)),
    }


def _grounds(rng: np.random.Generator, clutter_B: np.ndarray) -> np.ndarray:
    """Backgrounds, float32 [B, S, S, 3]: one colour and two gratings on it."""
    B, at_S = len(clutter_B), np.arange(SIDE, dtype=np.float32)
    base_B3 = rng.uniform(0.35, 0.6, (B, 1)) + rng.uniform(-0.08, 0.08, (B, 3))
    speed = rng.uniform(0.15, 0.8, (B, 2, 1)).astype(np.float32)
    turn = rng.uniform(0, np.pi, (B, 2, 1)).astype(np.float32)
    shift = rng.uniform(0, 2 * np.pi, (B, 2, 1)).astype(np.float32)
    # sin(a + b) from the sines of rows and columns: S of them each, not S^2.
    row, column = speed * np.sin(turn) * at_S + shift, speed * np.cos(turn) * at_S
    row_BS4 = np.concatenate([np.sin(row), np.cos(row)], 1).transpose(0, 2, 1)
    column_B4S = np.concatenate([np.cos(column), np.sin(column)], 1)
    wave_BSS = (0.01 + 0.06 * clutter_B)[:, None, None] * (row_BS4 @ column_B4S)
    return base_B3.astype(np.float32)[:, None, None] + wave_BSS[..., None]


def _distance(form_B: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distances to the edges of forms, in pixels, negative inside; x, y [B, b, b]."""
    wide = np.abs(x)
    forms = (
        np.sqrt(x * x + y * y) - r,
        np.maximum(wide, np.abs(y)) - 0.85 * r,
        np.maximum(y, 0.866 * wide - 0.5 * y) - 0.6 * r,
    )
    return np.choose(form_B[:, None, None], forms)


def _texture(kind: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness of textures, -1 to 1, at phases x and y; all three as far as [B, b, b]."""
    rows, columns = np.sin(y), np.sin(x)
    textures = np.broadcast_arrays(np.float32(0), rows, columns, rows * columns, np.sin(x + y))
    return np.choose(kind, textures)


def _paint(
    pixels: np.ndarray,
    classes: np.ndarray,
    marked: np.ndarray,
    shape: dict[str, np.ndarray],
    who_B: np.ndarray,
) -> None:
    """Draw one shape on each of some pictures, [B, S + margins, S + margins, ...], in place."""
    corner_B2 = shape["middle"].astype(np.int64)  # of the box, in pixels with the margin
    box = np.arange(2 * _REACH)
    away_B2b = (corner_B2[..., None] + box - _REACH + 0.5 - shape["middle"][..., None]).astype(
        np.float32
    )
    y, x = away_B2b[:, 0, :, None], away_B2b[:, 1, None]
    sin, cos = (f(shape["turn"])[:, None, None] for f in (np.sin, np.cos))
    distance = _distance(
        shape["form"], cos * x - sin * y, sin * x + cos * y, shape["radius"][:, None, None]
    )
    cover, inner = ((0.5 - d).clip(0, 1)[..., None] for d in (distance, distance + _OUTLINE))
    phase = shape["phase"][:, :, None, None]
    kind_B11 = shape["texture"][:, None, None]
    bright = _texture(kind_B11, _FINE * x + phase[:, 0], _FINE * y + phase[:, 1])
    at = (
        who_B[:, None, None],
        (corner_B2[:, :1] + box)[:, :, None],
        (corner_B2[:, 1:] + box)[:, None],
    )
    value = pixels[at]
    value += cover * (shape["marked"][:, None, None, None] - value)
    value += inner * (shape["rgb"][:, None, None] + _CONTRAST * bright[..., None] - value)
    pixels[at] = value
    inside = distance < 0
    classes[at] = np.where(inside, shape["texture"][:, None, None] + 1, classes[at])
    marked[at] = inside & shape["marked"][:, None, None]


def _corners(
    rng: np.random.Generator, middle_B2: np.ndarray, radius_B: np.ndarray, window: int
) -> np.ndarray:
    """First patches of windows in which the marked shapes lie whole, int64 [B, 2]."""
    last = SIDE // PATCH - window
    low = np.ceil((middle_B2 + radius_B[:, None] + 1) / PATCH - window).clip(0, last)
    high = np.floor((middle_B2 - radius_B[:, None] - 1) / PATCH).clip(0, last)
    return (low + rng.random(low.shape) * (high - low + 1)).astype(np.int64).clip(0, last)


def _cut(x: np.ndarray, corner_B2: np.ndarray, window: int) -> np.ndarray:
    at = corner_B2[..., None] * PATCH + np.arange(window * PATCH)
    return x[np.arange(len(x))[:, None, None], at[:, 0, :, None], at[:, 1, None]]


def _patches(x_BSS: np.ndarray) -> np.ndarray:
    """[B, S, S] -> [B, h, PATCH, w, PATCH]."""
    B, S, _ = x_BSS.shape
    return x_BSS.reshape(B, S // PATCH, PATCH, S // PATCH, PATCH)


def _most_common(classes_BSS: np.ndarray) -> np.ndarray:
    """The class of most pixels of every patch, int64 [B, h, w]; the lowest of several."""
    patch = _patches(classes_BSS)
    count = np.stack([(patch == kind).sum((2, 4)) for kind in range(NUM_CLASSES)], axis=-1)
    return count.argmax(-1)
