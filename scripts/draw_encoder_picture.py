"""Draw the picture of docs/encoders.md: two frames of real clips as encoder methods leave them.

python scripts/draw_encoder_picture.py docs/assets/encoder-merged.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from foveate.video import Clip, sample_clip
from foveate.view import Encoder, draw_kept, load_encoder, show_video
from foveate.view.draw import contact_sheet, to_picture

#: Clip and which of its eight evenly taken frames.
FRAMES = (("bigbuckbunny", 4), ("carphone", 2))
METHODS = ("tome", "gtp_vit", "zero_tprune")
RETAIN = 0.35
SIDE = 330  # pixels of a picture's longer side


def row(name: str, rank: int, encoder: Encoder) -> Image.Image:
    """A frame untouched and under every method, each with its tokens and cost."""
    frame = Clip(sample_clip(name)).sample(8).pixels[rank]
    tiles, labels = [], []
    for method in METHODS:
        report = show_video(Clip(frame[None]), method, retain=RETAIN, encoder=encoder)
        (item,) = report.items
        (plane,) = item.grid.planes
        assert item.reduction is not None
        tiles.append(draw_kept(frame, plane, item.reduction.groups_BN[0, plane.prefix :], SIDE))
        total = {name: part["total"] for name, part in report.flops.items()}
        share = total["reduced"] / total["untouched"]
        labels.append(f"{method}: {item.after - plane.prefix} tokens, {share:.0%} of the FLOPs")
    whole = Image.fromarray(to_picture(frame)).resize(tiles[0].size, Image.Resampling.LANCZOS)
    labels = [f"untouched: {plane.num_patches} patches", *labels]
    return contact_sheet([whole, *tiles], labels, columns=len(tiles) + 1)


def main(path: Path) -> None:
    """Write the picture."""
    encoder = load_encoder()
    rows = [row(name, rank, encoder) for name, rank in FRAMES]
    sheet = Image.new("RGB", (rows[0].width, sum(part.height for part in rows)))
    top = 0
    for part in rows:
        sheet.paste(part, (0, top))
        top += part.height
    sheet.save(path, quality=74, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
