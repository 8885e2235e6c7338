"""`foveate train TASK`: small models on generated data, and what methods keep of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foveate.cli.options import Device, Json, checked_device
from foveate.cli.output import command, out, plain_table, print_json, quiet
from foveate.cli.training import (
    Resume,
    Threads,
    clock,
    cpu_settings,
    run_training,
    stages,
    train_app,
)

__all__ = ["train_app"]

#: What `--help` says of each task of `foveate.training.TASKS`, which would import torch.
TASK_SUMMARIES = {
    "shapes": "A ViT that classifies and segments pictures of shapes",
    "retrieval": "A small CLIP that finds clips by their captions",
    "poses": "A MixSTE that lifts poses of generated motion to 3D",
    "sequences": "A ViS4mer that reads the order of needles in long noise",
    "scan": "A Vision Mamba that finds a ring among other shapes",
}


def _add(name: str, summary: str) -> None:
    """One command for one task."""

    @command
    @quiet()
    def train_task(
        output: Annotated[
            Path, typer.Option("--out", "-o", help="New folder for checkpoints, weights and card.")
        ],
        size: Annotated[
            str, typer.Option("--size", help="tiny (for a look) or small (for two CPU cores).")
        ] = "small",
        device: Device = "auto",
        seed: Annotated[int, typer.Option("--seed", help="Of the weights and of the data.")] = 0,
        workers: Annotated[
            int, typer.Option("--workers", help="Processes that make batches ahead.", min=0)
        ] = 0,
        threads: Threads = None,
        resume: Resume = False,
        as_json: Json = False,
    ) -> None:
        from foveate.training import TaskTraining, make_task

        began = time.perf_counter()
        training = TaskTraining(
            make_task(name, size, seed),  # pyright: ignore[reportArgumentType]
            output,
            device=checked_device(device),
            workers=workers,
            resume=resume,
        )
        card = run_training(training, output, threads, quietly=as_json)
        _show(output, card, time.perf_counter() - began, as_json=as_json)

    train_task.__doc__ = f"{summary}."
    train_app.command(name)(train_task)


@train_app.command("measure")
@command
@quiet()
def measure_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished task.")],
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure the methods on a finished task once more, and renew its card."""
    from foveate.training import measure_again

    began = time.perf_counter()
    with cpu_settings(threads), stages(not as_json) as tell:
        card = measure_again(folder, tell, device=checked_device(device))
    _show(folder, card, time.perf_counter() - began, as_json=as_json)


def _show(folder: Path, card: dict[str, Any], seconds: float, *, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder), **card})
        return
    console = out()
    console.print(outcome_table(card))
    console.print(f"\nweights and card are in [bold]{escape(str(folder))}[/] ({clock(seconds)})")


def outcome_table(card: dict[str, Any]) -> Table:
    """What every method keeps of the trained model: a group of rows for every metric."""
    table = plain_table(f"{card['task']}, held-out data")
    table.add_column("recipe")
    for name in ("value", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    group = None
    for row in card["outcomes"]:
        if (row["on"], row["metric"]) != group:
            group = (row["on"], row["metric"])
            heading = ", ".join(filter(None, (row["metric"], row["on"])))
            table.add_row(f"[bold]{escape(heading)}[/]")
        flops = "" if row["flops"] is None else f"{100 * row['flops']:.1f} %"
        table.add_row(_indented(row["recipe"], 2), f"{row['value']:.2f}", flops)
        if row["bar"]:
            answer = "met" if row["met"] else "not met"
            table.add_row(_indented(f"asked: {row['bar']}: {answer}", 4, "dim"))
    return table


def _indented(text: str, columns: int, style: str = "") -> Padding:
    return Padding(Text(text, style), (0, 0, 0, columns))


for _name, _summary in TASK_SUMMARIES.items():
    _add(_name, _summary)
