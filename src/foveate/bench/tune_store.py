"""The folder of a search: what is searched, every trial, and the best recipe so far.

`tune.json` says what is searched on what, `trials.jsonl` has a line for every finished trial in
their order, `states.safetensors` the untouched model's states, `best.json` the best recipe and
`table.md` all trials for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from foveate.bench.report_markdown import table
from foveate.bench.search import Trial
from foveate.bench.store import IDENTITY, VERSION, RunFolder, append_lines, repair_lines
from foveate.core import Recipe
from foveate.core._files import write_text

TRIALS, STATES, BEST, TABLE = "trials.jsonl", "states.safetensors", "best.json", "table.md"


class TuneFolder(RunFolder):
    """The files of one search, opened for writing by one process at a time with `with`."""

    document: ClassVar[str] = "tune.json"
    command: ClassVar[str] = "foveate tune"
    identity: ClassVar[Mapping[str, str]] = {
        **{key: name for key, name in IDENTITY.items() if key != "max_new_tokens"},
        "recipe": "recipe",
        "retain": "budget",
        "space": "ranges",
        "random": "number of random trials",
        "optimiser": "optimiser",
        "batch": "batch",
    }

    def begin(self, run: Mapping[str, Any]) -> list[Trial]:
        """Begin the search, or go on with it; gives the trials that are finished.

        Raises:
            ValueError: the folder holds another search; the message says what differs.
        """
        if not self._is_run():
            self._write_run({"version": VERSION, **run})
            return []
        self._compare(run)
        return [trial_of(row) for row in repair_lines(self.path / TRIALS)]

    def add(self, trial: Trial, run: Mapping[str, Any]) -> None:
        """Add a finished trial."""
        append_lines(self.path / TRIALS, [line_of(trial, run)])

    def states(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The untouched model's states: as they were kept, or made now and kept."""
        path = self.path / STATES
        if path.is_file():
            try:
                return load_file(path)["states"]
            except (SafetensorError, KeyError):
                pass  # cut off while it was written
        states_KD = make()
        save_file({"states": states_KD.contiguous()}, path)
        return states_KD


@dataclass(frozen=True, eq=False)
class TuneResult:
    """What a search found.

    Attributes:
        folder: its files.
        run: the content of tune.json.
        trials: in their order; the first is the recipe as it was given.
        recipe: the best one.
    """

    folder: Path
    run: dict[str, Any]
    trials: tuple[Trial, ...]
    recipe: Recipe

    @property
    def given(self) -> Trial:
        """The recipe as it was given."""
        return self.trials[0]

    @cached_property
    def best(self) -> Trial:
        """The trial with the highest score, the earliest of equals."""
        return best_of(self.trials)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the run, the best recipe and every trial."""
        return {
            "folder": str(self.folder),
            **self.run,
            "best": {**line_of(self.best, self.run), "recipe": str(self.recipe)},
            "trials": [line_of(trial, self.run) for trial in self.trials],
        }

    def as_markdown(self) -> str:
        """All trials as a GitHub table, the best one bold."""
        names = sorted(self.run["space"])
        rows = []
        for trial in self.trials:
            score = f"{trial.score:.4f}"
            shown = [f"{trial.arguments[n]:.5g}" if n in trial.arguments else "" for n in names]
            score = f"**{score}**" if trial is self.best else score
            rows.append([str(trial.number), score, *shown, trial.how, trial.error or ""])
        head = (
            f"`{self.run['recipe']}` at {self.run['retain']:g} of the visual tokens on "
            f"{self.run['model']}: mean cosine between the last prompt token's final state in the "
            f"untouched and in the reduced model, {self.run['items']} samples."
        )
        return f"{head}\n\n{table(['trial', 'cosine', *names, 'how', 'error'], rows)}\n"

    def write(self) -> None:
        """Write the best recipe and the table."""
        write_text(self.folder / BEST, self.recipe.to_json() + "\n")
        write_text(self.folder / TABLE, self.as_markdown())

    def __str__(self) -> str:
        return (
            f"{self.recipe} at {self.run['retain']:g}: cosine {self.best.score:.4f} after "
            f"{len(self.trials) - 1} trials, {self.given.score:.4f} as given"
        )


def best_of(trials: tuple[Trial, ...] | list[Trial]) -> Trial:
    """The trial with the highest score, the earliest of equals."""
    return max(trials, key=lambda trial: (trial.error is None, trial.score, -trial.number))


def line_of(trial: Trial, run: Mapping[str, Any]) -> dict[str, Any]:
    """A trial as a line of trials.jsonl."""
    return {
        "trial": trial.number,
        "recipe": run["recipe"],
        "retain": run["retain"],
        "arguments": trial.arguments,
        "cosine": trial.score,
        "how": trial.how,
        "error": trial.error,
    }


def trial_of(row: Mapping[str, Any]) -> Trial:
    """A line of trials.jsonl as a trial."""
    return Trial(row["trial"], dict(row["arguments"]), row["cosine"], row["how"], row["error"])
