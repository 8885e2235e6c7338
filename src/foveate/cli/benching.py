"""The `bench` command: checks its options, shows progress and prints the table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from foveate._wording import duration
from foveate.bench.cells import Cell
from foveate.bench.plan import parse_budgets, plan_cells
from foveate.bench.results import BenchResult
from foveate.bench.runner import run_bench
from foveate.bench.suite import open_suite
from foveate.cli.options import checked_dtype
from foveate.cli.output import err, out, plain_table, print_json, progress

_SHOWN = 10


@dataclass(frozen=True)
class Benching:
    """The options of one call, checked and run."""

    model: str
    recipes: str
    retain: str
    suite: str
    tasks: str | None
    clips: int | None
    minutes: float | None
    frames: int
    batch: int
    repeats: int
    max_new_tokens: int | None
    seed: int
    device: str
    dtype: str
    output: Path
    retry_failed: bool
    as_json: bool

    def run(self) -> None:
        """Measure every cell that the folder lacks, then print all of them.

        Raises:
            ValueError: an option is out of range.
        """
        dtype = checked_dtype(self.dtype)
        budgets = parse_budgets(self.retain)
        plan_cells(self.recipes, budgets)  # a misspelt recipe is found before anything is read
        tasks = (
            None if self.tasks is None else [t.strip() for t in self.tasks.split(",") if t.strip()]
        )
        suite = open_suite(
            self.suite,
            tasks=tasks,
            clips=self.clips,
            frames=self.frames,
            seed=self.seed,
            minutes=self.minutes,
        )
        with self._told() as (tell, on_cell):
            result = run_bench(
                self.recipes,
                budgets,
                suite,
                out=self.output,
                model=self.model,
                frames=self.frames,
                batch=self.batch,
                max_new_tokens=self.max_new_tokens,
                repeats=self.repeats,
                seed=self.seed,
                device=self.device,
                dtype=dtype,
                retry_failed=self.retry_failed,
                progress=tell,
                on_cell=on_cell,
            )
        if self.as_json:
            print_json(result.as_dict())
        else:
            _print(result)

    @contextmanager
    def _told(self) -> Iterator[tuple[Callable[..., None], Callable[..., None]]]:
        """A bar and a line per cell on standard error; what to do after an interruption."""

        def on_cell(line: Mapping[str, Any]) -> None:
            if not self.as_json:
                err().print(_cell_line(line), soft_wrap=True)

        try:
            with progress(not self.as_json) as tell:
                yield tell, on_cell
        except KeyboardInterrupt:
            print(
                f"stopped; {self.output} holds what is finished, the same command goes on there",
                file=sys.stderr,
            )
            raise


def _cell_line(line: Mapping[str, Any]) -> str:
    name = f"{escape(line['recipe'])} at {line['retain']:g}"
    if line["error"]:
        return f"[yellow]{name}: {escape(line['error'])}[/]"
    share = line["correct"] / line["items"]
    return f"[dim]{name}: {share:.1%} of {line['items']} in {duration(line['seconds'])}[/]"


def _print(result: BenchResult) -> None:
    console, run = out(), result.run
    console.print(
        f"[bold]{escape(run['model'])}[/] on {escape(run['suite'])}: {run['items']} questions "
        f"about {run['clips']} clips, {run['frames']} frames, {run['dtype']}, "
        f"{escape(run['hardware'])}\n"
    )
    console.print(_table(result))
    console.print(
        "\n[dim]accuracy in %, 95 % intervals over clips; difference in points, on the same "
        "questions; visual tokens, mean over the layers[/]"
    )
    for what, label in (("skipped", "skipped"), ("damaged", "decoded in part")):
        lines = run[what]
        if not lines:
            continue
        console.print(f"\n[yellow]{label}: {len(lines)}[/]")
        for line in lines[:_SHOWN]:
            console.print(f"[dim]  {escape(line)}[/]")
        if len(lines) > _SHOWN:
            console.print(f"[dim]  and {len(lines) - _SHOWN} more, see run.json[/]")
    page = result.folder / "report.html"
    console.print(f"\nwrote [bold]{escape(str(page))}[/]: open it in a browser")


def _table(result: BenchResult) -> Table:
    """Narrow enough for 80 columns; the page has the rest."""
    table = plain_table()
    table.add_column("recipe", style="bold", overflow="fold")
    for name in ("retain", "accuracy", "to untouched", "tokens", "FLOPs", "1st token"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for cell in result.ranking():
        if last is not None and cell.retain != last.retain:
            table.add_row()
        last = cell
        table.add_row(escape(cell.recipe), f"{cell.retain:g}", *_figures(cell))
    return table


def _figures(cell: Cell) -> list[str]:
    if cell.accuracy is None:
        return ["[yellow]failed[/]"]
    share, tokens, first = cell.flops_fraction, cell.visual_per_layer, cell.first_token
    return [
        escape(cell.accuracy.in_points(places=0)),
        "" if cell.difference is None else escape(cell.difference.in_points("+", places=0)),
        "" if tokens is None else f"{tokens:.0f}",
        "" if share is None else f"{share:.1%}",
        "" if first is None else duration(first),
    ]
