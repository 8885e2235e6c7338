"""The `watch` command and its options."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.options import Device, Retain, Tokens, checked_device
from foveate.cli.output import command, quiet


@command
@quiet()
def watch_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A file, an address (rtsp://..., https://...), a device with --format, or - for "
            "standard input.",
            show_default=False,
        ),
    ],
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    every: Annotated[
        float, typer.Option("--every", help="Seconds of the source between two answers.")
    ] = 10.0,
    answers: Annotated[
        int | None,
        typer.Option("--answers", help="Stop after so many.", min=1, show_default=False),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Folder or hub id of a LLaVA, Qwen2-VL or Qwen2.5-VL checkpoint; the embedded one "
            "knows nothing but the clips of `foveate world`.",
        ),
    ] = "embedded",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help='"videoscan", "divprune" or both joined by +; default: the most recent frames, '
            "whole.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option("--capacity", help="Frames that are remembered.", min=1, show_default=False),
    ] = None,
    retain: Retain = None,
    tokens: Tokens = None,
    fps: Annotated[float, typer.Option("--fps", help="Frames taken a second.")] = 1.0,
    growing: Annotated[
        bool, typer.Option("--growing", help="The file is being written: wait for more.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Longest silence of the source, in seconds.")
    ] = 30.0,
    behind: Annotated[
        str | None,
        typer.Option(
            "--behind",
            help="When the model is slower than the source: wait or drop_oldest; default: drop for "
            "addresses and devices.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", help="FFmpeg's name of the format: v4l2, hls, ...", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.", min=1)
    ] = 64,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per answer.")
    ] = False,
) -> None:
    """Watch a live source and answer a question again and again."""
    from foveate.cli.watching import Watching

    live = {"growing": growing, "timeout": timeout, "behind": behind, "format": format}
    Watching(
        source=source,
        question=question,
        every=every,
        answers=answers,
        model=model,
        recipe=recipe,
        stream={"capacity": capacity, "retain": retain, "tokens": tokens},
        live=live,
        fps=fps,
        max_new_tokens=max_new_tokens,
        device=checked_device(device),
        dtype=dtype,
        as_json=as_json,
    ).run()
