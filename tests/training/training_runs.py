"""Sizes that train within a second, and runs that break off where a test wants them to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate.training import SIZES, EmbeddedTraining, Size, Stage

#: Three stages of a few steps, each with two checkpoints before the last one.
SHORT = replace(
    SIZES["tiny"],
    tower=Stage(6, 2, 2e-3, 2),
    answers=Stage(6, 2, 2e-3, 2),
    joint=Stage(6, 2, 1e-3, 2),
)
#: Long enough to answer different questions differently.
LEARNED = replace(
    SIZES["tiny"],
    tower=Stage(40, 4, 1e-2, 5),
    answers=Stage(80, 4, 1e-2, 5),
    joint=Stage(20, 4, 2e-3, 2),
)


class Killed(Exception):
    """Stands for whatever ends a process."""


def training(folder: Path, size: Size = SHORT, **options: Any) -> EmbeddedTraining:
    """A training in this process that saves every second step and evaluates on four clips."""
    return EmbeddedTraining(size, folder, **{"workers": 0, "clips": 4, "every": 2, **options})


def kill_at(stage: str, step: int) -> Callable[..., None]:
    """A `tell` that breaks off when a step is reported, which is before it is saved."""

    def tell(name: str, done: int, total: int, facts: dict[str, float]) -> None:
        if (name, done) == (stage, step) and facts:
            raise Killed

    return tell
