"""Seconds from files to the first token, recipes and untouched in turn: `search_fast.py time`.

Readings are lines of RUN/times.jsonl. Those of one turn saw the same machine in the same minute.
Compared is processor time, of all threads, so that other work on the machine does not count; stages
are told by the clock on the wall.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import foveate
from foveate.attach.encode_spans import encode_spans
from foveate.checkpoints import open_clip, prepare
from foveate.checkpoints.sources import sample_frames
from foveate.core import Recipe
from foveate.core.hardware import hardware
from foveate.core.timeline import Timeline
from foveate.video import sample_clip
from foveate.world import World

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
QUESTION = "what is blue ?"


class Timed(NamedTuple):
    """A recipe, what the lines call it, and the budget of the call; None: the untouched model."""

    name: str
    recipe: Recipe | None
    retain: float


@dataclass(frozen=True)
class Shape:
    """What is timed: a model, its clips, and how many of them are read at once."""

    name: str
    frames: int
    clips: int
    batch: int
    warms_up: bool = True

    def model(self) -> tuple[Any, Any]:
        """The model and its processor."""
        if self.name == "embedded":
            return foveate.embedded()
        from file_to_first_token import shaped_model

        return shaped_model(self.name, "cpu", torch.float32)

    def files(self, folder: Path) -> list[Path]:
        """Clips as files: of the world's test split, or a real one for the larger model."""
        if self.name != "embedded":
            return [sample_clip("bikes")] * self.clips
        world = World(seed=0, split="test", frames=self.frames)
        found = []
        for index in range(self.clips):
            found.append(folder / f"clip{index}.mp4")
            if not found[-1].exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_clip(found[-1], world.sample(index).frames_THWC)
        return found


SHAPES = {
    "embedded": Shape("embedded", 16, 8, 1),
    "embedded-8": Shape("embedded", 16, 8, 8),
    "so400m": Shape("so400m", 8, 1, 1, False),
}


def write_clip(path: Path, frames_THWC: np.ndarray) -> None:
    """Frames as h264 at 8 a second, nearly without loss."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10"}
        for frame in frames_THWC:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def first_token(
    model: Any, processor: Any, files: Sequence[Path], frames: int, timed: Timed
) -> dict[str, float]:
    """Seconds of every stage from files to the first token of each; attaching is not counted."""
    line, attached = Timeline(), contextlib.nullcontext()
    if timed.recipe is not None:
        attached = foveate.reduce(model, timed.recipe, retain=timed.retain)
    with encode_spans(model, line), attached, torch.inference_mode():
        begin, busy = line.now(), time.process_time()
        with line.span("decode"):
            taken = [sample_frames(open_clip(path), frames) for path in files]
        with line.span("encode"):
            made = [prepare(processor, clip, QUESTION, is_image=False) for clip in taken]
            names = ("input_ids", "attention_mask", "pixel_values_videos")
            inputs = {name: torch.cat([one[name] for one in made]) for name in names}
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        whole, busy = line.now() - begin, time.process_time() - busy
    spent = line.seconds()
    rest = whole - spent["decode"] - spent["encode"]
    return {**spent, "prefill": rest, "first token": whole, "processor": busy}


def measure_times(shape_name: str, recipes: Sequence[Timed], rounds: int, folder: Path) -> None:
    """All recipes and the untouched model in turn; a line for every reading."""
    shape = SHAPES[shape_name]
    model, processor = shape.model()
    files = shape.files(folder / "clips")
    batches = [files[at : at + shape.batch] for at in range(0, len(files), shape.batch)]
    everybody = [Timed("untouched", None, 1.0), *recipes]
    with (folder / "times.jsonl").open("a", encoding="utf-8") as out:
        for turn in range(rounds + shape.warms_up):
            for number, batch in enumerate(batches):
                measured = []
                for timed in everybody:
                    spent = first_token(model, processor, batch, shape.frames, timed)
                    named = {"recipe": timed.name, "retain": timed.retain}
                    measured.append(
                        {"shape": shape_name, **named, "clip": number, "seconds": spent}
                    )
                if not turn and shape.warms_up:
                    continue
                about = {
                    "hardware": hardware("cpu"),
                    "date": str(date.today()),
                    "turn": time.time(),
                }
                for row in measured:
                    out.write(json.dumps({**row, **about}) + "\n")
                out.flush()
    for row in times(folder, shape_name):
        print(
            f"{1000 * row['first token']:8.1f} ms {1000 * row['processor']:8.1f} ms busy "
            f"{row['ratio']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]  {row['recipe']} at {row['retain']}"
        )


def times(folder: Path, shape_name: str) -> list[dict[str, Any]]:
    """Median seconds of every stage, and the ratio to the untouched model in the same turn.

    The ratio is that of processor time, the median over turns; a 95 % interval comes from
    resampling turns.
    """
    lines = (folder / "times.jsonl").read_text(encoding="utf-8").splitlines()
    turns: dict[float, dict[tuple[str, float], dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        if row["shape"] == shape_name:
            turns.setdefault(row["turn"], {})[row["recipe"], row["retain"]] = row
    found = []
    for key in dict.fromkeys(key for turn in turns.values() for key in turn):
        mine = [turn for turn in turns.values() if key in turn]
        parts = [turn[key]["seconds"] for turn in mine]
        ratio = np.array([_busy(turn, key) / _busy(turn, ("untouched", 1.0)) for turn in mine])
        draws = np.random.default_rng(0).integers(len(ratio), size=(2000, len(ratio)))
        low, high = np.percentile(np.median(ratio[draws], axis=1), [2.5, 97.5])
        row = {name: float(np.median([part[name] for part in parts])) for name in parts[0]}
        row |= {"ratio": float(np.median(ratio)), "low": float(low), "high": float(high)}
        recipe, retain = key
        found.append({"recipe": recipe, "retain": retain, "readings": len(ratio), **row})
    return found


def _busy(turn: dict[tuple[str, float], dict[str, Any]], key: tuple[str, float]) -> float:
    return turn[key]["seconds"]["processor"]
