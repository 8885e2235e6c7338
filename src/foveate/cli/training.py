"""The `train` commands: progress while a model trains, and what it can do in the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from foveate.cli.options import Device, Json, checked_device
from foveate.cli.output import INTERRUPTED, command, err, out, plain_table, print_json, quiet
from foveate.errors import FoveateError

train_app = typer.Typer(
    help="Train what foveate ships, from nothing.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="Threads of the CPU; default: torch's own choice.",
        min=1,
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a training that was begun in --out.")
]
#: How to go on, said when a training is interrupted.
_RESUME = (
    "interrupted: go on from the last checkpoint in {folder} with the same command and --resume"
)


@train_app.callback()
def _group() -> None:
    """Train what foveate ships, from nothing."""


@train_app.command("embedded")
@command
@quiet()
def embedded_command(
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="New folder for checkpoints and the finished model."),
    ],
    size: Annotated[
        str, typer.Option("--size", help="tiny (for a look), small (for a CPU) or base (a GPU).")
    ] = "small",
    device: Device = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of the weights and of the clips.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Processes that make clips; default: 1 on CPU, all cores but one on a GPU.",
            min=0,
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    clips: Annotated[
        int, typer.Option("--clips", help="Held-out clips of the final evaluation.", min=1)
    ] = 1024,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train the small video LLM that answers when no model is named."""
    from foveate.training import EmbeddedTraining, size_named

    place = checked_device(device)
    began = time.perf_counter()
    training = EmbeddedTraining(
        size_named(size),
        output,
        device=place,
        seed=seed,
        workers=_workers(place) if workers is None else workers,
        clips=clips,
        resume=resume,
    )
    card = run_training(training, output, threads, quietly=as_json)
    if as_json:
        print_json({"folder": str(output), **card})
        return
    console = out()
    console.print(accuracy_table(card))
    spent = clock(time.perf_counter() - began)
    console.print(f"\nthe model is in [bold]{escape(str(output))}[/] ({spent}); use it with\n")
    for line in _uses(output):
        console.print(f"  {escape(line)}", soft_wrap=True)


def run_training(
    training: Any, folder: Path, threads: int | None, *, quietly: bool
) -> dict[str, Any]:
    """Train with progress on standard error; what stops it is said with how to go on."""
    if training.resume and (note := training.version_note()):
        print(f"warning: {note}", file=sys.stderr)
    try:
        with cpu_settings(threads), stages(not quietly) as tell:
            return training.run(tell)
    except KeyboardInterrupt:
        print(_RESUME.format(folder=folder), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except RuntimeError as error:  # out of memory, a full disk, a worker that was killed
        reason = next(iter(str(error).splitlines()), repr(error))
        raise FoveateError(f"{reason}; checkpoints so far are in {folder} (--resume)") from error


def _workers(device: str) -> int:
    """Making clips takes a CPU a fifth of the time of training on them; a GPU waits for them."""
    return max(1, (os.cpu_count() or 2) - 1) if device.startswith("cuda") else 1


def _uses(folder: Path) -> tuple[str, ...]:
    from foveate.checkpoints import EMBEDDED

    # The name alone would mean the model that ships with the package.
    name = f".{os.sep}{folder}" if str(folder) == EMBEDDED else str(folder)
    name = f'"{name}"' if " " in name else name
    return (
        f'foveate ask clip.mp4 "what color is the star?" --model {name}',
        f"foveate bench --model {name} --recipes holitom,divprune",
    )


@contextmanager
def cpu_settings(threads: int | None) -> Iterator[None]:
    """So many threads, and no denormal numbers, which some CPUs are very slow with."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


# -- progress -------------------------------------------------------------------------------------


class Pace:
    """How fast a stage goes, and what is left of it.

    Args:
        first: step that this run began with; steps of earlier runs say nothing about this one.
        now: time in seconds.
    """

    def __init__(self, first: int, now: float) -> None:
        self.first, self.began = first, now

    def at(self, done: int, total: int, now: float) -> str:
        """Steps per second and the time left, in words; empty before there is a step to time."""
        if done <= self.first or now <= self.began:
            return ""
        rate = (done - self.first) / (now - self.began)
        return f"{rate:.2f} steps/s, {clock((total - done) / rate)} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def fact_line(facts: dict[str, float]) -> str:
    """Loss, and the share of answers (of visual tokens in the first stage) that is right."""
    parts = [f"loss {facts['loss']:.3f}"] if "loss" in facts else []
    if "right" in facts:
        parts.append(f"answers {facts['right']:.1%} right")
    elif "kind" in facts:
        parts.append(f"visual tokens {facts['kind']:.1%} right")
    return ", ".join(parts)


@contextmanager
def stages(enabled: bool) -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """A bar per stage on standard error, or a line per report where that is no terminal."""
    paces: dict[str, Pace] = {}

    def words(stage: str, done: int, total: int, facts: dict[str, float]) -> tuple[str, str]:
        now = time.monotonic()
        pace = paces.setdefault(stage, Pace(done, now))
        return pace.at(done, total, now) if done < total else "", fact_line(facts)

    if not enabled:
        yield lambda *_: None
        return
    if not err().is_terminal:

        def print_report(stage: str, done: int, total: int, facts: dict[str, float]) -> None:
            parts = [f"{stage} {done}/{total}", *words(stage, done, total, facts)]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

        yield print_report
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=err()) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int, facts: dict[str, float]) -> None:
            said = ", ".join(part for part in words(stage, done, total, facts) if part)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, words="")
            bars.update(tasks[stage], completed=done, words=said)

        yield tell


# -- result ---------------------------------------------------------------------------------------


def accuracy_table(card: dict[str, Any]) -> Table:
    """Accuracy of each task: on the clip, on one of its frames alone, and without pictures."""
    accuracy = card["test"]["accuracy"]
    table = plain_table(f"held-out accuracy, {card['test']['clips']} clips")
    table.add_column("task")
    for view in accuracy:
        table.add_column(view, justify="right")
    for task in accuracy["clip"]:
        style = "bold" if task == "overall" else ""
        table.add_row(task, *(f"{rows[task]:.1%}" for rows in accuracy.values()), style=style)
    return table
