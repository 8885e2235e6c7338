"""The options of the `bench` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Device, Json, checked_device
from foveate.cli.output import command, quiet


@command
@quiet()
def bench_command(
    recipes: Annotated[
        str,
        typer.Option(
            "--recipes",
            "-r",
            help='Recipes between commas: "holitom,divprune,tome@encoder + holitom"; "all": every '
            "method. random, uniform and pool always run, too.",
        ),
    ],
    retain: Annotated[
        str, typer.Option("--retain", help="Fractions of visual tokens kept, between commas.")
    ] = "0.05,0.1,0.2,0.5",
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help='"embedded", or folder or hub id of a vision-language model.'
        ),
    ] = "embedded",
    suite: Annotated[
        str,
        typer.Option(
            "--suite",
            help='"world": generated clips; "world-needle", "world-dense": long ones with short '
            "events; or a folder or .jsonl file of your own questions.",
        ),
    ] = "world",
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Only these tasks, between commas.", show_default=False),
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(
            "--clips",
            help="Clips; default: 100 of the world, 16 of its long ones, all of a folder.",
            min=1,
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="Length of long clips; default: 1 of world-needle, 0.1 of world-dense.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[int, typer.Option("--frames", help="Frames, taken evenly.", min=1)] = 16,
    batch: Annotated[int, typer.Option("--batch", help="Questions answered together.", min=1)] = 16,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Turns of the time measurement; 0: none.", min=0)
    ] = 5,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            help="Longest reply, in tokens; default: the longest option or answer and 8 more.",
            min=1,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the world and of random draws.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the results; a stopped run goes on there."),
    ] = Path("report"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure cells again that ended in an error.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy against budget: recipes, baselines and the untouched model."""
    from foveate.cli.benching import Benching

    Benching(
        model=model,
        recipes=recipes,
        retain=retain,
        suite=suite,
        tasks=tasks,
        clips=clips,
        minutes=minutes,
        frames=frames,
        batch=batch,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=checked_device(device),
        dtype=dtype,
        output=output,
        retry_failed=retry_failed,
        as_json=as_json,
    ).run()
