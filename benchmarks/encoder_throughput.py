"""Time of vision encoders, untouched against every encoder-stage method, beside their FLOPs.

    python benchmarks/encoder_throughput.py --shapes dinov2-s            # measure and keep
    python benchmarks/encoder_throughput.py --shapes siglip --methods tome gtp_vit
    python benchmarks/encoder_throughput.py --write                      # the table of the page

Each method runs at the budget that its paper's cost figures are of (its default) and at half of
the patches; one that saves nothing there also at less. The untouched encoder and the method take
turns, so that both see the same machine; a row is the median over the rounds of one round's ratio.
On a CPU seconds are those that the process computed, not those that it waited for others. Rows are
kept in `--data`, where a new run replaces its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import foveate
from foveate.core import get_method
from foveate.core.hardware import hardware
from foveate.methods.dtop import MaskHead
from foveate.models.backbones import (
    MixSTE,
    MixSTEConfig,
    ViS4mer,
    ViS4merConfig,
    VisionMamba,
    VisionMambaConfig,
)
from foveate.models.default_encoder import default_encoder
from foveate.video import Clip, FrameTransform, sample_clip

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- throughput: begin -->", "<!-- throughput: end -->"
#: A row below this share of what its FLOPs allow is explained.
BAR = 0.85
#: Methods that join frames get a video of twelve, as published.
FRAMES = 12
JOINING = ("centerclip", "tempme")
#: Where half of the patches save a small encoder nothing: a budget that does.
LESS = {("dinov2-s", "tempme"): 0.4}
#: Of a method that acts behind the encoder, too, the part inside it.
RECIPES = {"flowcut": "flowcut@encoder"}
Row = dict[str, Any]


def _dinov2_b() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224
    )
    return Dinov2Model(config)


def _siglip() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=12,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return SiglipVisionModel(config)


@dataclass(frozen=True)
class Shape:
    """One encoder and what goes in.

    Attributes:
        title: for people.
        build: makes the model.
        inputs: of one sample, behind the batch axis.
        name: what its forward calls them; none: the first argument.
        methods: that act on it.
        batch: samples of a call.
        half: measured with half of the patches, too.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    name: str | None
    methods: tuple[str, ...]
    batch: int = 8
    half: bool = True


ENCODERS = (
    "tome", "token_transforming", "gtp_vit", "zero_tprune", "stvit", "centerclip", "tempme",
)  # fmt: skip
SHAPES = {
    "dinov2-s": Shape(
        "DINOv2-S (its weights), 224 x 224: 257 tokens, 12 blocks",
        default_encoder, (3, 224, 224), "pixel_values", (*ENCODERS, "flowcut"),
    ),
    "dinov2-b": Shape(
        "DINOv2-B, 224 x 224: 257 tokens, 12 blocks",
        _dinov2_b, (3, 224, 224), "pixel_values", (*ENCODERS, "dtop"),
    ),
    "siglip": Shape(
        "SigLIP-so400m, 384 x 384: 729 tokens, 12 of its 27 blocks",
        _siglip, (3, 384, 384), "pixel_values", ENCODERS[:-2], half=False,
    ),
    "mixste": Shape(
        "MixSTE: 243 frames of 17 joints, 8 pairs of blocks",
        lambda: MixSTE(MixSTEConfig()), (243, 17, 2), None, ("hot",), 1, False,
    ),
    "vim-s": Shape(
        "Vim-S, 224 x 224: 197 tokens, 24 blocks",
        lambda: VisionMamba(VisionMambaConfig(hidden=384)),
        (3, 224, 224), None, ("tovim",), half=False,
    ),
    "vis4mer": Shape(
        "ViS4mer: 60 frames of 196 tokens of 1024 channels, 3 blocks",
        lambda: ViS4mer(ViS4merConfig(inputs=1024, mask_generator=True)),
        (60 * 196, 1024), None, ("s5",), 1, False,
    ),
}  # fmt: skip
#: Why a method reaches less than the bar somewhere; read for rows that do.
NOTES = ROOT / "docs" / "encoder-throughput-notes.toml"


def frames(num: int, size: int) -> Tensor:
    """Frames of a real clip: attention that trained weights pay to noise is like no other."""
    edge = {"shortest_edge": size}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = FrameTransform(size=edge, crop_size=(size, size), mean=mean, std=std)
    return transform(Clip(sample_clip("bikes")).sample(num).pixels)


def steady_memory() -> None:
    """Keep what is freed (glibc): else either side pays page faults, by chance of its sizes."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        print("no glibc: page faults count")


def seconds(call: Callable[[], object], device: str) -> float:
    """What one call takes: CPU time, or wall time of an accelerator."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    begin = clock()
    with torch.no_grad():
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begin


class Case:
    """One method on one encoder.

    Args:
        shape: the encoder.
        model: the encoder, built.
        name: of the method.
        retain: fraction of the patches that leave the last block; None: the method's default.
        device: "cpu" or "cuda".
    """

    def __init__(
        self, shape: Shape, model: nn.Module, name: str, retain: float | None, device: str
    ) -> None:
        self.model, self.name, self.shape = model, name, shape
        self.arguments: Row = {} if retain is None else {"retain": retain}
        self.batch = FRAMES if name in JOINING else shape.batch
        draw = torch.Generator().manual_seed(0)
        if shape.title.startswith("DINOv2-S"):
            x = frames(self.batch, shape.inputs[-1]).to(device)
        else:
            x = torch.randn(self.batch, *shape.inputs, generator=draw).to(device)
        self.args, self.kwargs = ((x,), {}) if shape.name is None else ((), {shape.name: x})
        self.heads: tuple[MaskHead, ...] = ()
        if name == "dtop":  # retain fixes how many leave; trained heads choose other ones
            config: Any = model.config
            torch.manual_seed(0)
            made = [MaskHead(config.hidden_size, num_classes=150) for _ in range(3)]
            self.heads = tuple(head.eval().to(device) for head in made)
            self.arguments |= {"heads": self.heads}
            self.arguments.setdefault("retain", get_method(name).card.retain)

    def untouched(self) -> None:
        """The encoder, and one head where the method is one of a task."""
        out = self.model(*self.args, **self.kwargs)
        if self.heads:
            self.heads[-1](out.last_hidden_state[:, self._prefix() :])

    def reduced(self) -> float:
        """The same by the method; FLOPs left."""
        recipe = RECIPES.get(self.name, self.name)
        with foveate.reduce(self.model, recipe, **self.arguments) as run:
            self.model(*self.args, **self.kwargs)
        flops = run.report.flops
        left, full = flops["reduced"]["total"], flops["untouched"]["total"]
        if self.heads and run.dense is not None:
            patches = run.dense.mask_logits_BKP.shape[2]
            left += run.dense.flops
            full += self.batch * self.heads[-1].flops(patches)
        return left / full

    def _prefix(self) -> int:
        return 0 if "siglip" in type(self.model).__name__.lower() else 1

    def measure(self, rounds: int, device: str) -> Row:
        """Medians over some rounds."""
        seconds(self.untouched, device)
        flops = 1.0

        def reduced() -> None:
            nonlocal flops
            flops = self.reduced()

        seconds(reduced, device)  # both have run once: nothing is built any more
        pairs = []
        for turn in range(rounds):
            calls = [self.untouched, reduced]
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            spent = {i: seconds(calls[i], device) for i in order}
            pairs.append((spent[0], spent[1]))
        return {
            "batch": self.batch,
            "untouched_s": statistics.median(a for a, _ in pairs),
            "reduced_s": statistics.median(b for _, b in pairs),
            "time": statistics.median(b / a for a, b in pairs),
            "flops": flops,
            "rounds": rounds,
        }


def measure(options: argparse.Namespace, data: Row) -> None:
    """Measure methods on shapes into `data`, saving after each."""
    data["hardware"] = hardware(options.device)
    data["versions"] = f"foveate {foveate.__version__}, torch {torch.__version__}"
    data["date"] = date.today().isoformat()
    for key in options.shapes:
        shape = SHAPES[key]
        torch.manual_seed(0)
        model = shape.build().eval().to(options.device)
        for name in options.methods or shape.methods:
            if name not in shape.methods:
                continue
            for retain in options.retain or budgets(name, key):
                case = Case(shape, model, name, retain, options.device)
                row = case.measure(options.rounds, options.device)
                row["retain"] = retain or get_method(name).card.retain
                rows = data.setdefault("shapes", {}).setdefault(key, {}).setdefault(name, [])
                rows[:] = [x for x in rows if abs(x["retain"] - row["retain"]) > 1e-6]
                rows.append(_rounded(row))
                rows.sort(key=lambda x: x["retain"])
                print(
                    key, name, f"{share(row):.1%} of what FLOPs allow:", _rounded(row), flush=True
                )
                options.data.write_text(json.dumps(data, indent=1) + "\n", "utf-8")


def budgets(name: str, key: str) -> list[float | None]:
    """The default, half of the patches unless that is near, and what `LESS` names."""
    default = get_method(name).card.retain
    near = default is None or abs(default - 0.5) < 0.02
    found: list[float | None] = [None] if near or not SHAPES[key].half else [None, 0.5]
    return [*found, LESS[key, name]] if (key, name) in LESS else found


def share(row: Row) -> float:
    """The ratio of throughputs as a share of the one that FLOPs would allow."""
    return row["flops"] / row["time"]


def below(data: Row) -> dict[str, list[str]]:
    """Methods with rows that miss the bar, and where."""
    found: dict[str, list[str]] = {}
    for key, methods in data["shapes"].items():
        for name, rows in methods.items():
            for row in rows:
                if share(row) < BAR:
                    found.setdefault(name, []).append(f"{key} at {row['retain']:.3g}")
    return found


def section(data: Row, notes: dict[str, str]) -> str:
    """The tables, and what is said of rows that miss the bar.

    Raises:
        ValueError: a method misses it without an explanation.
    """
    silent = sorted(set(below(data)) - set(notes))
    if silent:
        raise ValueError(f"below {BAR:.0%} without an explanation: {', '.join(silent)}.")
    lines: list[str] = []
    for key, shape in SHAPES.items():
        if key not in data["shapes"]:
            continue
        lines += [f"**{shape.title}.**", ""]
        lines += [
            "| Method | retain | batch | FLOPs | throughput | FLOPs would allow | share of that |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name in shape.methods:
            for row in data["shapes"][key].get(name, []):
                part = share(row)
                shown = f"{part:.0%}" if part >= BAR else f"**{part:.0%}**"
                lines.append(
                    f"| `{name}` | {row['retain']:.3g} | {row['batch']} | {row['flops']:.1%} | "
                    f"{1 / row['time']:.2f} x | {1 / row['flops']:.2f} x | {shown} |"
                )
        lines.append("")
    lines += [
        f"{data['hardware']}, {data['versions']}, float32, {data['date']}: "
        "`python benchmarks/encoder_throughput.py`.",
        "",
        *_missed(data, notes),
    ]
    return "\n".join(lines)


def _missed(data: Row, notes: dict[str, str]) -> list[str]:
    """What is said of rows below the bar, and of those slower than untouched."""
    lines = []
    if found := below(data):
        lines += [f"Below {BAR:.0%} of what FLOPs would allow:", ""]
        lines += [f"* `{name}` ({', '.join(at)}): {notes[name]}" for name, at in found.items()]
        lines.append("")
    slower = [
        f"`{name}` on {key} at {row['retain']:.3g}, with {row['flops']:.0%} of the FLOPs"
        f"{_gains(rows)}"
        for key, methods in data["shapes"].items()
        for name, rows in methods.items()
        for row in rows
        if row["time"] > 1
    ]
    said = f"Slower than untouched: {'; '.join(slower)}." if slower else "No row is slower."
    return [*lines, said]


def _gains(rows: list[Row]) -> str:
    """The largest budget measured at which a method is no slower."""
    found = [row for row in rows if row["time"] <= 1]
    if not found:
        return ""
    best = max(found, key=lambda row: row["retain"])
    return f" (at {best['retain']:.3g} it is {1 / best['time']:.2f} x as fast)"


def _rounded(row: Row) -> Row:
    return {k: float(f"{v:.4g}") if isinstance(v, float) and k != "retain" else v
            for k, v in row.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--methods", nargs="*", default=[], help="names; none: all of the shape")
    parser.add_argument("--retain", type=float, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=ROOT / "docs" / "encoder-throughput.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "encoders.md")
    parser.add_argument("--write", action="store_true", help="write the section of the page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data: Row = json.loads(options.data.read_text("utf-8")) if options.data.exists() else {}
    if options.shapes:
        steady_memory()
        measure(options, data)
    if options.write:
        notes = tomllib.loads(NOTES.read_text("utf-8"))
        text = options.page.read_text("utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        options.page.write_text(f"{before}{BEGIN}\n{section(data, notes)}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
