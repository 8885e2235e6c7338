"""One recipe at one budget, as the files of a run describe it.

Legend: nothing here is a tensor; accuracies and shares are fractions, times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from foveate.bench.stats import Interval, accuracy, difference
from foveate.bench.store import UNTOUCHED, Key
from foveate.core.report import StageReport, merge_layers


@dataclass(frozen=True)
class Answer:
    """One question as one cell answered it; `text` is the right answer."""

    id: str
    clip: str
    task: str
    correct: bool
    text: str = ""


@dataclass(frozen=True)
class Losses:
    """Questions against the untouched model: right there and wrong here, and back."""

    lost: int
    held: int
    gained: int
    missed: int

    @property
    def share(self) -> float | None:
        """Fraction of what the untouched model answers that is lost."""
        return self.lost / self.held if self.held else None


@dataclass(eq=False)
class Cell:
    """One recipe at one budget: its figures and its answers.

    Attributes:
        recipe: as text; "untouched" is the model without any.
        retain: fraction of visual tokens kept.
        figures: the line of cells.jsonl.
        answers: by question.
        plain: the untouched model on the same questions; None before it is finished, and of that
            model itself.
    """

    recipe: str
    retain: float
    figures: Mapping[str, Any]
    answers: dict[str, Answer] = field(default_factory=dict, repr=False)
    plain: Cell | None = field(default=None, repr=False)

    @property
    def key(self) -> Key:
        """What names the cell in the files."""
        return self.recipe, self.retain

    @property
    def error(self) -> str | None:
        """Why the recipe could not run, or None."""
        return self.figures.get("error") or None

    # -- accuracy -------------------------------------------------------------------------------

    @cached_property
    def accuracy(self) -> Interval | None:
        """Over all questions; None when the cell failed, without ends when its answers are gone."""
        counted = self.figures.get("correct", 0), self.figures.get("items", 0)
        return None if self.error else _accuracy(self.answers.values(), *counted)

    def task_share(self, task: str) -> float | None:
        """Fraction right of the questions of one task."""
        right, number = (self.figures.get("tasks") or {}).get(task) or (0, 0)
        return right / number if number else None

    @cached_property
    def tasks(self) -> dict[str, Interval]:
        """Accuracy by task."""
        found = {}
        for task, counted in (self.figures.get("tasks") or {}).items():
            rows = [answer for answer in self.answers.values() if answer.task == task]
            found[task] = None if self.error else _accuracy(rows, *counted)
        return {task: interval for task, interval in found.items() if interval is not None}

    @cached_property
    def difference(self) -> Interval | None:
        """Paired difference to the untouched model; None for that model itself."""
        return None if self.plain is None else self.against(self.plain)

    @cached_property
    def task_differences(self) -> dict[str, Interval]:
        """The same by task."""
        if self.plain is None:
            return {}
        found = {task: self.against(self.plain, task) for task in self.tasks}
        return {task: interval for task, interval in found.items() if interval is not None}

    def against(self, other: Cell, task: str | None = None) -> Interval | None:
        """Accuracy minus that of `other` over the questions that both answered."""
        pairs = self._pairs(other, task)
        if not pairs:
            return None
        right = [[answer.correct for answer in side] for side in zip(*pairs, strict=True)]
        return difference(right[0], right[1], [mine.clip for mine, _ in pairs])

    def losses(self, task: str | None = None) -> Losses | None:
        """What is lost and gained against the untouched model, in one task or in all."""
        pairs = [] if self.plain is None else self._pairs(self.plain, task)
        if not pairs:
            return None
        held = sum(before.correct for _, before in pairs)
        lost = sum(before.correct and not after.correct for after, before in pairs)
        gained = sum(after.correct and not before.correct for after, before in pairs)
        return Losses(lost, held, gained, len(pairs) - held)

    def _pairs(self, other: Cell, task: str | None) -> list[tuple[Answer, Answer]]:
        return [
            (answer, other.answers[key])
            for key, answer in self.answers.items()
            if key in other.answers and task in (None, answer.task)
        ]

    # -- costs ----------------------------------------------------------------------------------

    @property
    def flops_fraction(self) -> float | None:
        """FLOPs as a fraction of the same call without reduction."""
        flops = self.figures.get("flops") or {}
        whole, reduced = flops.get("untouched"), flops.get("reduced")
        return reduced / whole if whole and reduced is not None else None

    @property
    def first_token(self) -> float | None:
        """Median seconds to the first token."""
        return (self.figures.get("first_token") or {}).get("median")

    @property
    def first_token_ratio(self) -> float | None:
        """Time to the first token as a multiple of the untouched model's.

        Against the untouched model in the same minutes where the run measured that.
        """
        beside = (self.figures.get("first_token_untouched") or {}).get("median")
        plain = self if self.recipe == UNTOUCHED else self.plain
        base = beside or (plain and plain.first_token)
        return self.first_token / base if self.first_token is not None and base else None

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Median seconds per question by stage, from the file to the answer; empty in old runs."""
        found = self.figures.get("stage_seconds")
        return found if isinstance(found, dict) else {}

    @property
    def file_to_first_token(self) -> float | None:
        """Seconds from a file to the first token: all stages but the rest of the answer."""
        seconds = self.stage_seconds
        return sum(seconds.values()) - seconds.get("answer", 0.0) if seconds else None

    @property
    def visual_per_layer(self) -> float | None:
        """Visual tokens in a layer of the language model, mean over layers and questions.

        What enters the language model says nothing of methods that act inside of it.
        """
        plain = (self if self.recipe == UNTOUCHED else self.plain) or self
        layers, whole = self.figures.get("layer_tokens"), plain.figures.get("layer_tokens")
        visual = plain.figures.get("visual_before")
        if not layers or not whole or visual is None or plain.recipe != UNTOUCHED:
            return None
        return sum(layers) / len(layers) - (whole[0] - visual)

    def stage_rows(self) -> list[Mapping[str, Any]]:
        """Mean tokens before and after every stage; consecutive layers of one method in one row."""
        return merge_layers(
            [
                StageReport(
                    s["stage"], s.get("method", ""), (s["before"],), (s["after"],), s.get("layer")
                )
                for s in self.figures.get("stages") or []
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures and their intervals [value, low, high] as plain data."""
        return {
            **self.figures,
            "accuracy": self.accuracy and self.accuracy.as_list(),
            "difference": self.difference and self.difference.as_list(),
            "task_accuracy": {task: i.as_list() for task, i in self.tasks.items()},
            "task_difference": {task: i.as_list() for task, i in self.task_differences.items()},
        }


def _accuracy(answers: Iterable[Answer], correct: float, items: int) -> Interval | None:
    """From single answers with an interval; where they are gone, the fraction alone."""
    given = list(answers)
    if given:
        return accuracy([a.correct for a in given], [a.clip for a in given])
    return Interval(correct / items) if items else None
