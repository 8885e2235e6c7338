"""Draw the picture of docs/world.md: clips of the world with captions and questions.

python scripts/draw_world.py docs/assets/world.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from foveate.world import World
from foveate.world.overview import contact_sheet

# One clip of each kind: a herd, a change, two visits, a cut with a needle, movers; and a real
# background for the last.
CLIPS = (0, 1, 2, 4, 10)


def main(path: Path) -> None:
    """Write the picture."""
    samples = [World(size=224).sample(index) for index in CLIPS]
    samples.append(World(size=224, natural=1.0).sample(7))
    contact_sheet(samples, side=84).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
