"""A run folder read back, and the figures that its report compares.

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
from foveate.bench.estimates import Estimate, accuracy_of, difference_of
from foveate.bench.plan import BASELINES
from foveate.bench.store import UNTOUCHED, Key, cell_key, read_lines


@dataclass(frozen=True)
class Standing:
    """One row of a ranking.

    Args:
        cell: recipe and budget.
        accuracy: with its interval.
        to_untouched: paired difference to the untouched model; None before that cell is done.
        best_baseline: the baseline with the highest accuracy at this budget.
        to_baseline: paired difference to it; None for the baselines themselves.
        below: baselines with a higher accuracy, and whether the paired interval excludes zero.
    """

    cell: Cell
    accuracy: Estimate
    to_untouched: Estimate | None
    best_baseline: str | None
    to_baseline: Estimate | None
    below: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Losses:
    """Questions of one task against the untouched model: right there and wrong here, and back."""

    lost: int
    held: int
    gained: int
    missed: int

    @property
    def share(self) -> float | None:
        """Fraction of what the untouched model answers that is lost."""
        return self.lost / self.held if self.held else None


@dataclass
class Results:
    """Everything that a run folder holds."""

    run: dict[str, Any]
    cells: dict[Key, Cell]

    @property
    def untouched(self) -> Cell | None:
        """The cell of the untouched model, once it is finished."""
        return next((c for c in self.cells.values() if c.recipe == UNTOUCHED and not c.error), None)

    @cached_property
    def budgets(self) -> list[float]:
        """Retain ratios at which recipes ran, smallest first."""
        return sorted({c.retain for c in self.cells.values() if c.recipe != UNTOUCHED})

    @cached_property
    def recipes(self) -> list[str]:
        """Recipes with at least one result, the best on average first.

        A recipe is measured against the mean of its rivals at each budget, so that one whose hard
        budgets are still missing does not lead.
        """
        edge: dict[str, list[float]] = {}
        for budget in self.budgets:
            row = {c.recipe: c.share_correct or 0.0 for c in self.at(budget)}
            mean = sum(row.values()) / max(len(row), 1)
            for name, share in row.items():
                edge.setdefault(name, []).append(share - mean)
        return sorted(edge, key=lambda name: (-sum(edge[name]) / len(edge[name]), name))

    @cached_property
    def methods(self) -> list[str]:
        """The recipes that are not baselines, in the same order."""
        return [name for name in self.recipes if name not in BASELINES]

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks in the order of the suite."""
        names = dict.fromkeys(self.run.get("tasks") or {})
        for cell in self.cells.values():
            names.update(dict.fromkeys(cell.data.get("tasks") or {}))
        return list(names)

    @cached_property
    def failures(self) -> list[tuple[str, list[float], str]]:
        """Recipes that could not run: (recipe, budgets, reason)."""
        grouped: dict[tuple[str, str], list[float]] = {}
        for cell in self.cells.values():
            if cell.error:
                grouped.setdefault((cell.recipe, cell.error), []).append(cell.retain)
        return [(name, sorted(where), why) for (name, why), where in sorted(grouped.items())]

    @cached_property
    def missing(self) -> list[Key]:
        """Cells without a result at a budget that another recipe has one at."""
        names = dict.fromkeys(c.recipe for c in self.cells.values() if c.recipe != UNTOUCHED)
        return [(n, b) for n in names for b in self.budgets if (n, b) not in self.cells]

    def at(self, budget: float) -> list[Cell]:
        """Cells with results at one budget, highest accuracy first."""
        cells = [
            c
            for c in self.cells.values()
            if c.recipe != UNTOUCHED and c.retain == budget and c.share_correct is not None
        ]
        return sorted(cells, key=lambda c: (-(c.share_correct or 0.0), c.recipe))

    def of(self, recipe: str) -> list[Cell]:
        """Cells with results of one recipe, largest budget first."""
        cells = [
            c for c in self.cells.values() if c.recipe == recipe and c.share_correct is not None
        ]
        return sorted(cells, key=lambda c: -c.retain)

    def first_token_ratio(self, cell: Cell) -> float | None:
        """Time to the first token as a multiple of the untouched model's.

        Against the untouched model in the same minutes where the run measured that.
        """
        if cell.first_token_ratio is not None:
            return cell.first_token_ratio
        mine, base = cell.first_token, self.untouched.first_token if self.untouched else None
        return mine / base if mine is not None and base else None

    def visual_per_layer(self, cell: Cell) -> float | None:
        """Visual tokens in a layer of the LLM, mean over layers and questions.

        What enters the LLM says nothing of methods that act inside of it.
        """
        plain = self.untouched.data if self.untouched else {}
        layers, whole = cell.data.get("layer_tokens"), plain.get("layer_tokens")
        if not layers or not whole or plain.get("visual_before") is None:
            return None
        return sum(layers) / len(layers) - (whole[0] - plain["visual_before"])

    def accuracy(self, cell: Cell) -> Estimate:
        """Accuracy of a cell, computed once."""
        key = (cell.recipe, cell.retain)
        if key not in self._estimates:
            self._estimates[key] = accuracy_of(cell.answers, cell.share_correct or 0.0)
        return self._estimates[key]

    @cached_property
    def _estimates(self) -> dict[Key, Estimate]:
        return {}

    @cached_property
    def _standings(self) -> dict[float, list[Standing]]:
        return {}

    def standings(self, budget: float) -> list[Standing]:
        """The ranking at one budget, highest accuracy first, computed once."""
        if budget not in self._standings:
            cells = self.at(budget)
            baselines = [c for c in cells if c.recipe in BASELINES]
            self._standings[budget] = [self._standing(cell, baselines) for cell in cells]
        return self._standings[budget]

    def _standing(self, cell: Cell, baselines: Sequence[Cell]) -> Standing:
        rivals = [] if cell.recipe in BASELINES else baselines
        below = []
        for rival in sorted(rivals, key=lambda c: BASELINES.index(c.recipe)):
            gap = difference_of(cell.answers, rival.answers)
            value = (cell.share_correct or 0.0) - (rival.share_correct or 0.0)
            if (gap.value if gap else value) < 0:
                below.append((rival.recipe, bool(gap and gap.excludes_zero)))
        # `baselines` comes highest accuracy first.
        best = rivals[0] if rivals else None
        return Standing(
            cell,
            self.accuracy(cell),
            difference_of(cell.answers, self.untouched.answers) if self.untouched else None,
            best.recipe if best else None,
            difference_of(cell.answers, best.answers) if best else None,
            tuple(below),
        )

    def losses(self, cell: Cell, task: str | None = None) -> Losses | None:
        """What a cell lost and gained against the untouched model, in one task or in all."""
        if self.untouched is None:
            return None
        pairs = [
            (before.correct, cell.answers[key].correct)
            for key, before in self.untouched.answers.items()
            if key in cell.answers and task in (None, before.task)
        ]
        if not pairs:
            return None
        held = sum(before for before, _ in pairs)
        lost = sum(before and not after for before, after in pairs)
        gained = sum(after and not before for before, after in pairs)
        return Losses(lost, held, gained, len(pairs) - held)

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


def read_results(folder: Path) -> Results:
    """Read run.json, cells.jsonl and answers.jsonl of a run, finished or not.

    Args:
        folder: the run folder. Files that a run has not written yet count as empty; of lines for
            the same cell or question the last one holds.

    Raises:
        ValueError: there is no such folder, it holds no run, or a line of it is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "run.json").write_text('{"model": "tiny"}')
        ...     read_results(Path(folder)).untouched is None
        True
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file() and not (folder / "cells.jsonl").is_file():
        raise ValueError(
            f"{folder} holds neither run.json nor cells.jsonl: give the folder that "
            "`foveate bench --out FOLDER` wrote."
        )
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        run = {}
    cells: dict[Key, Cell] = {}
    for row in read_lines(folder / "cells.jsonl"):
        key = cell_key(row)
        cells[key] = Cell(*key, data=row)
    for row in read_lines(folder / "answers.jsonl"):
        cell = cells.get(cell_key(row))
        # Answers of a cell that was cut off belong to no figure.
        if cell is not None and cell.error is None:
            identity = str(row["id"])
            cell.answers[identity] = Answer(
                identity,
                str(row.get("clip", identity)),
                str(row.get("task", "")),
                bool(row["correct"]),
                str(row.get("answer", "")),
            )
    return Results(run if isinstance(run, dict) else {}, cells)
