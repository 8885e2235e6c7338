"""A picture of clips: one row of frames each, with what it says and what can be asked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.world.world import Sample

_MARGIN, _GAP, _LINE = 12, 4, 15
_PAPER, _INK, _DIM = (250, 250, 248), (30, 30, 30), (110, 110, 110)


def contact_sheet(
    samples: Iterable[Sample], *, columns: int = 8, side: int = 112, questions: int = 3
) -> Image.Image:
    """Frames of each clip, evenly chosen, over its caption and some questions with answers.

    Args:
        samples: the clips, one row each.
        columns: frames of each clip, at most.
        side: height of a frame in the picture, pixels.
        questions: how many to show of each clip.

    Raises:
        ValueError: no samples.

    Example:
        >>> from foveate.world import World
        >>> contact_sheet([World(size=32).sample(0)], columns=4, side=32).mode
        'RGB'
    """
    rows = [_row(sample, columns, side, questions) for sample in samples]
    if not rows:
        raise ValueError("a contact sheet needs at least one clip.")
    width = max(row.width for row in rows) + 2 * _MARGIN
    height = sum(row.height + _MARGIN for row in rows) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    top = _MARGIN
    for row in rows:
        sheet.paste(row, (_MARGIN, top))
        top += row.height + _MARGIN
    return sheet


def _row(sample: Sample, columns: int, side: int, questions: int) -> Image.Image:
    height, width = sample.size
    wide = max(1, round(width * side / height))
    count = min(columns, sample.scene.frames)
    chosen = np.linspace(0, sample.scene.frames - 1, count).round().astype(int)
    total = count * (wide + _GAP) - _GAP
    lines = textwrap.wrap(sample.caption, max(20, total // 6))
    asked = [f"{one.text} {one.answer}" for one in sample.questions[:questions]]
    told = textwrap.wrap("    ".join(asked), max(20, total // 6))
    row = Image.new("RGB", (total, side + _GAP + _LINE * (len(lines) + len(told))), _PAPER)
    for place, frame in enumerate(chosen):
        picture = Image.fromarray(sample.frames_THWC[frame])
        filter_ = Image.Resampling.NEAREST if height < side else Image.Resampling.BOX
        row.paste(picture.resize((wide, side), filter_), (place * (wide + _GAP), 0))
    pen, font = ImageDraw.Draw(row), ImageFont.load_default(size=12)
    for number, line in enumerate([*lines, *told]):
        color = _INK if number < len(lines) else _DIM
        pen.text((0, side + _GAP + number * _LINE), line, fill=color, font=font)
    return row
