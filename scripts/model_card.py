"""Render the card of a trained model as a page and a picture of its losses.

python scripts/model_card.py src/foveate/checkpoints/weights/card.json docs

writes docs/embedded-model.md and docs/assets/embedded-loss.svg.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE, PICTURE = "embedded-model.md", "assets/embedded-loss.svg"
_STAGES = {
    "tower": "tower on the labels of patches",
    "answers": "language model on questions, tower frozen",
    "joint": "everything together",
}
_VIEWS = {"clip": "the clip", "one frame": "one frame", "blind": "no picture"}


def main(card: Path, docs: Path) -> None:
    """Write the page and the picture into the folder of documents."""
    known = json.loads(card.read_text(encoding="utf-8"))
    (docs / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    (docs / PICTURE).write_text(picture(known), encoding="utf-8")
    (docs / PAGE).write_text(page(known), encoding="utf-8")


# -- page -----------------------------------------------------------------------------------------


def page(card: dict[str, Any]) -> str:
    """The page as Markdown."""
    overall = {view: rows["overall"] for view, rows in card["test"]["accuracy"].items()}
    seconds = sum(stage["seconds"] for stage in card["stages"].values())
    parts = [
        "# The embedded model",
        "<!-- Written by scripts/model_card.py from the card beside the weights. -->",
        f"The video LLM that `foveate ask` and `foveate bench` take when no model is named: "
        f"{card['parameters'] / 1e6:.1f} million parameters, trained from nothing in "
        f"{_duration(seconds)} on {card['hardware']}. On {card['test']['clips']:,} held-out clips "
        f"it answers {overall['clip']:.1%} of the questions; {overall['one frame']:.1%} when it "
        f"sees one frame, {overall['blind']:.1%} when it sees none. How it was trained and how to "
        "train another: [training](training.md).",
        "## Accuracy",
        *_accuracy(card["test"]),
        "## Training",
        _table(
            ["Stage", "Steps", "Clips", "Time", "Loss at the end", "Right at the end"],
            [_stage_row(name, stage) for name, stage in card["stages"].items()],
        ),
        f"![Loss of each stage over its steps]({PICTURE})",
        "## Settings",
        _table(["Setting", "Value"], _settings(card)),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy(test: dict[str, Any]) -> Iterable[str]:
    views, questions = test["accuracy"], test.get("questions", {})
    counts = {**questions, "overall": sum(questions.values())}
    header = ["Task", *(["Questions"] if questions else []), *(_VIEWS[view] for view in views)]
    rows = []
    for task in next(iter(views.values())):
        asked = counts.get(task, 0)
        shown = [_share(rows_of[task], asked) for rows_of in views.values()]
        rows.append([task, *([f"{asked:,}"] if questions else []), *shown])
    yield _table(header, rows)
    yield (
        f"Clips of the split `{test['split']}`, which training never sees. *One frame* shows the "
        "same random frame of the clip all the time, *no picture* grey frames: what the wording "
        "alone gives away. *Where*, *count*, *reading* and most of *what* are about things that "
        "one frame shows; the other tasks need the clip."
        + (
            " Plus or minus: 95 % of the binomial distribution, which takes questions about one "
            "clip for independent ones and so is a little narrow."
            if questions
            else ""
        )
    )


def _share(value: float, asked: int) -> str:
    if not asked:
        return f"{value:.1%}"
    return f"{value:.1%} ± {1.96 * math.sqrt(value * (1 - value) / asked):.1%}"


def _stage_row(name: str, stage: dict[str, Any]) -> list[str]:
    last = stage["curve"][-1]
    right = last.get("right", last.get("kind"))
    unit = "answers" if "right" in last else "visual tokens"
    return [
        _STAGES[name],
        f"{stage['steps']:,}",
        f"{stage['clips']:,}",
        _duration(stage["seconds"]),
        f"{last['loss']:.3f}",
        "" if right is None else f"{right:.1%} of {unit}",
    ]


def _settings(card: dict[str, Any]) -> Iterable[list[str]]:
    size = card["size"]
    vision = "width {}, {} layers, {} heads, MLP {}".format(*size["vision"])
    text = "width {}, {} layers, {} heads ({} for keys and values), MLP {}".format(*size["text"])
    yield ["size", f"`{size['name']}`"]
    yield ["frames", f"{size['frames']} of {size['image']} x {size['image']} pixels"]
    yield ["patches", f"{size['patch']} x {size['patch']} pixels"]
    yield ["visual tokens of a clip", f"{card['visual_tokens']:,}"]
    yield ["vision tower (SigLIP)", vision]
    yield ["language model (Qwen2)", text]
    yield ["parameters", f"{card['parameters']:,}"]
    yield ["stored as", size["dtype"]]
    for name in _STAGES:
        stage = size[name]
        told = f"{stage['clips']} clips a step, peak rate {stage['rate']:g}, "
        yield [f"stage `{name}`", f"{told}warm-up of {stage['warmup']} steps"]
    yield ["natural backgrounds", f"{size['natural']:.0%} of shots"]
    yield ["seed", str(card["seed"])]
    yield ["hardware", card["hardware"]]
    yield ["torch", card["torch"]]
    if "foveate" in card:
        yield ["foveate", card["foveate"]]
    yield ["date", card["date"]]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# -- picture --------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 760, 230, 44, 34, 50
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#555}.line{fill:none;stroke:#00796b;stroke-width:2}"
    ".rule{stroke:#8884;stroke-width:1}@media(prefers-color-scheme:dark){text{fill:#bbb}"
    ".line{stroke:#4db6ac}}"
)


def picture(card: dict[str, Any]) -> str:
    """The loss of each stage over its steps, side by side: SVG."""
    stages = card["stages"]
    span = (_WIDTH - _LEFT - 10 - _GAP * (len(stages) - 1)) / len(stages)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>Loss of each stage over its steps</title><style>{_STYLE}</style>",
    ]
    for number, (name, stage) in enumerate(stages.items()):
        parts += _panel(name, stage, _LEFT + number * (span + _GAP), span)
    return "\n".join([*parts, "</svg>", ""])


def _panel(name: str, stage: dict[str, Any], left: float, span: float) -> Iterable[str]:
    floor = _HEIGHT - 34
    points = [(point["step"], point["loss"]) for point in stage["curve"]]
    top = _ceiling(max(loss for _, loss in points))
    yield f'<text x="{left}" y="18" font-weight="600">{name}</text>'
    for share in (0, 0.5, 1):
        y = floor - (floor - _TOP) * share
        yield f'<line class="rule" x1="{left}" x2="{left + span:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        label = f"{top * share:g}"
        yield f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    line = " ".join(
        f"{left + span * step / stage['steps']:.1f},{floor - (floor - _TOP) * loss / top:.1f}"
        for step, loss in points
    )
    yield f'<polyline class="line" points="{line}"/>'
    yield f'<text x="{left}" y="{floor + 18}">0</text>'
    end = f"{stage['steps']:,.0f} steps"
    yield f'<text x="{left + span:.1f}" y="{floor + 18}" text-anchor="end">{end}</text>'


def _ceiling(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... (and their fractions) above a value."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
