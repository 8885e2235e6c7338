"""The folder of a training: begun once, gone on with, and finished in one go.

It holds the settings (`training.json`), a checkpoint of each stage and at the end the weights
(`model.safetensors`) with their `card.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.core.hardware import hardware
from foveate.training.loop import Run

STATE = "training.json"
WEIGHTS = "model.safetensors"
CARD = "card.json"


def claim(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Take a folder for a training, or refuse it.

    Args:
        folder: new, empty, or one that was begun with the same settings.
        settings: plain data, as JSON gives it back.
        resume: go on in a folder that was begun.

    Raises:
        FileExistsError: it holds a finished model, a training and `resume` is off, or other files.
        ValueError: it was begun with other settings, or by another release (0.1, 0.2).
    """
    file = folder / STATE
    if (folder / WEIGHTS).exists():
        raise FileExistsError(
            f"{folder} holds a finished model; name another folder or move it away."
        )
    if file.exists():
        if not resume:
            raise FileExistsError(
                f"{folder} holds a training that was begun; go on with --resume "
                "(resume=True), or name another folder."
            )
        begun = json.loads(file.read_text())
        if note := version_note(folder):
            warnings.warn(note, stacklevel=4)
        begun.pop("foveate", None)
        if found := differing(begun, settings):
            raise ValueError(
                f"{folder} was begun with other settings: {found}; go on with those, "
                "or name another folder."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    begun = {"foveate": foveate.__version__, **settings}
    draft.write_text(json.dumps(begun, indent=1) + "\n")
    os.replace(draft, file)  # noqa: PTH105


def version_note(folder: Path) -> str | None:
    """What to know about going on with a training that another patch of foveate began.

    A patch changes neither data nor losses on purpose, so that the training goes on with this
    warning. Trainings that do not say who began them are taken on trust.

    Raises:
        ValueError: another release began it (0.1, 0.2), where both may differ.
    """
    file = folder / STATE
    now = foveate.__version__
    begun = json.loads(file.read_text()).get("foveate", now) if file.exists() else now
    if begun == now:
        return None
    found = f"{folder} was begun with foveate {begun}, and this is {now}"
    if begun.split(".")[:2] != now.split(".")[:2]:
        raise ValueError(f"{found}; go on with that version, or name another folder.")
    return f"{found}: the weights may differ from those of either alone."


def publish(folder: Path, save: Callable[[Path], object], card: dict[str, Any]) -> None:
    """Write a model and its card into the folder, the weights last: where they are, everything is.

    Args:
        folder: of the training.
        save: writes the model's files into the folder it is given.
        card: plain data.
    """
    draft = folder / "finished.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    save(draft)
    (draft / CARD).write_text(json.dumps(card, indent=1) + "\n")
    for file in sorted(draft.iterdir(), key=lambda file: file.name == WEIGHTS):
        os.replace(file, folder / file.name)  # noqa: PTH105
    draft.rmdir()


def differing(begun: dict[str, Any], settings: dict[str, Any], name: str = "") -> str:
    """Where two nested settings differ, in words; empty when they agree.

    Example:
        >>> differing({"seed": 0}, {"seed": 1})
        'seed was 0, is 1'
    """
    found = []
    for key in dict.fromkeys([*begun, *settings]):
        was, now, path = begun.get(key), settings.get(key), f"{name}{key}"
        if isinstance(was, dict) and isinstance(now, dict):
            found.append(differing(was, now, f"{path}."))
        elif was != now:
            found.append(f"{path} was {was}, is {now}")
    return "; ".join(part for part in found if part)


def provenance(device: str) -> dict[str, Any]:
    """With what and on what a model was trained, and when."""
    return {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def stage_facts(runs: Iterable[Run], unit: str) -> dict[str, dict[str, Any]]:
    """Steps, units seen, seconds and curve of every stage, for a card."""
    return {
        run.name: {
            "steps": run.stage.steps,
            unit: run.stage.steps * run.stage.clips,
            "seconds": round(run.seconds, 1),
            "curve": thinned(run.history),
        }
        for run in runs
    }


def thinned(history: list[dict[str, float]], points: int = 40) -> list[dict[str, float]]:
    """A curve of at most so many points, the last one included."""
    every = max(1, -(-len(history) // points))
    kept = history[every - 1 :: every]
    if history and kept[-1:] != history[-1:]:
        kept.append(history[-1])
    return [{name: round(value, 5) for name, value in point.items()} for point in kept]
