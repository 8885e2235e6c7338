"""What encoder methods do to the features of a real encoder on real pictures, without labels.

    python scripts/encoder_quality.py                           # measure what is not yet stored
    python scripts/encoder_quality.py --methods tome --again    # measure one method anew
    python scripts/encoder_quality.py --only-page               # write page and charts alone

DINOv2-small with its real weights looks at frames of the three sample clips and at photographs,
untouched and under every method at every budget. Measured: cosine of the final [CLS] with the
untouched one; cosine of dense features, brought back to every patch, with the untouched ones (mean
over patches); and how many of a picture's nearest pictures (by [CLS]) are the same. Every row is
stored as it is found, so that methods can be added one by one. What it costs in seconds is measured
by `foveate bench`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

import foveate
from encoder_charts import chart
from foveate.models.default_encoder import default_encoder
from foveate.video import Clip, FrameTransform, sample_clip

#: Name on the page -> recipe.
METHODS = {
    "tome": "tome",
    "token_transforming": "token_transforming",
    "gtp_vit": "gtp_vit",
    "zero_tprune": "zero_tprune",
    "stvit": "stvit",
    "flowcut": "flowcut@encoder",
    "centerclip": "centerclip",
    "tempme": "tempme",
    # As many leave every block as with GTP-ViT, drawn at random, and hand nothing on.
    "random": 'gtp_vit(score="random", alpha=0, token_scale=False)',
}
#: They make one row of a clip's frames, which photographs are not.
JOINING = {"centerclip", "tempme"}
BUDGETS = (0.9, 0.7, 0.5, 0.3)
CLIPS = ("bikes", "bigbuckbunny", "carphone")
#: Of the photographs that scikit-image brings along.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
#: Squares cut from a photograph: side as a share of the shorter one, place from 0 to 1.
CROPS = ((1.0, 0.5), (0.6, 0.0), (0.6, 1.0))
SOURCES = ("clips", "photographs")
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
#: ImageNet's, which DINOv2 was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHARTS = {
    "cls": ("encoder-cls.svg", "Cosine of the final [CLS] with that of the untouched encoder"),
    "dense": ("encoder-dense.svg", "Cosine of dense features with those of the untouched encoder"),
    "same": ("encoder-nearest.svg", "Nearest pictures that are the same, by the final [CLS]"),
}


def pictures_of(source: str, options: argparse.Namespace) -> Tensor:
    """The pictures of a source as the encoder takes them, [T, 3, size, size]."""
    size = options.size
    transform = FrameTransform(
        size={"shortest_edge": size}, crop_size=(size, size), mean=MEAN, std=STD
    )
    if source == "clips":
        taken = [Clip(sample_clip(name)).sample(options.frames).pixels for name in CLIPS]
    else:
        taken = [crop[None] for name in PHOTOGRAPHS for crop in crops(photograph(name))]
    return torch.cat([transform(pixels) for pixels in taken])


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image, found without importing it."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise SystemExit("the photographs come with scikit-image: pip install scikit-image")
    return Image.open(Path(found.origin).parent / "data" / name).convert("RGB")


def crops(image: Image.Image) -> list[Tensor]:
    """Squares of a picture, uint8 [3, h, w] each."""
    width, height = image.size
    found = []
    for share, place in CROPS:
        side = round(share * min(width, height))
        left, top = round(place * (width - side)), round(place * (height - side))
        cut = np.asarray(image.crop((left, top, left + side, top + side)))
        found.append(torch.from_numpy(cut.copy()).permute(2, 0, 1))
    return found


@torch.no_grad()
def encode(model: nn.Module, pixels: Tensor, batch: int, recipe: str, retain: float) -> dict:
    """[CLS], dense features and share of FLOPs under a recipe; a clip is a batch."""
    states, shares = [], []
    with foveate.reduce(model, recipe, retain=retain, restore=True) as run:
        for part in pixels.split(batch):
            states.append(model(pixel_values=part).last_hidden_state)
            if run.report.flops:
                total = {name: row["total"] for name, row in run.report.flops.items()}
                shares.append(total["reduced"] / total["untouched"])
    x_TND = torch.cat(states)
    flops = statistics.mean(shares) if shares else 1.0
    return {"cls": x_TND[:, 0], "dense": x_TND[:, 1:], "flops": flops}


def neighbours(cls_TD: Tensor, k: int) -> Tensor:
    """The k nearest other pictures of every picture, [T, k]."""
    alike_TT = normalize(cls_TD, dim=-1) @ normalize(cls_TD, dim=-1).T
    return alike_TT.fill_diagonal_(-1).topk(k, dim=1).indices


def compare(found: dict, untouched: dict, k: int) -> dict[str, float]:
    """The figures of one row."""
    mine, theirs = neighbours(found["cls"], k), neighbours(untouched["cls"], k)
    same = (mine[:, :, None] == theirs[:, None]).any(1).float().mean()
    return {
        "flops": found["flops"],
        "cls": float(cosine_similarity(found["cls"], untouched["cls"], dim=-1).mean()),
        "dense": float(cosine_similarity(found["dense"], untouched["dense"], dim=-1).mean()),
        "same": float(same),
    }


def measure(stored: dict[str, Any], options: argparse.Namespace) -> None:
    """Fill in what is missing, writing the file after every row."""
    model = default_encoder(device=options.device)
    for source in options.sources:
        names = [n for n in options.methods if source == "clips" or n not in JOINING]
        wanted = [(name, retain) for name in names for retain in BUDGETS]
        rows = stored["rows"]
        known = {(r["method"], r["retain"]) for r in rows if r["source"] == source}
        missing = [key for key in wanted if options.again or key not in known]
        if not missing:
            continue
        pixels = pictures_of(source, options).to(options.device)
        batch = options.frames
        untouched = encode(model, pixels, batch, "tome", 1.0)
        for name, retain in missing:
            begin = time.perf_counter()
            found = encode(model, pixels, batch, METHODS[name], retain)
            row = {"source": source, "method": name, "retain": retain}
            rows[:] = [r for r in rows if any(r[key] != row[key] for key in row)]
            rows.append(row | compare(found, untouched, options.nearest))
            print(rows[-1], f"{time.perf_counter() - begin:.1f} s", flush=True)
            options.results.write_text(dump(stored), encoding="utf-8")


def dump(stored: dict[str, Any]) -> str:
    """The stored rows as JSON, a row on a line, in the order of the page."""
    names = list(METHODS)
    rows = sorted(
        stored["rows"],
        key=lambda r: (SOURCES.index(r["source"]), names.index(r["method"]), -r["retain"]),
    )
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    return (
        f'{{\n  "settings": {json.dumps(stored["settings"])},\n  "rows": [\n    {lines}\n  ]\n}}\n'
    )


def page(stored: dict[str, Any]) -> str:
    """The table and what it was measured on."""
    settings = stored["settings"]
    found = {(r["source"], r["method"], r["retain"]): r for r in stored["rows"]}
    lines = [
        "| Method | retain | FLOPs | clips: [CLS] | dense | same nearest "
        "| photographs: [CLS] | dense | same nearest |",
        "| --- " + "| ---: " * 8 + "|",
    ]
    for name in METHODS:
        for retain in BUDGETS:
            rows = [found.get((source, name, retain)) for source in SOURCES]
            flops = next((row["flops"] for row in rows if row), None)
            if flops is not None:
                cells = " | ".join(figures(row) for row in rows)
                lines.append(f"| `{name}` | {retain:g} | {flops:.1%} | {cells} |")
    cut = f"{len(CROPS)} squares of each of {len(PHOTOGRAPHS)} photographs of scikit-image"
    lines += [
        "",
        f"{settings['frames']} frames of each of {len(CLIPS)} clips and {cut}, "
        f"{settings['size']} x {settings['size']} pixels, {settings['nearest']} nearest, a clip "
        f"at a time; torch {settings['torch']}, {settings['date']}: "
        "`python scripts/encoder_quality.py`.",
    ]
    return "\n".join(lines)


def figures(row: dict[str, Any] | None) -> str:
    """Three cells of the table."""
    if row is None:
        return "- | - | -"
    return f"{row['cls']:.4f} | {row['dense']:.4f} | {row['same']:.1%}"


def write_page(stored: dict[str, Any], path: Path) -> None:
    """Replace the table of the page and its charts."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n{page(stored)}\n{END}{after}"
    path.write_text(text, encoding="utf-8")
    for key, (name, title) in CHARTS.items():
        panels = {
            source: [r for r in stored["rows"] if r["source"] == source] for source in SOURCES
        }
        drawn = chart(panels, key, title, list(METHODS))
        (path.parent / "assets" / name).write_text(drawn, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--frames", type=int, default=12, help="of each clip")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--nearest", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--again", action="store_true", help="also what is stored already")
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=Path("docs/encoder-quality.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/encoders.md"))
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("frames", "size", "nearest")}
    stored: dict[str, Any] = {"settings": settings, "rows": []}
    if options.results.exists():
        stored = json.loads(options.results.read_text(encoding="utf-8"))
        if any(stored["settings"][name] != value for name, value in settings.items()):
            parser.error(
                f"{options.results} was measured with {stored['settings']}: use these, or name "
                "another file with --results."
            )
    if not options.only_page:
        made = {"torch": torch.__version__, "date": date.today().isoformat()}
        stored["settings"] |= made
        measure(stored, options)
    write_page(stored, options.page)


if __name__ == "__main__":
    main()
