"""Scenes to pixels, with the mask of every pixel.

Legend: T frames; H, W pixels; C colours (3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from foveate.world.backgrounds import BRIGHTEST, natural, natural_pictures, textured
from foveate.world.draw import Draw
from foveate.world.glyphs import GLYPH_HEIGHT, text_alpha
from foveate.world.scene import Scene, Shot, Sprite
from foveate.world.shapes import shape_alpha, texture_shade

_INK = 235


def render(
    scene: Scene, height: int, width: int, *, frames: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Args:
        scene: what to draw.
        height: of the frames, pixels.
        width: of the frames, pixels.
        frames: numbers of the frames to draw, ascending; None: all.

    Returns:
        pixels uint8 [T, H, W, C] and masks uint8 [T, H, W]: the id of the sprite that covers a
        pixel by half or more, the topmost where several do; 0 where the background shows.

    Complexity: O(T H W) for the background, O(area) per sprite and frame.

    Raises:
        ValueError: a size below 16 pixels, or frames that are not ascending numbers of the clip's.
        MissingDependencyError: the scene has natural backgrounds and `foveate[demo]` is missing.

    Example:
        >>> from foveate.world.cast import sample_scene
        >>> pixels_THWC, masks_THW = render(sample_scene("a", 8), 32, 48)
        >>> pixels_THWC.shape, masks_THW.shape
        ((8, 32, 48, 3), (8, 32, 48))
    """
    if min(height, width) < 16:
        raise ValueError(f"frames must be at least 16 pixels high and wide, got {height}x{width}.")
    wanted = list(range(scene.frames)) if frames is None else list(frames)
    if not wanted or wanted != sorted({*wanted} & {*range(scene.frames)}):
        raise ValueError(
            f"frames must be ascending numbers from 0 to {scene.frames - 1}, got {wanted}."
        )
    pixels_THWC = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
    masks_THW = np.zeros((len(wanted), height, width), dtype=np.uint8)
    for shot in scene.shots:
        inside = [slot for slot, frame in enumerate(wanted) if shot.first <= frame <= shot.last]
        if inside:
            _draw_background(shot, pixels_THWC, wanted, inside)
    for sprite in sorted(scene.sprites, key=lambda one: one.depth):
        _draw_sprite(sprite, scene.frames, pixels_THWC, masks_THW, wanted)
    if scene.noise:
        _add_noise(scene, pixels_THWC, wanted)
    return pixels_THWC, masks_THW


def _draw_background(
    shot: Shot, pixels_THWC: np.ndarray, wanted: list[int], inside: list[int]
) -> None:
    """One canvas per shot; the camera is a window that moves over it."""
    height, width = pixels_THWC.shape[1:3]
    canvas_height, canvas_width = round(height * shot.room), round(width * shot.room)
    draw = Draw(shot.seed)
    if shot.background == "natural":
        canvas = natural(draw, canvas_height, canvas_width, natural_pictures())
    else:
        canvas = textured(draw, canvas_height, canvas_width)
    if shot.still and shot.room == 1 and shot.zoom[0] == 1:
        pixels_THWC[inside] = canvas
        return
    image = Image.fromarray(canvas)
    for slot in inside:
        across, down, zoom = shot.view(wanted[slot])
        if zoom == 1:
            left = round(across * (canvas_width - width))
            top = round(down * (canvas_height - height))
            pixels_THWC[slot] = canvas[top : top + height, left : left + width]
            continue
        view_width, view_height = width / zoom, height / zoom
        left, top = across * (canvas_width - view_width), down * (canvas_height - view_height)
        box = (left, top, left + view_width, top + view_height)
        pixels_THWC[slot] = np.asarray(
            image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        )


def _patch(sprite: Sprite, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A sprite's colours (uint16 [h, w, C]) and coverage (uint16 [h, w], 0 to 256)."""
    radius = sprite.radius * side
    rgb = np.array(sprite.rgb, dtype=np.uint16)
    if sprite.kind == "sign":
        return _plate(sprite.text, max(7, round(2 * radius)), rgb)
    extent = max(3, round(2 * radius))
    shape = "circle" if sprite.kind == "speck" else sprite.shape
    alpha = _coverage(shape, extent)
    shade = texture_shade(sprite.texture, extent)
    return rgb * shade[..., None] >> 8, alpha


@lru_cache(maxsize=1024)
def _coverage(shape: str, extent: int) -> np.ndarray:
    alpha = shape_alpha(shape, extent).astype(np.uint16)
    return alpha + (alpha >> 7)


def _plate(text: str, height: int, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Light text on a dark plate with a margin."""
    margin = max(1, round(height / 9))
    alpha = text_alpha(text, max(GLYPH_HEIGHT - 2, height - 2 * margin)).astype(np.uint16)
    ink = np.pad(alpha, margin)[..., None]
    colors = (rgb * (255 - ink) + _INK * ink) // 255
    return colors.astype(np.uint16), np.full(ink.shape[:2], 256, dtype=np.uint16)


def _draw_sprite(
    sprite: Sprite,
    frames: int,
    pixels_THWC: np.ndarray,
    masks_THW: np.ndarray,
    wanted: list[int],
) -> None:
    """Blend one sprite into every frame it is in; runs of frames at one place are drawn at once."""
    height, width = pixels_THWC.shape[1:3]
    slots = [slot for slot, frame in enumerate(wanted) if sprite.present(frame)]
    if not slots:
        return
    colors, alpha = _patch(sprite, min(height, width))
    patch_height, patch_width = alpha.shape
    groups: dict[tuple[int, int], list[int]] = {}
    for slot in slots:
        x, y = sprite.center(wanted[slot], frames)
        corner = (round(y * height - patch_height / 2), round(x * width - patch_width / 2))
        groups.setdefault(corner, []).append(slot)
    for (top, left), members in groups.items():
        rows = slice(max(top, 0), min(top + patch_height, height))
        columns = slice(max(left, 0), min(left + patch_width, width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        inner = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        cover = alpha[inner]
        # A run of neighbouring frames is a view: no copy of the frames is made.
        run = slice(members[0], members[-1] + 1)
        where = run if members[-1] - members[0] + 1 == len(members) else members
        under = pixels_THWC[where, rows, columns]
        weight = cover[..., None]
        mixed = (under * (256 - weight) + colors[inner] * weight) >> 8
        pixels_THWC[where, rows, columns] = mixed
        ids = masks_THW[where, rows, columns]
        masks_THW[where, rows, columns] = np.where(cover >= 128, np.uint8(sprite.id), ids)


@lru_cache(maxsize=4)
def _noise_tile(levels: int) -> np.ndarray:
    """A large tile of noise in 0..levels: uint8 [1 << 18]; drawn once."""
    noise = Draw("sensor noise").noise(1 << 18).astype(np.uint16)
    return (noise * (levels + 1) >> 8).astype(np.uint8)


def _add_noise(scene: Scene, pixels_THWC: np.ndarray, wanted: list[int]) -> None:
    """Noise that differs from frame to frame; nothing overflows, since `BRIGHTEST` leaves room."""
    assert scene.noise <= 255 - BRIGHTEST
    tile = _noise_tile(scene.noise)
    draw = Draw(scene.name, "noise")
    offsets = [draw.integer(0, 1 << 16) for _ in range(scene.frames)]
    size = pixels_THWC[0].size
    if size > tile.size - (1 << 16):
        tile = np.tile(tile, -(-(size + (1 << 16)) // tile.size))
    for slot, frame in enumerate(wanted):
        flat = pixels_THWC[slot].reshape(-1)
        flat += tile[offsets[frame] :][:size]
