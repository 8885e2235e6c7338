"""Pictures of what methods noted, with numpy and Pillow alone, in the colours of the report.

Legend: H, W rows and columns of a plane; h, w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from foveate.core.evidence import Evidence
from foveate.core.report import ItemReport
from foveate.view.draw import cell_size, contact_sheet, item_pictures, plane_label
from foveate.view.evidence import patch_index, shades, value_range
from foveate.view.layout import view_item
from foveate.view.palette import MARK_COLOURS, NUM_LABEL_COLOURS, group_colours, heat_colours

# Rings and lines are drawn this much larger and scaled down, which makes them smooth.
_FINE = 3
_GREY = np.array([0.299, 0.587, 0.114])


def draw_evidence(
    item: ItemReport,
    noted: Evidence | Sequence[Evidence],
    frames: Any = None,
    *,
    planes: Sequence[int] | None = None,
    columns: int = 0,
    size: int = 224,
) -> Any:
    """A contact sheet of what a method noted, drawn over the planes of an item.

    Args:
        item: an entry of `Report.items`.
        noted: an entry of `item.evidence`, or several marks, which are drawn together.
        frames: uint8 [T, 3, h, w] to draw on; default `item.pixels()`; without either, bare grids.
        planes: which planes; default all.
        columns: pictures in a row; 0 chooses about a square sheet, at most 8.
        size: pixels of a picture's longer side.

    Returns:
        A `PIL.Image.Image` in RGB.

    Raises:
        ValueError: runs of frames, which belong to the time line, or several kinds at once.

    Example:
        >>> import torch
        >>> from foveate.core import Grid
        >>> item = ItemReport(0, "video", Grid.video(2, 2, 3))
        >>> draw_evidence(item, Evidence("attention", "heat", torch.arange(12.0))).mode
        'RGB'
    """
    entries = [noted] if isinstance(noted, Evidence) else list(noted)
    kinds = {entry.kind for entry in entries}
    if len(kinds) != 1 or kinds == {"frames"} or (len(entries) > 1 and kinds != {"mark"}):
        raise ValueError(
            "draw_evidence takes one piece of evidence with a place in the frames, or several "
            f"marks; got {', '.join(f'{e.name} ({e.kind})' for e in entries) or 'nothing'}."
        )
    view = view_item(item)
    pictures = item_pictures(item, len(view.planes), frames)
    shown = list(range(len(view.planes)) if planes is None else planes)
    values = [_values(item, entry) for entry in entries]
    tiles = []
    for plane in shown:
        picture, shape = pictures[plane], view.planes[plane].group_HW.shape
        cell = cell_size(shape, shape if picture is None else picture.shape[:2], size)
        base = _base(picture, (shape[0] * cell[0], shape[1] * cell[1]), entries[0].kind)
        place = slice(view.planes[plane].first, view.planes[plane].first + shape[0] * shape[1])
        tiles.append(_draw(base, entries, [v[place] for v in values], plane, shape, cell))
    return contact_sheet(tiles, [plane_label(view, plane) for plane in shown], columns)


def _values(item: ItemReport, entry: Evidence) -> np.ndarray:
    """What is drawn of every patch of the item, in the colours' numbers."""
    if not entry.is_per_token:
        return np.empty(0)
    value = entry.value.numpy()[patch_index(item.grid, range(len(item.grid.planes)))]
    return shades(value, *value_range(value)) if entry.kind == "heat" else value


def _base(picture: Any, shape: tuple[int, int], kind: str) -> np.ndarray:
    if picture is None:
        return np.full((*shape, 3), 168.0)
    base = np.asarray(Image.fromarray(picture).resize((shape[1], shape[0]))).astype(np.float32)
    return np.repeat((base @ _GREY)[..., None], 3, axis=-1) if kind in ("heat", "label") else base


def _draw(
    base: np.ndarray,
    entries: Sequence[Evidence],
    values: Sequence[np.ndarray],
    plane: int,
    shape: tuple[int, int],
    cell: tuple[int, int],
) -> Any:
    kind = entries[0].kind
    if kind == "boxes":
        return _boxes(base, entries[0], plane, cell)
    if kind == "mark":
        return _rings(base, [value.reshape(shape) for value in values], cell)
    value_HW = values[0].reshape(shape)
    is_heat = kind == "heat"
    seen_HW = value_HW != 255 if is_heat else value_HW >= 0
    table = heat_colours(255) if is_heat else group_colours(NUM_LABEL_COLOURS)
    colour_HW3 = table[np.where(seen_HW, value_HW, 0) % len(table)]
    alpha_HW = np.where(seen_HW, 0.72 if is_heat else 0.5, 0.0)
    fill, alpha = (
        x.repeat(cell[0], axis=0).repeat(cell[1], axis=1) for x in (colour_HW3, alpha_HW)
    )
    return _image(base * (1 - alpha[..., None]) + fill * alpha[..., None])


def _rings(base: np.ndarray, marks: Sequence[np.ndarray], cell: tuple[int, int]) -> Any:
    any_HW = np.any(marks, axis=0)
    dim = np.where(any_HW, 1.0, 0.5).repeat(cell[0], axis=0).repeat(cell[1], axis=1)
    image = _image(base * dim[..., None])
    image = image.resize((image.width * _FINE, image.height * _FINE))
    pen, most = ImageDraw.Draw(image), min(cell) * _FINE / 2
    wide = max(1, round(most * 0.26))
    for row, column in np.argwhere(any_HW):
        x, y = (column + 0.5) * cell[1] * _FINE, (row + 0.5) * cell[0] * _FINE
        inside = [k for k, mark_HW in enumerate(marks) if mark_HW[row, column]]
        for ring, k in enumerate(inside):
            radius = max(2.0, most - wide * (0.6 + 1.4 * ring))
            box = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(box, outline=MARK_COLOURS[k % len(MARK_COLOURS)], width=wide)
    return image.resize((image.width // _FINE, image.height // _FINE), Image.Resampling.LANCZOS)


def _boxes(base: np.ndarray, entry: Evidence, plane: int, cell: tuple[int, int]) -> Any:
    image = _image(base)
    pen, colours = ImageDraw.Draw(image), group_colours(NUM_LABEL_COLOURS)
    for number, (where, top, left, bottom, right) in enumerate(entry.value):
        if where == plane:
            box = (left * cell[1], top * cell[0], right * cell[1] - 1, bottom * cell[0] - 1)
            colour = tuple(colours[number % len(colours)].tolist())
            pen.rectangle(box, outline=colour, width=3)
    return image


def _image(rgb: np.ndarray) -> Any:
    return Image.fromarray(np.rint(rgb).clip(0, 255).astype(np.uint8))
