"""What every method costs itself, against the work of the untouched model that it saves.

    python benchmarks/own_cost.py [METHOD ...] [--shapes video image] [--write docs/speed.md]

Every registered method is attached to two models of full depth and width (`hollow.py`): a
LLaVA-OneVision-7B with a video of 32 x 196 tokens of 3584 channels, and a LLaVA-NeXT-7B with an
image of 2880 tokens of 4096 channels. Counted is all time in the hooks of the attachment: encoder
signals and stage, the projector stage with the shorter prompt, and what happens before, in and
behind every decoder layer. The saving comes from real layers, timed alone at several lengths, and
the lengths that the call really had. Figures are kept in `--data`, where a run of some methods
replaces theirs; `--write` prints the page from them, with the explanations of `--notes`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Threads that wait for others must not count as work; torch reads it once.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import foveate
from foveate.attach.attachment import Attachment
from foveate.core import Method, get_method, list_methods
from foveate.core.hardware import hardware
from foveate.methods.dtop import MaskHead
from foveate.models.registry import adapter_for

sys.path.insert(0, str(Path(__file__).parent))
from hollow import (
    DECODER,
    ENCODER,
    LLAMA_7B,
    PARTS,
    PROJECTOR,
    QWEN2_7B,
    Clock,
    Hollow,
    hollow_image,
    hollow_rules,
    hollow_video,
    rule_seconds,
    timed_hooks,
    working_memory,
)

ROOT = Path(__file__).parents[1]
#: A method whose own time is more than this share of what it saves is explained.
LIMIT = 0.05
#: Text behind the visual tokens for methods that need to be told: two policies and a query.
ARGUMENTS: dict[str, dict[str, Any]] = {"safewatch": {"policies": ((-36, -20), (-20, -4))}}
BUDGETS: dict[str, float | None] = {"10 %": 0.1, "default": None}
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One of the two inputs.

    Attributes:
        title: for people.
        build: makes the hollow model.
        text: dimensions of its language model.
        tower: (images, tokens per image, blocks) of its encoder.
    """

    title: str
    build: Callable[[Clock], Hollow]
    text: dict[str, int]
    tower: tuple[int, int, int]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.text["num_hidden_layers"]


SHAPES = {
    "video": Shape("32 x 196 x 3584 (LLaVA-OneVision-7B)", hollow_video, QWEN2_7B, (32, 729, 26)),
    "image": Shape("1 x 2880 x 4096 (LLaVA-NeXT-7B)", hollow_image, LLAMA_7B, (5, 577, 23)),
}


# -- what is saved ---------------------------------------------------------------------------------


def fit(seconds: dict[int, float]) -> tuple[float, float]:
    """(per token, per pair of tokens) of a layer, least squares on relative errors.

    Where longer prompts run at a higher rate than the pairs cost, all is put down to tokens.
    """
    length = torch.tensor(list(seconds), dtype=torch.float64)
    time_N = torch.tensor(list(seconds.values()), dtype=torch.float64)
    terms_N2 = torch.stack([length, length.square()], dim=1) / time_N[:, None]
    ones_N1 = torch.ones(len(length), 1, dtype=torch.float64)
    token, pair = torch.linalg.lstsq(terms_N2, ones_N1).solution[:, 0].tolist()
    if token > 0 and pair > 0:
        return token, pair
    return float(torch.linalg.lstsq(terms_N2[:, :1], ones_N1).solution), 0.0


@torch.inference_mode()
def decoder_layer(text: dict[str, int], lengths: list[int], repeats: int) -> tuple[float, float]:
    """Seconds of one real layer of a language model, per token and per pair."""
    from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

    shape = {**text, "vocab_size": 8, "num_hidden_layers": 1}
    qwen = text is QWEN2_7B
    model = Qwen2Model(Qwen2Config(**shape)) if qwen else LlamaModel(LlamaConfig(**shape))
    model.eval()

    def call(length: int) -> Callable[[], object]:
        x_1SD = torch.randn(1, length, text["hidden_size"])
        return lambda: model(inputs_embeds=x_1SD, use_cache=True)

    call(lengths[0])()  # warms caches up; a long prompt need not
    return fit({length: median(call(length), repeats) for length in lengths})


@torch.inference_mode()
def encoder_block(hollow: Hollow, shape: Shape, repeats: int) -> tuple[float, float]:
    """Seconds of one real block of the vision encoder for one image, per token and per pair."""
    tower = next(iter(adapter_for(hollow.model).towers(hollow.model).values()))
    config: Any = tower.module.config
    block: Any = type(tower.blocks[0])(config).eval()
    images, full, _ = shape.tower

    def call(length: int) -> Callable[[], object]:
        x_BND = torch.randn(images, length, config.hidden_size)
        return lambda: block(x_BND, attention_mask=None)

    lengths = [full // 8, full // 2, full]
    call(lengths[0])()
    return fit({length: median(call(length), repeats) / images for length in lengths})


def median(run: Callable[[], object], repeats: int) -> float:
    """Median CPU time."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def prefill_seconds(curve: tuple[float, float], lengths: list[int], pairs: list[int]) -> float:
    """Seconds of a prefill whose layers have these lengths and products of query and key."""
    return curve[0] * sum(lengths) + curve[1] * sum(pairs)


def savings(run: Attachment, hollow: Hollow, shape: Shape, curves: dict[str, Any]) -> Row:
    """Seconds that the call saved in the language model and in the encoder."""
    report = run.report
    length = hollow.inputs["input_ids"].shape[1]
    full = prefill_seconds(curves["layer"], [length] * shape.layers, [length**2] * shape.layers)
    lengths = report.layer_lengths[0]
    pairs = report.attention_pairs[0] if report.attention_pairs else [n * n for n in lengths]
    saved = {"prefill": full - prefill_seconds(curves["layer"], lengths, pairs), "encoder": 0.0}
    for stage in report.stages:
        if stage.stage == "encoder":
            saved["encoder"] = run_encoder_saving(run, shape, curves["block"])
    text = length - report.visual_before
    visual = [max(n - text, 0) for n in lengths]
    return {
        "untouched_s": full,
        "saved_s": saved,
        "kept": sum(visual) / (len(visual) * report.visual_before),
        "cache": sum(report.cache_lengths[0]) / (length * shape.layers)
        if report.cache_lengths[0]
        else None,
    }


def run_encoder_saving(run: Attachment, shape: Shape, curve: tuple[float, float]) -> float:
    """Seconds that the encoder saves, from its FLOPs: blocks keep the shares of the report."""
    flops = run.report.flops
    images, length, blocks = shape.tower
    full = images * blocks * (curve[0] * length + curve[1] * length**2)
    return full * (1 - flops["reduced"]["encoder"] / flops["untouched"]["encoder"])


# -- what it costs ---------------------------------------------------------------------------------


def measure(
    hollow: Hollow, shape: Shape, name: str, retain: float | None, curves: Row, repeats: int
) -> Row:
    """One method at one budget."""
    method = get_method(name)
    arguments = ARGUMENTS.get(name, {})
    if name == "dtop":  # its heads, of the published size, are its own cost
        width = hollow.model.config.vision_config.hidden_size
        arguments = {"heads": tuple(MaskHead(width, num_classes=150).eval() for _ in range(3))}
    budget = {} if retain is None else {"retain": retain}

    def attach() -> Attachment:
        return foveate.reduce(hollow.model, name, **budget, **arguments)

    cached = "cache" in method.stages() or method.prefill is not Method.prefill
    spent: list[dict[str, float]] = []
    with timed_hooks(hollow, attach) as run, hollow_rules(hollow) as rule:
        working = working_memory(hollow, cached)  # the run that warms up
        for _ in range(repeats):
            hollow.clock.reset()
            hollow.run(cached)
            spent.append(dict(hollow.clock.spent))
        stores = method.cache_storage is not Method.cache_storage
        if not run.report.stages and rule is None and not stores:
            return {"error": "leaves this input alone"}
        row = savings(run, hollow, shape, curves)
        row["working_mb"] = working / 1e6
        extra = 0.0 if rule is None else rule_seconds(hollow, rule, repeats) * shape.layers
    parts = {part: statistics.median(s.get(part, 0.0) for s in spent) for part in PARTS}
    return row | {"own_s": {**parts, "rule": extra}}


def measure_all(
    names: list[str], shapes: list[str], repeats: int, data: Row, save: Callable[[], object]
) -> None:
    """Measure methods on shapes into `data`; what cannot run is an entry with the reason.

    `save` is called after every method.
    """
    for key in shapes:
        shape, clock = SHAPES[key], Clock()
        hollow = shape.build(clock)
        length = hollow.inputs["input_ids"].shape[1]
        rows = data.setdefault("shapes", {}).setdefault(key, {"rows": {}})
        # Shares of one page are of the same layers: a run of some methods does not time them anew.
        curves = rows.get("curves") if set(names) < set(list_methods()) else None
        if curves is None:
            lengths = [length // 4, length // 2, length]
            curves = {
                "layer": decoder_layer(shape.text, lengths, repeats),
                "block": encoder_block(hollow, shape, repeats),
            }
        about = {"title": shape.title, "length": length, "layers": shape.layers, "curves": curves}
        rows.update(about)
        for name in names:
            for label, retain in BUDGETS.items():
                if retain is not None and not get_method(name).reducing_stages():
                    continue
                try:
                    row = measure(hollow, shape, name, retain, curves, repeats)
                except (foveate.FoveateError, ValueError) as error:
                    row = {"error": str(error)}
                rows["rows"].setdefault(name, {})[label] = row
                print(key, name, label, summary(row), flush=True)
            save()


# -- the page --------------------------------------------------------------------------------------


def own(row: Row) -> float:
    """Seconds that the method takes itself."""
    return sum(row["own_s"].values())


def share(row: Row) -> float | None:
    """Own time as a share of the time saved; None where nothing is saved while reading a prompt."""
    saved = sum(row["saved_s"].values())
    # A cut behind the last layer, or none: a quotient of nothing would mean nothing.
    return own(row) / saved if saved > 1e-3 * row["untouched_s"] else None


def needs_note(row: Row) -> bool:
    """More than `LIMIT` of what it saves, or of the whole prefill where it saves nothing there."""
    if "error" in row:
        return False
    part = share(row)
    return (own(row) / row["untouched_s"] if part is None else part) > LIMIT


def unexplained(data: Row, notes: dict[str, str]) -> list[str]:
    """Methods above the limit at some shape and budget without a note."""
    return sorted(
        {
            name
            for shape in data["shapes"].values()
            for name, budgets in shape["rows"].items()
            if name not in notes and any(map(needs_note, budgets.values()))
        }
    )


def missing(data: Row) -> list[str]:
    """Registered methods without figures."""
    return [
        name
        for name in list_methods()
        if any(name not in shape["rows"] for shape in data["shapes"].values())
    ]


def summary(row: Row) -> str:
    """One measurement in a line."""
    if "error" in row:
        return f"-- {row['error']}"
    part = share(row)
    said = "saves no prefill" if part is None else f"{part:.2%} of what it saves"
    spent = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in row["own_s"].items() if s)
    return (
        f"own {1e3 * own(row):.0f} ms ({spent}), saved {sum(row['saved_s'].values()):.1f} s, "
        f"{said}, kept {row['kept']:.1%}, {row['working_mb']:.0f} MB"
    )


def page(data: Row, notes: dict[str, str]) -> str:
    """docs/speed.md from the measurements.

    Raises:
        ValueError: a method is above the limit without an explanation.
    """
    silent = unexplained(data, notes)
    if silent:
        raise ValueError(f"above {LIMIT:.0%} without an explanation: {', '.join(silent)}.")
    parts = ["# Speed", INTRO, "\n".join(f"- {key}: {data[key]}" for key in FACTS)]
    for shape in data["shapes"].values():
        parts += [f"## {shape['title']}", _about(shape), _table(shape)]
        errors = {
            name: {label: row["error"] for label, row in budgets.items() if "error" in row}
            for name, budgets in shape["rows"].items()
        }
        lines = []
        for name, said in sorted(errors.items()):
            if len(set(said.values())) == 1 and len(said) == len(shape["rows"][name]):
                lines.append(f"- `{name}`: {next(iter(said.values()))}")
            else:
                lines += [f"- `{name}`, {label}: {text}" for label, text in said.items()]
        if lines:
            parts += ["Not in the table:", "\n".join(lines)]
    told = sorted(
        name
        for name in notes
        if any(
            needs_note(row)
            for shape in data["shapes"].values()
            for row in shape["rows"].get(name, {}).values()
        )
    )
    absent = missing(data)
    if absent:
        parts.append(f"Not measured yet: {', '.join(absent)}.")
    parts += [f"## Above {LIMIT:.0%}"]
    parts += [f"**`{name}`.** {notes[name]}" for name in told] or ["No method."]
    return "\n\n".join(parts) + "\n"


FACTS = ("hardware", "versions", "date", "command")
INTRO = """What every method costs itself, as a share of the time that it saves. Written by
`benchmarks/own_cost.py`, which is run again for methods that change.

- **Own** is all time in the attachment's hooks during one prefill: reading the encoder (signals,
  attention maps, the encoder stage and its matching), the projector stage with everything that
  makes the prompt shorter, and all that happens before, in and behind the decoder layers
  (attention rows from queries and keys, shorter sequences, masks, positions, caches). Methods
  with a rule for attention pay what attention itself takes longer, measured on one real layer.
- **Saved** is the time of the decoder layers that the shorter sequence does without, plus that of
  the encoder blocks where a method acts there. One real layer is timed at three lengths; its time
  per token and per pair of tokens, the lengths that every layer really had, and the number of
  layers give the figure.
- The model around the hooks is *hollow*: of full depth and width, with real shapes and real hooks,
  but linear layers, attention and MLPs hand out numbers from a buffer (`benchmarks/hollow.py`).
  What a method projects on its own account is computed. Features and projections are random:
  methods that decide by content (thresholds, segments, a layer at which everything may go) would
  save another amount on real pictures, at about the same cost.
- **Memory** is the most that one hook holds beside what was there when it began. Queries, keys or
  values that a method keeps until a later stage come on top.
- Figures are CPU time of all threads, medians, in float32: it varies least on a busy machine, and
  threads that wait are not counted. On a GPU the shares are different: layers are faster by a
  greater factor than sorting and indexing.
- Whole encoders under each method, and backbones that are no part of these models (`hot`, `tovim`,
  `s5`), are timed in [Vision encoders](encoders.md#how-fast)."""


def _about(shape: Row) -> str:
    token, pair = shape["curves"]["layer"]
    length = shape["length"]
    seconds = (token * length + pair * length**2) * shape["layers"]
    return (
        f"{length} tokens with the text, {shape['layers']} layers: the untouched prefill takes "
        f"{seconds:.0f} s."
    )


def _table(shape: Row) -> str:
    head = "| method | budget | kept | encoder ms | projector ms | layers ms | saved s | share |"
    lines = [f"{head} memory MB |", "|---|---|" + "---:|" * 7]
    for name, budgets in sorted(shape["rows"].items()):
        for label, row in budgets.items():
            if "error" not in row:
                lines.append(_line(name, label, row))
    return "\n".join(lines)


def _line(name: str, label: str, row: Row) -> str:
    spent, part = row["own_s"], share(row)
    shown = (
        f"- ({own(row) / row['untouched_s']:.2%} of the prefill)"
        if part is None
        else (f"{part:.2%}")
    )
    layers = 1e3 * (spent[DECODER] + spent["rule"])
    mark = "**" if needs_note(row) else ""
    return (
        f"| `{name}` | {label} | {row['kept']:.1%} | {1e3 * spent[ENCODER]:.0f} | "
        f"{1e3 * spent[PROJECTOR]:.0f} | {layers:.0f} | {sum(row['saved_s'].values()):.1f} | "
        f"{mark}{shown}{mark} | {row['working_mb']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("methods", nargs="*", help="names; none: all that are registered")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=ROOT / "docs" / "speed.json")
    parser.add_argument("--notes", type=Path, default=ROOT / "docs" / "speed-notes.toml")
    parser.add_argument("--write", type=Path, help="write the page here")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data: Row = json.loads(options.data.read_text("utf-8")) if options.data.exists() else {}
    if not options.page_only:
        names = options.methods or list_methods()
        data |= {
            "hardware": hardware("cpu"),
            "versions": f"foveate {foveate.__version__}, torch {torch.__version__}",
            "date": date.today().isoformat(),
            "command": "python benchmarks/own_cost.py --write docs/speed.md",
        }

        def save() -> None:
            options.data.write_text(json.dumps(_rounded(data), indent=1) + "\n", "utf-8")

        measure_all(names, options.shapes, options.repeats, data, save)
    notes = tomllib.loads(options.notes.read_text("utf-8")) if options.notes.exists() else {}
    if options.write:
        options.write.write_text(page(data, notes), "utf-8")


def _rounded(value: Any) -> Any:
    """Four digits are more than a timing is worth."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
