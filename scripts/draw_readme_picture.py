"""Draw the picture of the README: sixteen frames of a real clip as HoliTom leaves them.

python scripts/draw_readme_picture.py docs/assets/kept.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

from foveate.video import sample_clip
from foveate.view import draw_item, show_video


def main(path: Path) -> None:
    """Write the picture and print the figures that its caption quotes."""
    report = show_video(sample_clip("bikes"), "holitom", retain=0.15, frames=16)
    draw_item(report.items[0], columns=4, size=320).save(path, quality=75, optimize=True)
    print(report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
