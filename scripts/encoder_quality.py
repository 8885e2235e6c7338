"""What encoder methods do to the features of a real encoder on real frames, without labels.

    python scripts/encoder_quality.py --write docs/encoders.md

DINOv2-small with its real weights looks at frames of the three sample clips, untouched and under
every method at every budget. Measured: cosine of the final [CLS] with the untouched one; cosine of
dense features, brought back to every patch, with the untouched ones (mean over patches); and how
many of a frame's nearest frames (by [CLS], of all clips) are the same. Seconds are medians of runs
taken in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

import foveate
from foveate.models.default_encoder import default_encoder
from foveate.video import Clip, FrameTransform, sample_clip

METHODS = ("tome", "zero_tprune", "gtp_vit", "token_transforming")
BUDGETS = (0.9, 0.7, 0.5, 0.3)
CLIPS = ("bikes", "bigbuckbunny", "carphone")
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
#: ImageNet's, which DINOv2 was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def frames(per_clip: int, size: int) -> Tensor:
    """Frames of the sample clips as the encoder takes them, [T, 3, size, size]."""
    transform = FrameTransform(
        size={"shortest_edge": size}, crop_size=(size, size), mean=MEAN, std=STD
    )
    return torch.cat([transform(Clip(sample_clip(name)).sample(per_clip).pixels) for name in CLIPS])


@torch.no_grad()
def encode(model: nn.Module, pixels: Tensor, batch: int, recipe: str, retain: float) -> dict:
    """[CLS], dense features, seconds and share of FLOPs under a recipe."""
    begin, states, shares = time.perf_counter(), [], []
    with foveate.reduce(model, recipe, retain=retain, restore=True) as run:
        for part in pixels.split(batch):
            states.append(model(pixel_values=part).last_hidden_state)
            if run.report.flops:
                total = {name: row["total"] for name, row in run.report.flops.items()}
                shares.append(total["reduced"] / total["untouched"])
    x_TND = torch.cat(states)
    return {
        "cls": x_TND[:, 0],
        "dense": x_TND[:, 1:],
        "seconds": time.perf_counter() - begin,
        "flops": statistics.mean(shares) if shares else 1.0,
    }


def neighbours(cls_TD: Tensor, k: int) -> Tensor:
    """The k nearest other frames of every frame, [T, k]."""
    alike_TT = normalize(cls_TD, dim=-1) @ normalize(cls_TD, dim=-1).T
    return alike_TT.fill_diagonal_(-1).topk(k, dim=1).indices


def compare(found: dict, untouched: dict, k: int) -> dict[str, float]:
    """The figures of one row."""
    mine, theirs = neighbours(found["cls"], k), neighbours(untouched["cls"], k)
    same = (mine[:, :, None] == theirs[:, None]).any(1).float().mean()
    return {
        "cls": float(cosine_similarity(found["cls"], untouched["cls"], dim=-1).mean()),
        "dense": float(cosine_similarity(found["dense"], untouched["dense"], dim=-1).mean()),
        "same": float(same),
        "flops": found["flops"],
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = default_encoder(device=options.device)
    pixels = frames(options.frames, options.size).to(options.device)
    untouched = encode(model, pixels, options.batch, "tome", 1.0)
    rows = []
    for name in options.methods:
        for retain in BUDGETS:
            found = encode(model, pixels, options.batch, name, retain)
            row = {"method": name, "retain": retain, **compare(found, untouched, options.nearest)}
            row["time"] = times(model, pixels[: options.batch], name, retain, options.rounds)
            rows.append(row)
            print(describe(row), flush=True)
    return rows


def times(model: nn.Module, pixels: Tensor, recipe: str, retain: float, rounds: int) -> float:
    """Seconds as a share of the untouched encoder's: median of ratios, taken in turn."""
    ratios = []
    for turn in range(rounds + 1):
        own, full = (
            encode(model, pixels, len(pixels), recipe, share)["seconds"] for share in (retain, 1.0)
        )
        if turn:
            ratios.append(own / full)
    return statistics.median(ratios)


def describe(row: dict[str, Any]) -> str:
    return (
        f"| `{row['method']}` | {row['retain']:g} | {row['flops']:.1%} | {row['time']:.1%} | "
        f"{row['cls']:.4f} | {row['dense']:.4f} | {row['same']:.1%} |"
    )


def chart(rows: list[dict[str, Any]], key: str, title: str) -> str:
    """A line per method: the figure over the share of FLOPs, as SVG."""
    width, height, left, top, right, bottom = 640, 320, 60, 30, 170, 46
    low_y = min(row[key] for row in rows)
    low_y -= 0.06 * (1 - low_y)
    low_x = min(row["flops"] for row in rows) - 0.02

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - low_x) / (1 - low_x) * (width - left - right)
        return across, top + (1 - y) / (1 - low_y) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{title}</title>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        f'<text x="{left}" y="18" font-size="13" fill="#222">{title}</text>'
    ]
    for step in range(5):
        value = low_y + (1 - low_y) * step / 4
        y = at(1, value)[1]
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{value:.3f}</text>'
        )
        share = low_x + (1 - low_x) * step / 4
        x = at(share, 1)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle" fill="#444">'
            f"{share:.0%}</text>"
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle" '
        'fill="#444">FLOPs of the encoder, of the untouched one</text>'
    )
    ends: list[float] = []
    for colour, name in zip(COLOURS, dict.fromkeys(row["method"] for row in rows), strict=False):
        points = [(1.0, 1.0)] + [(r["flops"], r[key]) for r in rows if r["method"] == name]
        places = [at(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        label = top + 14 + 20 * len(ends)
        ends.append(label)
        parts.append(
            f'<rect x="{width - right + 16}" y="{label - 9}" width="10" height="10" '
            f'fill="{colour}"/><text x="{width - right + 32}" y="{label}" fill="#222">{name}</text>'
        )
    return "".join([*parts, "</svg>\n"])


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    head = ["Method", "retain", "FLOPs", "time", "[CLS]", "dense", "same nearest frames"]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    lines += [describe(row) for row in rows]
    number = options.frames * len(CLIPS)
    lines += [
        "",
        f"{number} frames ({options.frames} of each clip) of {options.size} x {options.size} "
        f"pixels, batches of {options.batch}, {options.nearest} nearest frames, "
        f"{hardware(options.device)}, torch {torch.__version__}, {date.today().isoformat()}: "
        f"`python scripts/encoder_quality.py --frames {options.frames} --batch {options.batch} "
        f"--rounds {options.rounds}`.",
    ]
    return "\n".join(lines)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    name = platform.machine()
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = named[0].split(":")[1].strip() if named else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--frames", type=int, default=16, help="of each clip")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--nearest", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    rows = measure(options)
    text = page(rows, options)
    if options.write is None:
        print(text)
        return
    before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    assets = options.write.parent / "assets"
    charts = {"cls": "Cosine of the final [CLS]", "dense": "Cosine of dense features"}
    for key, title in charts.items():
        file = assets / f"encoder-{key}.svg"
        file.write_text(chart(rows, key, title), encoding="utf-8")


if __name__ == "__main__":
    main()
