"""The commands; each reads its options and hands the work to a library function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from foveate._wording import plural
from foveate.cli.bench_options import bench_command
from foveate.cli.options import Device, Json, Recipe_, Retain, Tokens, checked_device
from foveate.cli.output import (
    command,
    err,
    facts,
    out,
    print_json,
    progress,
    quiet,
    recipe_line,
    segment_line,
    stage_table,
)
from foveate.cli.training_tasks import train_app
from foveate.cli.tuning import tune_command
from foveate.cli.watch_options import watch_command
from foveate.cli.worlding import world_command

app = typer.Typer(
    name="foveate",
    help="Fewer visual tokens for vision transformers and multimodal LLMs, and a picture of what "
    "was kept.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: list[str]) -> int:
    """Run the command with these arguments; returns the exit code."""
    try:
        app(arguments, prog_name="foveate")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        print(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before the command."""


@app.command("list")
@command
def list_command(
    pattern: Annotated[str, typer.Argument(help='Names to list, such as "*prune".')] = "*",
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            help="Only methods that act here: frames, patches, encoder, projector, decoder, cache.",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="Only training-free, trained or baseline methods, or recipe: named combinations.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods: where they act, what they do."""
    from foveate.cli.cards import cards, cards_table

    found, broken = cards(pattern, stage, kind)
    for name, reason in broken:
        err().print(f"warning: {name} cannot be loaded: {escape(reason)}", style="yellow")
    if as_json:
        print_json(found)
        return
    if not found:
        err().print(f"no method matches {escape(pattern)!r}; `foveate list` shows all")
        return
    out().print(cards_table(found))


@app.command("show")
@command
@quiet()
def show_command(
    video: Annotated[
        list[Path] | None,
        typer.Argument(help="Video to look at, or one or more pictures.", show_default=False),
    ] = None,
    recipe: Recipe_ = "holitom",
    retain: Retain = None,
    tokens: Tokens = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            help="Folder or hub id of a ViT, DeiT, DINOv2, CLIP or SigLIP; default: the embedded "
            "DINOv2-small.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[int, typer.Option("--frames", help="Frames, taken evenly.", min=1)] = 32,
    size: Annotated[
        int | None,
        typer.Option("--size", help="Pixels of the square frames are scaled to.", min=1),
    ] = None,
    pool: Annotated[
        bool | None,
        typer.Option(
            "--pool/--no-pool",
            help="Halve rows and columns before the projector stage, as LLaVA-OneVision does; "
            "default: for videos.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Where to write the picture; default: kept.html, with --json nowhere.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample", help="A clip that comes with foveate[demo]: bikes, bigbuckbunny, carphone."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For methods that draw at random.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw what a recipe keeps or merges of a clip or of pictures, on a real encoder."""
    from foveate.checkpoints import open_clip
    from foveate.core import Recipe
    from foveate.view.costs import stages_not_run
    from foveate.view.html import check_destination, save_report
    from foveate.view.several import show_pictures
    from foveate.view.show import show_video

    sources = _chosen(video, sample)
    name = Path(sources[0]).name if len(sources) == 1 else f"{len(sources)} pictures"
    target = output if output is not None else None if as_json else Path("kept.html")
    if target is not None:
        check_destination(target)
    made = Recipe.of(recipe)
    with progress(not as_json) as tell:
        tell("open the clip", 0, 1)
        options: dict[str, Any] = {
            "retain": retain,
            "tokens": tokens,
            "encoder": encoder,
            "frames": frames,
            "size": size,
            "pool": pool,
            "device": checked_device(device),
            "seed": seed,
            "progress": tell,
        }
        if len(sources) > 1:
            report = show_pictures(sources, made, **options)
        else:
            report = show_video(open_clip(sources[0]), made, **options)
        if target is not None:
            tell("write the report", 0, 1)
            save_report(report, target, title=f"{name}: what {made} kept")
    if as_json:
        shown = [str(source) for source in sources] if len(sources) > 1 else str(sources[0])
        document = report.as_dict() | {"video": shown, "html": target and str(target)}
        document["segments"] = report.items[0].segments
        document["not_run"] = [{"method": m, "stage": s} for m, s in stages_not_run(made)]
        print_json(document)
        return
    console = out()
    console.print(recipe_line(made, report))
    videos = [item for item in report.items if item.modality == "video"]
    lengths = [plural(len(item.grid.planes), "frame") for item in videos]
    console.print(f"[dim]{', '.join([escape(name), *lengths])}[/]\n")
    console.print(stage_table(report, stages_not_run(made)))
    console.print()
    lines = facts(report)
    if segments := segment_line(report):
        lines.add_row("[dim]segments[/]", segments)
    console.print(lines)
    for note in report.notes:
        console.print(f"[dim]note: {escape(note)}[/]")
    if target is not None:
        console.print(
            f"\nwrote [bold]{escape(str(target))}[/] ({_size(target)}): open it in a browser"
        )


@app.command("ask")
@command
@quiet()
def ask_command(
    video: Annotated[Path, typer.Argument(help="Video or picture.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Folder or hub id of a vision-language model; the embedded one knows nothing but "
            "the clips of `foveate world`.",
        ),
    ] = "embedded",
    recipe: Recipe_ = "holitom",
    retain: Retain = None,
    tokens: Tokens = None,
    frames: Annotated[
        int,
        typer.Option(
            "--frames", help="Frames: taken evenly, unless the recipe chooses them.", min=1
        ),
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.", min=1)
    ] = 128,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask the untouched model first, too.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the HTML report here.", show_default=False),
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(
            "--scorer",
            help="What tells recipes that choose frames how well each fits: self (the model's own "
            "yes), answer (how sure the model is of its answer), companion, or auto: the first "
            "of companion, self and answer that there is.",
        ),
    ] = "auto",
    companion: Annotated[
        str | None,
        typer.Option(
            "--companion",
            help="Folder or hub id of a CLIP or SigLIP: how well frames and patches fit the text.",
            show_default=False,
        ),
    ] = None,
    isolate: Annotated[
        bool,
        typer.Option(
            "--isolate", help="Decode in a process of its own, for files that cannot be trusted."
        ),
    ] = False,
    overlap: Annotated[
        bool | None,
        typer.Option(
            "--overlap/--no-overlap",
            help="Decode and encode while the language model reads earlier frames; default: where "
            "the answer stays the same.",
            show_default=False,
        ),
    ] = None,
    chunk: Annotated[
        int, typer.Option("--chunk", help="Frames that are read at a time then.", min=1)
    ] = 16,
    parts: Annotated[
        int | None,
        typer.Option(
            "--parts",
            help="First ask about so many parts of the video, then think of what they show.",
            min=1,
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a vision-language model about a clip."""
    from foveate.cli.asking import Asking

    Asking(
        video=video,
        question=question,
        model=model,
        recipe=recipe,
        budget={"retain": retain, "tokens": tokens},
        frames=frames,
        max_new_tokens=max_new_tokens,
        device=checked_device(device),
        dtype=dtype,
        compare=compare,
        output=output,
        as_json=as_json,
        scorer=scorer,
        companion=companion,
        isolate=isolate,
        overlap=overlap,
        chunk=chunk,
        parts=parts,
    ).run()


app.command("bench")(bench_command)
app.command("tune")(tune_command)
app.command("watch")(watch_command)
app.command("world")(world_command)
app.add_typer(train_app, name="train")


def _chosen(files: list[Path] | None, sample: str | None) -> Sequence[Path]:
    if bool(files) == (sample is not None):
        raise ValueError(
            "name a video or pictures, or a clip of ours with --sample (one of the two)."
        )
    if files:
        return files
    from foveate.video import sample_clip

    return [Path(sample_clip(str(sample)))]


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
