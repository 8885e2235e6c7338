"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

Recipe_ = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help='Methods to apply: "holitom", "tome(retain=0.6)@encoder + holitom", or a recipe.json.',
    ),
]
Retain = Annotated[
    float | None,
    typer.Option("--retain", help="Fraction of visual tokens kept, in (0, 1].", show_default=False),
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", help="Absolute number of tokens kept instead.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Device = Annotated[
    str, typer.Option("--device", help='Where to run: "auto", "cpu", "cuda", "cuda:1", "mps".')
]


def checked_device(name: str) -> str:
    """The device to run on, checked.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name!r} cannot be used here: {error}") from error
    return name


def checked_dtype(name: str) -> torch.dtype | None:
    """The type of a model's weights, checked; None leaves it to the device.

    Raises:
        ValueError: there is no such type.
    """
    import torch

    known = {
        "auto": None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(known)}.")
    return known[name]
