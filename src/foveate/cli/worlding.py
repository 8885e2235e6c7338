"""The `world` command: generated clips with questions and ground truth, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from foveate._wording import duration
from foveate.cli.options import Json
from foveate.cli.output import command, out, print_json, progress


@command
def world_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="New folder to write to; with --minutes also one .mp4 or .mkv file."
        ),
    ],
    clips: Annotated[
        int | None,
        typer.Option("--clips", help="How many; default: 10.", min=1, show_default=False),
    ] = None,
    first: Annotated[int, typer.Option("--first", help="Number of the first clip.", min=0)] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the whole world.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    frames: Annotated[int, typer.Option("--frames", help="Frames per clip.", min=4)] = 16,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help="Pixels: one side, or HEIGHTxWIDTH such as 224x398; default: 256, of long clips "
            "128.",
            show_default=False,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            "--fps",
            help="Frames per second; default: 4, of long clips 8.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Tasks between commas: what, where, count, direction, order, when, reading, "
            "needle, change, moving; default: all. Of long clips: what, where, reading, count, "
            "direction, order; default: the first three.",
            show_default=False,
        ),
    ] = None,
    natural: Annotated[
        float,
        typer.Option("--natural", help="Fraction of natural backgrounds (needs foveate[demo])."),
    ] = 0.0,
    form: Annotated[str, typer.Option("--format", help="mp4, png or gif.")] = "mp4",
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="Long clips instead: quiet scenes with short events, each asked for.",
            show_default=False,
        ),
    ] = None,
    events: Annotated[
        int, typer.Option("--events", help="Events of a long clip, at most 3.", min=1, max=3)
    ] = 1,
    letterbox: Annotated[
        bool, typer.Option("--letterbox", help="Oblong long clips: black beside a square picture.")
    ] = False,
    masks: Annotated[
        bool, typer.Option("--masks", help="Write a mask of sprite ids for each frame, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write generated clips with exact questions and ground truth."""
    chosen = None if tasks is None else [part.strip() for part in tasks.split(",")]
    if minutes is not None:
        if frames != 16 or natural or form != "mp4" or masks:
            raise ValueError("--minutes goes without --frames, --natural, --format and --masks.")
        world = {"seed": seed, "split": split, "fps": 8.0 if fps is None else fps, "events": events}
        if chosen is not None:
            world["tasks"] = chosen
        sides, fit = _sides(size or "128"), "letterbox" if letterbox else "stretch"
        _write_long(folder, minutes, clips, first, world, {"size": sides, "fit": fit}, as_json)
        return
    if events != 1 or letterbox:
        raise ValueError("--events and --letterbox are for long clips: give --minutes, too.")
    from foveate.world import World
    from foveate.world.backgrounds import natural_pictures
    from foveate.world.export import export

    world = World(
        seed,
        split,  # pyright: ignore[reportArgumentType]  # checked there
        frames=frames,
        size=_sides(size or "256"),
        tasks=chosen,
        natural=natural,
        fps=4.0 if fps is None else fps,
    )
    if natural:
        natural_pictures()  # Says what to install before anything is written.
    clips = clips or 10
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


def _write_long(
    path: Path,
    minutes: float,
    clips: int | None,
    first: int,
    world: dict[str, Any],
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Long clips as a folder, or one as a file with its questions beside it."""
    from foveate.world.long import LongWorld
    from foveate.world.long_files import export_long, write_one

    made, single = LongWorld(60 * minutes, **world), path.suffix.lower() in (".mp4", ".mkv")
    if single and clips not in (None, 1):
        raise ValueError(f"{path} is one file; name a folder for {clips} clips.")
    with progress(not as_json) as tell:
        options["progress"] = lambda count, total: tell("write frames", count, total)
        if single:
            done = write_one(made.sample(first), path, **options)
        else:
            numbers = range(first, first + (clips or 10))
            done = export_long((made.sample(number) for number in numbers), path, **options)
    if as_json:
        print_json(done)
        return
    asked = ", ".join(f"{task} {count}" for task, count in done["tasks"].items())
    out().print(
        f"wrote {duration(done['seconds'])} of video in {_some(done['clips'], 'clip')} and "
        f"{_some(done['questions'], 'question')}: [bold]{escape(done['questions_file'])}[/]"
    )
    out().print(f"[dim]questions[/] {asked}")


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
