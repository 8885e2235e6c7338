"""What lies behind the sprites: textures drawn from noise, or crops of natural pictures.

Legend: H, W pixels of the canvas; C colours (3).
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from foveate.world.draw import Draw

#: Brightest value of a background or sprite: leaves room for sensor noise without overflow.
BRIGHTEST = 247


def _dull_color(draw: Draw, low: float = 0.12, high: float = 0.6) -> np.ndarray:
    """A colour that no sprite has: float [C] in [0, 1], of low saturation."""
    hue, saturation, value = draw.uniform(), draw.uniform(0.0, 0.35), draw.uniform(low, high)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _field(draw: Draw, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth value noise in [0, 1]: float32 [H, W]."""
    grid = Image.fromarray(draw.noise(cells, cells))
    image = grid.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32) / 255


def _clouds(draw: Draw, height: int, width: int) -> np.ndarray:
    coarse = _field(draw, height, width, draw.integer(3, 5))
    return 0.7 * coarse + 0.3 * _field(draw, height, width, draw.integer(9, 16))


def _slope(draw: Draw, height: int, width: int) -> np.ndarray:
    """A plain gradient across the canvas."""
    across, down = draw.uniform(-1, 1), draw.uniform(-1, 1)
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    ramp = across * x + down * y
    return ((ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)).astype(np.float32)


def _planks(draw: Draw, height: int, width: int) -> np.ndarray:
    """Wide stripes at an angle, slightly uneven."""
    across, down = draw.uniform(2, 7), draw.uniform(-5, 5)
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    stripes = (across * x + down * y) % 1 < 0.5
    return (0.75 * stripes + 0.25 * _field(draw, height, width, 8)).astype(np.float32)


def _tiles(draw: Draw, height: int, width: int) -> np.ndarray:
    """A board of uneven tiles."""
    cells = draw.integer(3, 6)
    board = Image.fromarray(draw.noise(cells, cells))
    sharp = np.asarray(board.resize((width, height), Image.Resampling.NEAREST), dtype=np.float32)
    return 0.6 * sharp / 255 + 0.4 * _field(draw, height, width, 10)


_PATTERNS: dict[str, Callable[[Draw, int, int], np.ndarray]] = {
    "clouds": _clouds,
    "slope": _slope,
    "planks": _planks,
    "tiles": _tiles,
}


def textured(draw: Draw, height: int, width: int) -> np.ndarray:
    """A drawn background in two dull colours: uint8 [H, W, C]; O(H W)."""
    pattern = _PATTERNS[draw.choice(tuple(_PATTERNS))](draw, height, width)
    first, second = _dull_color(draw), _dull_color(draw)
    mixed = first + pattern[..., None] * (second - first)
    return np.clip(mixed * 255, 0, BRIGHTEST).astype(np.uint8)


def natural(draw: Draw, height: int, width: int, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """A crop of one of these pictures (uint8 [h, w, C]), possibly mirrored: uint8 [H, W, C].

    Its saturation is lowered, so that the names of colours stay with the sprites.
    """
    picture = draw.choice(pictures)
    full_height, full_width = picture.shape[:2]
    scale = draw.uniform(0.45, 1.0) * min(full_height / height, full_width / width)
    crop_height, crop_width = scale * height, scale * width
    left = draw.uniform(0, full_width - crop_width)
    top = draw.uniform(0, full_height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image, dtype=np.float32)
    if draw.chance(0.5):
        pixels = pixels[:, ::-1]
    grey = pixels.mean(axis=2, keepdims=True)
    muted = (0.45 * pixels + 0.55 * grey) * draw.uniform(0.55, 0.8)
    return np.clip(muted, 0, BRIGHTEST).astype(np.uint8)


@lru_cache(maxsize=1)
def natural_pictures() -> tuple[np.ndarray, ...]:
    """Frames of the real clips that come with `foveate[demo]`: uint8 [h, w, C] each.

    Raises:
        MissingDependencyError: the extra is not installed.
    """
    from foveate.video import Clip, sample_clip

    pictures = []
    for name in ("bigbuckbunny", "bikes", "carphone"):
        frames = Clip(sample_clip(name)).sample(8)
        pictures += list(frames.pixels.permute(0, 2, 3, 1).contiguous().numpy())
    return tuple(pictures)
