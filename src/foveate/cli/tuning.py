"""The `tune` command: searches the arguments of a recipe for a model and a budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from foveate.cli.options import Device, Json, checked_device, checked_dtype
from foveate.cli.output import command, err, out, print_json, progress, quiet

if TYPE_CHECKING:
    from foveate.bench.search import Trial
    from foveate.bench.suite import Suite
    from foveate.bench.tune_store import TuneResult


@command
@quiet()
def tune_command(
    recipe: Annotated[
        str,
        typer.Argument(
            help='What to tune: "vflowopt", "holitom(beta=0.6)", "a + b", or a recipe.json; '
            "arguments written into it stay.",
            show_default=False,
        ),
    ],
    retain: Annotated[
        float, typer.Option("--retain", help="Fraction of visual tokens kept, in (0, 1).")
    ] = 0.25,
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
            help='"world": generated clips of the training split; or a folder or .jsonl file of '
            "your own questions (answers are not read).",
        ),
    ] = "world",
    samples: Annotated[int, typer.Option("--samples", help="Questions.", min=1)] = 32,
    trials: Annotated[int, typer.Option("--trials", help="Arguments to try.", min=1)] = 300,
    random: Annotated[
        int, typer.Option("--random", help="So many of them are drawn at random first.", min=1)
    ] = 27,
    optimiser: Annotated[
        str,
        typer.Option(
            "--optimiser",
            help="gp: Gaussian process (foveate[tune]); local: steps away from the best; auto: gp "
            "where it is installed.",
        ),
    ] = "auto",
    frames: Annotated[int, typer.Option("--frames", help="Frames, taken evenly.", min=1)] = 16,
    batch: Annotated[int, typer.Option("--batch", help="Questions run together.", min=1)] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of the search, the world and draws.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the search; a stopped one goes on there."),
    ] = Path("tuned"),
    as_json: Json = False,
) -> None:
    """Search a recipe's arguments so that the model notices the reduction least."""
    from foveate.bench import tune

    def on_trial(trial: Trial, is_best: bool) -> None:
        if is_best and not as_json:
            err().print(f"[dim]{_line(trial)}[/]", soft_wrap=True)

    try:
        with progress(not as_json) as tell:
            result = tune(
                recipe,
                retain,
                _suite(suite, samples, frames, seed),
                out=output,
                model=model,
                samples=samples,
                trials=trials,
                random=random,
                optimiser=optimiser,
                frames=frames,
                batch=batch,
                seed=seed,
                device=checked_device(device),
                dtype=checked_dtype(dtype),
                progress=tell,
                on_trial=on_trial,
            )
    except KeyboardInterrupt:
        print(
            f"stopped; {output} holds what is finished, the same command goes on there",
            file=sys.stderr,
        )
        raise
    if as_json:
        print_json(result.as_dict())
    else:
        _print(result)


def _suite(name: str, samples: int, frames: int, seed: int) -> Suite:
    """The questions; generated ones are never those that `foveate bench` asks."""
    from foveate.bench.suite import FolderSuite, WorldSuite

    if name == "world":
        return WorldSuite(samples, frames=frames, seed=seed, split="train")
    return FolderSuite(name)


def _line(trial: Trial) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in trial.arguments.items())
    return escape(f"trial {trial.number} ({trial.how}): cosine {trial.score:.4f} {values}".strip())


def _print(result: TuneResult) -> None:
    from foveate.bench.tune_store import BEST, TABLE

    console, run = out(), result.run
    console.print(
        f"[bold]{escape(run['model'])}[/], {run['items']} samples, {len(result.trials) - 1} trials "
        f"of {escape(run['recipe'])} at {run['retain']:g}: mean cosine of the last prompt token's "
        f"final state [bold]{result.best.score:.4f}[/], {result.given.score:.4f} as given\n"
    )
    console.print(escape(str(result.recipe)), soft_wrap=True)
    console.print(
        f"\nall trials are in [bold]{escape(str(result.folder / TABLE))}[/]; measure the best "
        "recipe with\n"
    )
    best = escape(str(result.folder / BEST))
    console.print(f"  foveate bench --recipes {best} --retain {run['retain']:g}", soft_wrap=True)
