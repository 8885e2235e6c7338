"""Run folders as `foveate bench` writes them, with answers drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TASKS = (
    "what",
    "where",
    "count",
    "direction",
    "order",
    "when",
    "reading",
    "needle",
    "change",
    "moving",
)
BUDGETS = (0.05, 0.1, 0.2, 0.5)
BASELINES = ("random", "uniform", "pool")
# (recipe, stage, tokens lost to a small budget, share of the FLOPs that it can save)
SMALL = (
    ("holitom", "projector", 0.7, 0.8),
    ("divprune", "projector", 1.0, 0.8),
    ("fastv", "decoder", 1.5, 0.5),
    ("tome(retain=0.6)@encoder + holitom", "encoder", 0.9, 0.95),
    ("quickvideo", "cache", 1.2, 0.15),
)
_NAMES = (
    "aim",
    "fastervlm",
    "framefusion",
    "prumerge",
    "visionzip",
    "sparsevlm",
    "pyramiddrop",
    "dycoke",
    "llavascissor",
    "flexselect",
    "topv",
    "hiprune",
    "vscan",
    "vispruner",
    "feather",
    "gprune",
    "cdpruner",
    "mmtok",
    "atp",
    "dart",
    "stpruner",
    "tokentransforming",
    "evit",
    "tofu",
    "zipvl",
)


def large() -> list[tuple[str, str, float, float]]:
    """Thirty recipes."""
    stages = ("projector", "decoder", "encoder")
    return [
        *SMALL,
        *((name, stages[n % 3], 0.6 + 0.09 * n, 0.9 - 0.02 * n) for n, name in enumerate(_NAMES)),
    ]


def write_run(
    folder: Path,
    *,
    recipes: Sequence[tuple[str, str, float, float]] = SMALL,
    budgets: Sequence[float] = BUDGETS,
    tasks: Sequence[str] = tuple(TASKS),
    clips: int = 40,
    per_clip: int = 5,
    seed: int = 0,
    untouched: bool = True,
    timed: bool = True,
    failing: Sequence[str] = (),
) -> Path:
    """Write run.json, cells.jsonl and answers.jsonl into an existing folder."""
    rng = np.random.default_rng(seed)
    items = clips * per_clip
    task_of = [tasks[n % len(tasks)] for n in range(items)]
    # Questions of one clip are easy or hard together.
    ease = np.repeat(rng.normal(1.6, 0.7, clips), per_clip) + rng.normal(0, 0.9, items)
    ease -= np.array([0.25 * tasks.index(task) for task in task_of])
    run = {
        "version": 1,
        "model": "models/embedded",
        "model_id": "LlavaOnevisionForConditionalGeneration, weights 97a556e3",
        "suite": "world",
        "suite_args": {"clips": clips, "seed": 0},
        "items": items,
        "clips": clips,
        "frames": 16,
        "skipped": ['questions.jsonl:7: no "answer"'],
        "tasks": {task: task_of.count(task) for task in tasks},
        "device": "cpu",
        "dtype": "float32",
        "hardware": "AMD EPYC 7B13, 2 cores",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "foveate": "0.3.0",
        "date": "2026-03-14T09:26:53+00:00",
        "command": "foveate bench --model embedded --recipes holitom,divprune --retain 0.05,0.1",
    }
    baselines = (
        ("random", "projector", 1.9, 0.8),
        ("uniform", "projector", 1.6, 0.8),
        ("pool", "projector", 1.3, 0.8),
    )
    plan: list[tuple[str, str, float, float, float]] = []
    if untouched:
        plan.append(("untouched", "", 0.0, 0.0, 1.0))
    plan += [(*recipe, budget) for budget in budgets for recipe in (*baselines, *recipes)]
    run["planned"] = [[name, retain] for name, *_, retain in plan]
    (folder / "run.json").write_text(json.dumps(run))
    with (folder / "cells.jsonl").open("w") as cells, (folder / "answers.jsonl").open("w") as out:
        for name, stage, harm, saves, retain in plan:
            noise = rng.normal(0, 0.35, items) if harm and retain < 1 else 0
            right = ease - 0.55 * harm * (1 / retain) ** 0.35 + 0.55 * harm + noise > 0
            for n in range(items):
                answer = {
                    "recipe": name,
                    "retain": retain,
                    "id": f"test/{n // per_clip}/{n % per_clip}",
                    "clip": f"test/{n // per_clip}",
                    "task": task_of[n],
                    "answer": "red",
                    "predicted": "red" if right[n] else "blue",
                    "correct": bool(right[n]),
                }
                out.write("" if name in failing else json.dumps(answer) + "\n")
            cell = _cell(name, stage, saves, retain, right, task_of, timed, rng)
            if name in failing:
                cell = {"recipe": name, "retain": retain, "items": 0, "correct": 0}
                cell["error"] = f"{name} needs encoder.cls_attention, which this tower <lacks>"
            cells.write(json.dumps(cell) + "\n")
    return folder


def _cell(
    name: str,
    stage: str,
    saves: float,
    retain: float,
    right: np.ndarray,
    task_of: list[str],
    timed: bool,
    rng: np.random.Generator,
) -> dict[str, Any]:
    after = 256 if stage == "decoder" else round(256 * retain)
    stages = [
        {
            "stage": part,
            "method": name.split("(")[0],
            "layer": layer,
            "before": before,
            "after": kept,
        }
        for part, layer, before, kept in (
            [("decoder", 2, 256, 256 * retain)]
            if stage == "decoder"
            else [
                ("encoder", 1, 1024, 870.5),
                ("encoder", 2, 870.5, 614.4),
                ("projector", None, 154, after),
            ]
            if stage == "encoder"
            else [(stage, None, 256, after)]
            if stage
            else []
        )
    ]
    seconds = 0.21 * (1 - saves * (1 - retain) * 0.8)
    return {
        "recipe": name,
        "retain": retain,
        "seconds": 12.5,
        "items": len(right),
        "correct": int(right.sum()),
        "tasks": {
            task: [int(sum(r for r, t in zip(right, task_of, strict=True) if t == task)), n]
            for task, n in ((task, task_of.count(task)) for task in dict.fromkeys(task_of))
        },
        "visual_before": 256,
        "visual_after": after,
        "stages": stages,
        "layer_tokens": [after + 20.0] * 4,
        "flops": {"untouched": 4.2e9, "reduced": 4.2e9 * (1 - saves * (1 - retain))},
        "first_token": {
            "median": seconds,
            "low": seconds * 0.95,
            "high": seconds * 1.1,
            "repeats": 5,
        }
        if timed
        else None,
        "decode_tokens_per_second": 110 + float(rng.normal(0, 4)) if timed else None,
        "peak_memory": None,
        "overhead": {stage: 0.0042} if timed and stage else {},
        "error": None,
    }
