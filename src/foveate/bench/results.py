"""A run folder read back: what the terminal, the page and the documents compare.

Legend: nothing here is a tensor; an interval is 95 %, an accuracy is a fraction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foveate.bench.cells import Answer, Cell
from foveate.bench.plan import BASELINES
from foveate.bench.stats import Interval
from foveate.bench.store import UNTOUCHED, Key, cell_key, read_lines


@dataclass(frozen=True)
class Standing:
    """One row of a ranking.

    Attributes:
        cell: recipe and budget.
        accuracy: with its interval.
        best_baseline: the baseline with the highest accuracy at this budget; None for baselines.
        to_baseline: paired difference to it.
        below: baselines with a higher accuracy, and whether the paired interval excludes zero.
    """

    cell: Cell
    accuracy: Interval
    best_baseline: str | None
    to_baseline: Interval | None
    below: tuple[tuple[str, bool], ...]


@dataclass
class BenchResult:
    """Everything that a run folder holds.

    Attributes:
        folder: where it is.
        run: the content of run.json.
        cells: in the order in which they were finished.
    """

    folder: Path
    run: dict[str, Any]
    cells: list[Cell]

    @property
    def untouched(self) -> Cell | None:
        """The cell of the untouched model, once it is finished."""
        return next((c for c in self.cells if c.recipe == UNTOUCHED and c.accuracy), None)

    @cached_property
    def budgets(self) -> list[float]:
        """Retain ratios at which recipes ran, smallest first."""
        return sorted({c.retain for c in self.cells if c.recipe != UNTOUCHED})

    @cached_property
    def recipes(self) -> list[str]:
        """Recipes with at least one result, the best on average first.

        A recipe is measured against the mean of its rivals at each budget, so that one whose hard
        budgets are still missing does not lead.
        """
        edge: dict[str, list[float]] = {}
        for budget in self.budgets:
            row = self.standings(budget)
            mean = sum(standing.accuracy.value for standing in row) / max(len(row), 1)
            for standing in row:
                edge.setdefault(standing.cell.recipe, []).append(standing.accuracy.value - mean)
        return sorted(edge, key=lambda name: (-sum(edge[name]) / len(edge[name]), name))

    @cached_property
    def methods(self) -> list[str]:
        """The recipes that are not baselines, in the same order."""
        return [name for name in self.recipes if name not in BASELINES]

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks in the order of the suite."""
        names = dict.fromkeys(self.run.get("tasks") or {})
        for cell in self.cells:
            names.update(dict.fromkeys(cell.figures.get("tasks") or {}))
        return list(names)

    @cached_property
    def failures(self) -> list[tuple[str, list[float], str]]:
        """Recipes that could not run: (recipe, budgets, reason)."""
        grouped: dict[tuple[str, str], list[float]] = {}
        for cell in self.cells:
            if cell.error:
                grouped.setdefault((cell.recipe, cell.error), []).append(cell.retain)
        return [(name, sorted(where), why) for (name, why), where in sorted(grouped.items())]

    @cached_property
    def missing(self) -> list[Key]:
        """Planned cells without a result."""
        finished = {cell.key for cell in self.cells}
        planned = [(str(name), float(at)) for name, at in self.run.get("planned") or []]
        return [key for key in planned if key not in finished]

    def at(self, budget: float) -> list[Cell]:
        """Cells with results at one budget, highest accuracy first."""
        return [standing.cell for standing in self.standings(budget)]

    def of(self, recipe: str) -> list[Cell]:
        """Cells with results of one recipe, largest budget first."""
        cells = [c for c in self.cells if c.recipe == recipe and c.accuracy is not None]
        return sorted(cells, key=lambda c: -c.retain)

    def cell(self, recipe: str, retain: float) -> Cell | None:
        """The cell of one recipe at one budget, if it is finished with a result."""
        return next((c for c in self.of(recipe) if c.retain == retain), None)

    def ranking(self) -> list[Cell]:
        """The untouched model, then every budget from large to small, the best recipe first."""

        def place(cell: Cell) -> tuple[Any, ...]:
            value = -1.0 if cell.accuracy is None else cell.accuracy.value
            return (cell.recipe != UNTOUCHED, -cell.retain, -value, cell.recipe)

        return sorted(self.cells, key=place)

    def standings(self, budget: float) -> list[Standing]:
        """The ranking at one budget, highest accuracy first, computed once."""
        if budget not in self._standings:
            ranked = [c for c in self.ranking() if c.recipe != UNTOUCHED and c.retain == budget]
            results = [(cell, cell.accuracy) for cell in ranked if cell.accuracy is not None]
            baselines = [(cell, value) for cell, value in results if cell.recipe in BASELINES]
            self._standings[budget] = [_standing(*pair, baselines) for pair in results]
        return self._standings[budget]

    @cached_property
    def _standings(self) -> dict[float, list[Standing]]:
        return {}

    def hardest(self, budget: float, most: int = 8) -> list[tuple[Answer, int, int]]:
        """Questions that the untouched model answers and most recipes lose: (answer, lost, of)."""
        if self.untouched is None:
            return []
        cells = [c for c in self.at(budget) if c.answers]
        rows = []
        for key, before in self.untouched.answers.items():
            seen = [c.answers[key].correct for c in cells if key in c.answers]
            lost = seen.count(False)
            if before.correct and 2 * lost > len(seen):
                rows.append((before, lost, len(seen)))
        return sorted(rows, key=lambda row: (-row[1] / row[2], row[0].id))[:most]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        cells = [cell.as_dict() for cell in self.cells]
        return {"folder": str(self.folder), "run": self.run, "cells": cells}

    def __str__(self) -> str:
        lines = [f"{'recipe':<28}{'retain':>7}{'accuracy':>24}{'to untouched':>28}"]
        for cell in self.ranking():
            gap = "" if cell.difference is None else cell.difference.in_points("+")
            right = cell.accuracy or f"error: {cell.error}"
            lines.append(f"{cell.recipe:<28}{cell.retain:>7g}{right!s:>24}{gap:>28}")
        return "\n".join(lines)


def _standing(
    cell: Cell, accuracy: Interval, baselines: Sequence[tuple[Cell, Interval]]
) -> Standing:
    """A row of the ranking; `baselines` come highest accuracy first."""
    rivals = [] if cell.recipe in BASELINES else baselines
    below = []
    for rival, reached in sorted(rivals, key=lambda pair: BASELINES.index(pair[0].recipe)):
        gap = cell.against(rival) or Interval(accuracy.value - reached.value)
        if gap.value < 0:
            below.append((rival.recipe, gap.excludes_zero))
    best = rivals[0][0] if rivals else None
    return Standing(
        cell,
        accuracy,
        best.recipe if best else None,
        cell.against(best) if best else None,
        tuple(below),
    )


def read_result(folder: str | Path) -> BenchResult:
    """Read run.json, cells.jsonl and answers.jsonl of a run, finished or not.

    Args:
        folder: the run folder. Files that a run has not written yet count as empty; of lines for
            the same cell or question the last one holds.

    Raises:
        ValueError: it holds no readable run.json, or another line than the last is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "run.json").write_text('{"model": "tiny"}')
        ...     read_result(folder).untouched is None
        True
    """
    folder = Path(folder)
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no run.json: give the folder that `foveate bench --out FOLDER` wrote."
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'} cannot be read: {error}.") from error
    cells: dict[Key, Cell] = {}
    for row in read_lines(folder / "cells.jsonl"):
        key = cell_key(row)
        cells[key] = Cell(*key, figures=row)
    for row in read_lines(folder / "answers.jsonl"):
        cell = cells.get(cell_key(row))
        # Answers of a cell that was cut off belong to no figure.
        if cell is not None and cell.error is None:
            name = str(row["id"])
            task, text = str(row.get("task", "")), str(row.get("answer", ""))
            clip, correct = str(row.get("clip", name)), bool(row["correct"])
            cell.answers[name] = Answer(name, clip, task, correct, text)
    result = BenchResult(folder, run, list(cells.values()))
    for cell in result.cells:
        cell.plain = result.untouched if cell.recipe != UNTOUCHED else None
    return result
