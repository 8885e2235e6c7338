"""What a run folder says, as figures with intervals and as a table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.bench.stats import Interval, accuracy, difference
from foveate.bench.store import UNTOUCHED, Key, cell_key, read_lines


@dataclass(frozen=True)
class CellResult:
    """One recipe at one budget.

    Attributes:
        recipe: as text; "untouched" is the model without any.
        retain: fraction of visual tokens kept.
        accuracy: over all questions; None when the cell failed.
        difference: to the untouched model on the same questions; None for that model itself.
        tasks: accuracy by task.
        task_differences: difference by task.
        figures: the line of cells.jsonl.
    """

    recipe: str
    retain: float
    accuracy: Interval | None
    difference: Interval | None
    tasks: dict[str, Interval] = field(default_factory=dict)
    task_differences: dict[str, Interval] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> str | None:
        """Why the recipe could not run, or None."""
        return self.figures.get("error")

    def as_dict(self) -> dict[str, Any]:
        """The figures and their intervals [value, low, high] as plain data."""
        data = dict(self.figures)
        data["accuracy"] = self.accuracy and self.accuracy.as_list()
        data["difference"] = self.difference and self.difference.as_list()
        data["task_accuracy"] = {task: i.as_list() for task, i in self.tasks.items()}
        data["task_difference"] = {task: i.as_list() for task, i in self.task_differences.items()}
        return data


@dataclass(frozen=True)
class BenchResult:
    """A run read back.

    Attributes:
        folder: where it is.
        run: the content of run.json.
        cells: the untouched model first, then recipes by budget.
    """

    folder: Path
    run: dict[str, Any]
    cells: list[CellResult]

    @property
    def untouched(self) -> CellResult | None:
        """The model without any recipe, once measured."""
        return next((cell for cell in self.cells if cell.recipe == UNTOUCHED), None)

    def visual_per_layer(self, cell: CellResult) -> float | None:
        """Visual tokens in a layer of the language model, mean over layers and questions.

        What enters the language model says nothing of methods that act inside of it.
        """
        plain = None if self.untouched is None else self.untouched.figures
        layers = cell.figures.get("layer_tokens")
        if plain is None or not layers:
            return None
        text = plain["layer_tokens"][0] - plain["visual_before"]
        return sum(layers) / len(layers) - text

    def ranking(self) -> list[CellResult]:
        """The untouched model, then every budget from large to small, the best recipe first."""

        def place(cell: CellResult) -> tuple[Any, ...]:
            value = -1.0 if cell.accuracy is None else cell.accuracy.value
            return (cell.recipe != UNTOUCHED, -cell.retain, -value, cell.recipe)

        return sorted(self.cells, key=place)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        cells = [cell.as_dict() for cell in self.cells]
        return {"folder": str(self.folder), "run": self.run, "cells": cells}

    def __str__(self) -> str:
        lines = [f"{'recipe':<28}{'retain':>7}{'accuracy':>24}{'to untouched':>28}"]
        for cell in self.ranking():
            gap = "" if cell.difference is None else signed(cell.difference)
            right = cell.accuracy or f"error: {cell.error}"
            lines.append(f"{cell.recipe:<28}{cell.retain:>7g}{right!s:>24}{gap:>28}")
        return "\n".join(lines)


def signed(gap: Interval) -> str:
    """A difference in percentage points.

    Example:
        >>> signed(Interval(-0.031, -0.05, 0.01))
        '-3.1 [-5.0, +1.0]'
    """
    value, low, high = (100 * part + 0.0 for part in gap.as_list())
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def read_result(folder: str | Path) -> BenchResult:
    """Read a run folder, finished or not.

    Raises:
        ValueError: it holds no run, or a line of it is damaged.
    """
    folder = Path(folder)
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable run.json: {error}.") from error
    answers: dict[Key, dict[str, dict[str, Any]]] = {}
    for row in read_lines(folder / "answers.jsonl"):
        answers.setdefault(cell_key(row), {})[row["id"]] = row
    plain = answers.get((UNTOUCHED, 1.0), {})
    lines = {cell_key(line): line for line in read_lines(folder / "cells.jsonl")}
    cells = [_cell(key, line, answers.get(key, {}), plain) for key, line in lines.items()]
    return BenchResult(folder, run, cells)


def _cell(
    key: Key,
    line: dict[str, Any],
    answers: dict[str, dict[str, Any]],
    plain: dict[str, dict[str, Any]],
) -> CellResult:
    rows = [] if line.get("error") else list(answers.values())
    tasks = dict.fromkeys(row["task"] for row in rows)
    by_task = {task: [row for row in rows if row["task"] == task] for task in tasks}
    compared = key[0] != UNTOUCHED and bool(plain)
    return CellResult(
        recipe=key[0],
        retain=key[1],
        accuracy=_accuracy(rows),
        difference=_difference(rows, plain) if compared else None,
        tasks={t: i for t, part in by_task.items() if (i := _accuracy(part))},
        task_differences={
            t: i for t, part in by_task.items() if compared and (i := _difference(part, plain))
        },
        figures=line,
    )


def _accuracy(rows: Sequence[dict[str, Any]]) -> Interval | None:
    if not rows:
        return None
    return accuracy([row["correct"] for row in rows], [row["clip"] for row in rows])


def _difference(
    rows: Sequence[dict[str, Any]], plain: dict[str, dict[str, Any]]
) -> Interval | None:
    pairs = [(row, plain[row["id"]]) for row in rows if row["id"] in plain]
    if not pairs:
        return None
    return difference(
        [row["correct"] for row, _ in pairs],
        [other["correct"] for _, other in pairs],
        [row["clip"] for row, _ in pairs],
    )
