"""One recipe at one budget, as the files of a run describe it.

Legend: nothing here is a tensor; accuracies and shares are fractions, times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate.core.report import StageReport, merge_layers


@dataclass(frozen=True)
class Answer:
    """One question as one cell answered it."""

    id: str
    clip: str
    task: str
    correct: bool
    text: str = ""


@dataclass
class Cell:
    """One recipe at one budget: its figures and its answers by question."""

    recipe: str
    retain: float
    data: Mapping[str, Any]
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def error(self) -> str | None:
        """Why the recipe could not run, or None."""
        return self.data.get("error") or None

    @property
    def share_correct(self) -> float | None:
        """Fraction of the questions answered right."""
        number = self.data.get("items") or 0
        return (self.data.get("correct") or 0) / number if number else None

    @property
    def flops_fraction(self) -> float | None:
        """FLOPs as a fraction of the same call without reduction."""
        flops = self.data.get("flops") or {}
        whole, reduced = flops.get("untouched"), flops.get("reduced")
        return reduced / whole if whole and reduced is not None else None

    @property
    def first_token(self) -> float | None:
        """Median seconds to the first token."""
        return (self.data.get("first_token") or {}).get("median")

    @property
    def first_token_ratio(self) -> float | None:
        """Time to the first token as a multiple of the untouched model's in the same minutes."""
        mine, base = self.first_token, (self.data.get("first_token_untouched") or {}).get("median")
        return mine / base if mine is not None and base else None

    def task_accuracy(self, task: str) -> float | None:
        """Fraction right of the questions of one task."""
        right, number = (self.data.get("tasks") or {}).get(task) or (0, 0)
        return right / number if number else None

    def stage_rows(self) -> list[Mapping[str, Any]]:
        """Mean tokens before and after every stage; consecutive layers of one method in one row."""
        return merge_layers(
            [
                StageReport(
                    s["stage"], s.get("method", ""), (s["before"],), (s["after"],), s.get("layer")
                )
                for s in self.data.get("stages") or []
            ]
        )
