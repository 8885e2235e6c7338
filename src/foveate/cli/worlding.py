"""The `world` command: generated clips with questions and ground truth, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from foveate.cli.options import Json
from foveate.cli.output import command, out, print_json, progress


@command
def world_command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write to.")],
    clips: Annotated[int, typer.Option("--clips", help="How many.", min=1)] = 10,
    first: Annotated[int, typer.Option("--first", help="Number of the first clip.", min=0)] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the whole world.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    frames: Annotated[int, typer.Option("--frames", help="Frames per clip.", min=4)] = 16,
    size: Annotated[
        str, typer.Option("--size", help="Pixels: one side, or HEIGHTxWIDTH such as 224x398.")
    ] = "256",
    fps: Annotated[float, typer.Option("--fps", help="Frames per second.")] = 4.0,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Tasks between commas: what, where, count, direction, order, when, reading, "
            "needle, change, moving; default: all.",
            show_default=False,
        ),
    ] = None,
    natural: Annotated[
        float,
        typer.Option("--natural", help="Fraction of natural backgrounds (needs foveate[demo])."),
    ] = 0.0,
    form: Annotated[str, typer.Option("--format", help="mp4, png or gif.")] = "mp4",
    masks: Annotated[
        bool, typer.Option("--masks", help="Write a mask of sprite ids for each frame, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write generated clips with exact questions and ground truth."""
    from foveate.world import World
    from foveate.world.backgrounds import natural_pictures
    from foveate.world.export import export

    world = World(
        seed,
        split,  # pyright: ignore[reportArgumentType]  # checked there
        frames=frames,
        size=_sides(size),
        tasks=None if tasks is None else [part.strip() for part in tasks.split(",")],
        natural=natural,
        fps=fps,
    )
    if natural:
        natural_pictures()  # Says what to install before anything is written.
    with progress(not as_json) as tell:
        done = export(
            (world.sample(index) for index in range(first, first + clips)),
            folder,
            form=form,  # pyright: ignore[reportArgumentType]  # checked there
            masks=masks,
            progress=lambda count: tell("write clips", count, clips),
        )
    if as_json:
        print_json(done)
        return
    asked = ", ".join(f"{task} {count}" for task, count in done["tasks"].items())
    console = out()
    console.print(
        f"wrote {_some(done['clips'], 'clip')} and {_some(done['questions'], 'question')} to "
        f"[bold]{escape(str(folder))}[/]"
    )
    console.print(f"[dim]questions[/] {asked}")
    console.print(f"[dim]look at[/] {escape(str(folder / 'overview.png'))}")


def _some(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _sides(text: str) -> int | tuple[int, int]:
    """Reads "256" and "224x398".

    Raises:
        ValueError: anything else.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--size is one side or HEIGHTxWIDTH in pixels, got {text!r}.")
    height, width = int(parts[0]), int(parts[-1])
    return height, width
