"""What the command prints: tables and progress for people, one JSON document for machines."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from foveate._wording import count, duration, flops
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.core import Recipe, Report

BAD_INPUT, INTERRUPTED = 2, 130


def out() -> Console:
    """The console of standard output, made anew so that redirections are seen."""
    return Console(highlight=False)


def err() -> Console:
    """The console of standard error: progress and errors."""
    return Console(stderr=True, highlight=False)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what went wrong into one line and an exit code; FOVEATE_DEBUG=1 shows the traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output (head, less) has gone; that is no error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (FoveateError, ValueError, OSError) as error:
            if os.environ.get("FOVEATE_DEBUG") == "1":
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None

    return wrapped


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and log lines, and warnings, while a command runs."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()


def print_json(document: Any) -> None:
    """One document on standard output."""
    print(json.dumps(document, indent=2))


@contextmanager
def progress(enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, gone when done; gives `tell(what, done, total)`."""
    if not enabled or not err().is_terminal:
        yield lambda what, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err(), transient=True) as bars:
        task = bars.add_task("", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield tell


def plain_table(title: str | None = None) -> Table:
    """A table without lines, its heads bold."""
    return Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )


def stage_table(report: Report, missing: list[tuple[str, str]] | None = None) -> Table:
    """Tokens before and after every stage; stages that could not run say so."""
    from foveate.core.report import merge_layers
    from foveate.view.html import whither

    table = plain_table()
    for name in ("stage", "method"):
        table.add_column(name)
    for name in ("before", "after", "kept"):
        table.add_column(name, justify="right")
    for row in merge_layers(report.stages):
        figures = (count(row["before"]), count(row["after"]), f"{row['retained']:.1%}")
        table.add_row(row["stage"], row["method"], *figures)
    for method, stage in missing or []:
        table.add_row(stage, method, "", "", "not run", style="dim")
    if report.items:
        figures = (count(report.visual_before), count(report.visual_after))
        table.add_row(
            f"[bold]{whither(report)}[/]", "", *figures, f"[bold]{report.retained:.1%}[/]"
        )
    return table


def facts(report: Report) -> Table:
    """FLOPs and times, one line each."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    untouched, reduced = report.flops.get("untouched", {}), report.flops.get("reduced", {})
    for part, before in untouched.items():
        if part != "total" and before:
            after = reduced.get(part, 0.0)
            share = "unchanged" if after == before else f"{after / before:.1%}"
            arrow = flops(before) if after == before else f"{flops(before)} -> {flops(after)}"
            table.add_row(f"[dim]compute, {part}[/]", f"{arrow} [dim]({share})[/]")
    if report.block_lengths:
        table.add_row("[dim]tokens by block[/]", ", ".join(map(count, report.block_lengths)))
    for name, seconds in report.seconds.items():
        table.add_row(f"[dim]time, {name}[/]", duration(seconds))
    return table


def segment_line(report: Report) -> str:
    """The segments of the first video that has some, in frames."""
    for item in report.items:
        found = item.segments
        if found:
            spans = ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in found)
            return f"{len(found)} (frames {spans})"
    return ""


def recipe_line(recipe: Recipe, report: Report) -> str:
    """What was run on what."""
    if not report.model:
        return f"[bold]{recipe}[/] had nothing to do: the budget keeps everything"
    return f"[bold]{recipe}[/] on {report.model}, {report.budget}"
