"""Thumbnails and overlays as data URIs, small enough that a report stays one handy file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from foveate.view.draw import cell_size, overlay
from foveate.view.layout import ItemView

#: Longer side in pixels and JPEG quality, best first.
_LEVELS = ((960, 86), (640, 84), (448, 82), (352, 78), (272, 74), (208, 68), (160, 62), (112, 55))


@dataclass(frozen=True)
class Thumbnail:
    """One plane's pictures as data URIs; `photo` is empty when there are no pixels."""

    photo: str
    overlay: str
    width: int
    height: int


def thumbnails(
    view: ItemView, pictures: Sequence[Any], shown: Sequence[int], budget: int
) -> list[Thumbnail]:
    """Encode the planes `shown`, at the best quality that stays within `budget` bytes of text.

    Args:
        view: the item.
        pictures: uint8 [h, w, 3] or None, one per plane.
        shown: planes to encode.
        budget: bytes for all pictures of the item; the smallest level is taken when none fits.
    """
    # Many pictures are looked at side by side, where more pixels would not be seen.
    start = 0 if len(shown) <= 2 else 1 if len(shown) <= 12 else 2
    for longest, quality in _LEVELS[start:]:
        result, spent = [], 0
        for plane in shown:
            result.append(_thumbnail(view, plane, pictures[plane], longest, quality))
            spent += len(result[-1].photo) + len(result[-1].overlay)
            if spent > budget and longest != _LEVELS[-1][0]:
                break
        else:
            return result
    raise AssertionError("the smallest level is always taken")


def _thumbnail(view: ItemView, plane: int, picture: Any, longest: int, quality: int) -> Thumbnail:
    shape = view.planes[plane].group_HW.shape
    # A bare grid needs few pixels: lines and flat colours.
    longest = min(longest, 320) if picture is None else longest
    cell = cell_size(shape, shape if picture is None else picture.shape[:2], longest)
    over = overlay(view.planes[plane], view.colour_M, cell)
    height, width = over.shape[:2]
    photo = ""
    if picture is not None:
        resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
        photo = _data_uri(resized, "JPEG", quality=quality, optimize=True)
    return Thumbnail(photo, _data_uri(Image.fromarray(over), "PNG", optimize=True), width, height)


def _data_uri(image: Image.Image, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{form.lower()};base64,{text}"


def packed_groups(view: ItemView) -> str:
    """The token of every patch as base64 of little-endian uint16 (uint32 when they need it).

    All ones stand for dropped patches.
    """
    kind = np.dtype("<u2") if view.num_groups < 2**16 - 1 else np.dtype("<u4")
    groups = view.groups
    values = np.where(groups < 0, np.iinfo(kind).max, groups).astype(kind)
    return base64.b64encode(values.tobytes()).decode("ascii")


def packed_alive(view: ItemView) -> str:
    """Survivors after each reducing decoder layer as base64 of bits, one padded row per layer."""
    if not view.alive:
        return ""
    rows = np.stack([alive_M for _, alive_M in view.alive])
    return base64.b64encode(np.packbits(rows, axis=1, bitorder="little").tobytes()).decode("ascii")
