"""Pictures of what was kept, with numpy and Pillow alone.

Legend: H, W rows and columns of a plane; h, w pixels; c channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.core.grid import Plane
from foveate.core.report import ItemReport
from foveate.view.layout import DROPPED, ItemView, PlaneView, frame_of_plane, view_item
from foveate.view.palette import group_colours

_INK = (13, 15, 20)
_DIM_ALPHA = 176
_TINT_ALPHA = 84
# Below this many pixels a cell is all outline and nothing of the picture is left.
_MIN_OUTLINED_CELL = 5


def cell_size(plane: tuple[int, int], picture: tuple[int, int], longest: int) -> tuple[int, int]:
    """(height, width) in whole pixels of a cell, so that the picture is about `longest` long.

    Args:
        plane: (rows, columns).
        picture: (height, width) whose proportions are kept as well as whole cells allow.
        longest: pixels.
    """
    scale = longest / max(picture)
    return tuple(  # type: ignore[return-value]
        max(1, round(size * scale / cells)) for size, cells in zip(picture, plane, strict=True)
    )


def overlay(plane: PlaneView, colour_M: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """A transparent picture to lay over a frame, uint8 [H * cell, W * cell, 4], O(pixels).

    Dropped patches are dark, patches kept alone clear with a light outline, merged groups tinted
    and outlined in the colour of the token that absorbed them, its own place marked by a dot.

    Args:
        plane: what happened to the patches.
        colour_M: number of the colour of every token, -1 for none.
        cell: (height, width) of a patch in pixels.
    """
    rgba_HW4 = _fill(plane, colour_M)
    line_HW4 = rgba_HW4.copy()
    line_HW4[plane.merged_HW, 3] = 255
    line_HW4[(plane.group_HW != DROPPED) & ~plane.merged_HW] = (255, 255, 255, 150)
    picture = _enlarge(rgba_HW4, cell)
    if min(cell) < _MIN_OUTLINED_CELL:
        return picture
    edge = _edges(plane.group_HW, cell) & _enlarge(plane.group_HW != DROPPED, cell)
    picture[edge] = _enlarge(line_HW4, cell)[edge]
    dots = _dots(plane.anchor_HW & plane.merged_HW, cell)
    picture[dots] = (255, 255, 255, 255)
    return picture


def draw_kept(frame: Any, plane: Plane | tuple[int, int], groups: Any, size: int = 448) -> Any:
    """One frame with its dropped patches dimmed and its merged groups coloured.

    Args:
        frame: uint8 [3, h, w], tensor or array, or None for the bare grid.
        plane: rows and columns of the patches.
        groups: [rows * columns] integers, the token that absorbed each patch, -1 when dropped.
        size: pixels of the longer side.

    Returns:
        A `PIL.Image.Image` in RGB.

    Raises:
        ValueError: the groups do not fill the plane, or the frame is not uint8 [3, h, w].

    Example:
        >>> import torch
        >>> frame = torch.zeros(3, 32, 48, dtype=torch.uint8)
        >>> draw_kept(frame, (2, 3), [0, -1, 1, 1, -1, 2], size=96).size
        (96, 64)
    """
    height, width = (plane.height, plane.width) if isinstance(plane, Plane) else plane
    group_P = np.asarray(_to_numpy(groups), dtype=np.int64).ravel()
    if group_P.size != height * width:
        raise ValueError(
            f"A plane of {height} x {width} patches needs {height * width} groups, got "
            f"{group_P.size}."
        )
    if group_P.min(initial=0) < DROPPED:
        raise ValueError(f"Groups are token numbers or -1 for dropped, got {group_P.min()}.")
    size_M = np.bincount(group_P[group_P >= 0])
    merged_P = (group_P >= 0) & (np.append(size_M, 0)[group_P] > 1)
    _, first = np.unique(group_P, return_index=True)
    anchor_P = np.zeros(group_P.size, dtype=bool)
    anchor_P[first] = group_P[first] >= 0
    colour_M = np.where(size_M > 1, np.arange(len(size_M)), -1)
    view = PlaneView(
        group_P.reshape(height, width),
        anchor_P.reshape(height, width),
        merged_P.reshape(height, width),
    )
    return _composite(to_picture(frame), view, colour_M, size)


def draw_item(item: ItemReport, frames: Any = None, columns: int = 0, size: int = 224) -> Any:
    """A contact sheet of an item: every plane drawn by `draw_kept`, with its time and tokens.

    Args:
        item: an entry of `Report.items`.
        frames: uint8 [T, 3, h, w] to draw on; default `item.pixels()`; without either, bare grids.
        columns: pictures in a row; 0 chooses about a square sheet, at most 8.
        size: pixels of a picture's longer side.

    Returns:
        A `PIL.Image.Image` in RGB.
    """
    view = view_item(item)
    pictures = item_pictures(item, len(view.planes), frames)
    tiles = [
        _composite(picture, plane, view.colour_M, size)
        for picture, plane in zip(pictures, view.planes, strict=True)
    ]
    labels = [
        f"{plane_label(view, number)}  {plane.num_tokens} of {plane.num_patches}"
        for number, plane in enumerate(view.planes)
    ]
    return contact_sheet(tiles, labels, columns)


def contact_sheet(tiles: list[Any], labels: list[str], columns: int = 0) -> Any:
    """Pictures in rows, each with a line of text below; a `PIL.Image.Image` in RGB."""
    columns = columns or min(8, max(1, round(np.sqrt(len(tiles)))))
    tile_w, tile_h = max(t.width for t in tiles), max(t.height for t in tiles) + 20
    rows = -(-len(tiles) // columns)
    gap = 8
    sheet = Image.new(
        "RGB", (columns * (tile_w + gap) + gap, rows * (tile_h + gap) + gap), (24, 27, 31)
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (tile, text) in enumerate(zip(tiles, labels, strict=True)):
        x = gap + number % columns * (tile_w + gap)
        y = gap + number // columns * (tile_h + gap)
        sheet.paste(tile, (x, y))
        pen.text((x + 2, y + tile.height + 3), text, fill=(225, 228, 232), font=font)
    return sheet


def plane_label(view: ItemView, plane: int) -> str:
    """The time of a plane in seconds, or its number when times are unknown."""
    if view.seconds is not None:
        return f"{view.seconds[plane]:.2f} s"
    return f"frame {plane}" if len(view.planes) > 1 else "image"


def item_pictures(item: ItemReport, num_planes: int, frames: Any = None) -> list[Any]:
    """One uint8 array [h, w, 3] per plane (the first frame it shows), or None without pixels."""
    if frames is None and item.pixels is not None:
        frames = item.pixels()
    frames = getattr(frames, "pixels", frames)  # foveate.video.Frames
    if frames is None or len(frames) == 0:
        return [None] * num_planes
    return [
        to_picture(frames[frame_of_plane(plane, num_planes, len(frames))])
        for plane in range(num_planes)
    ]


def to_picture(frame: Any) -> Any:
    """A frame, uint8 [3, h, w] (tensor or array) or a PIL image, as uint8 [h, w, 3].

    Raises:
        ValueError: it is something else.
    """
    if frame is None:
        return None
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    frame_chw = _to_numpy(frame)
    if frame_chw.ndim != 3 or frame_chw.shape[0] != 3 or frame_chw.dtype != np.uint8:
        raise ValueError(
            f"A frame must be uint8 [3, height, width], got {frame_chw.dtype} {frame_chw.shape}."
        )
    return np.ascontiguousarray(frame_chw.transpose(1, 2, 0))


def _to_numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def _composite(picture: Any, plane: PlaneView, colour_M: np.ndarray, size: int) -> Any:
    shape = plane.group_HW.shape
    cell = cell_size(shape, shape if picture is None else picture.shape[:2], size)
    over = overlay(plane, colour_M, cell)
    if picture is None:
        base = np.full((*over.shape[:2], 3), 168, dtype=np.uint8)
    else:
        resized = Image.fromarray(picture).resize((over.shape[1], over.shape[0]))
        base = np.asarray(resized).copy()
        dropped = _enlarge(plane.group_HW == DROPPED, cell)
        base[dropped] = (base[dropped] @ np.array([0.299, 0.587, 0.114]))[:, None].astype(np.uint8)
    alpha = over[..., 3:].astype(np.float32) / 255
    mixed = base * (1 - alpha) + over[..., :3] * alpha
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _fill(plane: PlaneView, colour_M: np.ndarray) -> np.ndarray:
    rgba_HW4 = np.zeros((*plane.group_HW.shape, 4), dtype=np.uint8)
    rgba_HW4[plane.group_HW == DROPPED] = (*_INK, _DIM_ALPHA)
    number = colour_M[plane.group_HW[plane.merged_HW]]
    colours = group_colours(int(colour_M.max(initial=-1)) + 1)
    rgba_HW4[plane.merged_HW, :3] = colours[number]
    rgba_HW4[plane.merged_HW, 3] = _TINT_ALPHA
    return rgba_HW4


def _enlarge(x_HW: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    return x_HW.repeat(cell[0], axis=0).repeat(cell[1], axis=1)


def _edges(group_HW: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """bool [h, w]: pixels on the rim of a cell whose neighbour there is another token's."""
    padded = np.pad(group_HW, 1, constant_values=np.iinfo(group_HW.dtype).min)
    middle = padded[1:-1, 1:-1]
    up, down = padded[:-2, 1:-1] != middle, padded[2:, 1:-1] != middle
    left, right = padded[1:-1, :-2] != middle, padded[1:-1, 2:] != middle
    row = np.arange(group_HW.shape[0] * cell[0])[:, None] % cell[0]
    column = np.arange(group_HW.shape[1] * cell[1])[None] % cell[1]
    return (
        (_enlarge(up, cell) & (row == 0))
        | (_enlarge(down, cell) & (row == cell[0] - 1))
        | (_enlarge(left, cell) & (column == 0))
        | (_enlarge(right, cell) & (column == cell[1] - 1))
    )


def _dots(marked_HW: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """bool [h, w]: a disc in the middle of every marked cell."""
    y = (np.arange(cell[0]) - (cell[0] - 1) / 2)[:, None]
    x = (np.arange(cell[1]) - (cell[1] - 1) / 2)[None]
    disc = x**2 + y**2 <= (min(max(min(cell) / 7, 1.0), 4.0)) ** 2
    return _enlarge(marked_HW, cell) & np.tile(disc, marked_HW.shape)
