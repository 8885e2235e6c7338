"""Draw the picture of docs/concepts.md: what four methods go by, on four frames of a real clip.

python scripts/draw_evidence_picture.py docs/assets/evidence.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from foveate.video import sample_clip
from foveate.view import draw_evidence, show_video

#: Method, what it notes, and what the caption says.
ROWS = (
    ("fopru", ("significance",), "FoPru: significance in the encoder's attention, dark to bright"),
    ("visionzip", ("contextual groups",), "VisionZip: patches that become one contextual token"),
    (
        "hiprune",
        ("anchors", "buffers", "registers"),
        "HiPrune: anchors yellow, buffers blue, registers red",
    ),
    ("todre", ("order of choice",), "ToDRE: order of choice, first dark; each unlike those before"),
)
PLANES = (1, 3, 4, 6)
_TITLE = 28  # pixels of a row's title
PAPER, INK = (24, 27, 31), (225, 228, 232)


def main(path: Path) -> None:
    """Write the picture."""
    font = ImageFont.load_default(size=15)
    sheets = []
    for method, names, title in ROWS:
        (item,) = show_video(sample_clip("bikes"), method, retain=0.15, frames=8).items
        noted = [entry for entry in item.evidence if entry.name in names]
        sheet = draw_evidence(item, noted, planes=PLANES, columns=len(PLANES), size=250)
        sheets.append((title, sheet))
    width = max(sheet.width for _, sheet in sheets)
    picture = Image.new("RGB", (width, sum(sheet.height + _TITLE for _, sheet in sheets)), PAPER)
    pen, top = ImageDraw.Draw(picture), 0
    for title, sheet in sheets:
        pen.text((8, top + 8), title, fill=INK, font=font)
        picture.paste(sheet, (0, top + _TITLE))
        top += sheet.height + _TITLE
    picture.save(path, quality=72, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
