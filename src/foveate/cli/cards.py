"""Method cards and named recipes as rows and as data."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any, get_args

from rich.markup import escape
from rich.table import Table

from foveate.cli.output import plain_table
from foveate.core import PRESETS, get_method, list_methods
from foveate.core.card import STAGES, Card, Kind

#: The kind of a named recipe, beside those of methods.
RECIPE = "recipe"


def cards(
    pattern: str, stage: str | None, kind: str | None
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """What matches as plain data, methods first, and the methods that cannot be imported.

    Raises:
        ValueError: there is no such stage or kind.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}.")
    kinds = (*get_args(Kind), RECIPE)
    if kind is not None and kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(kinds)}.")
    found, broken = [], []
    for name in list_methods(pattern):
        try:
            card = get_method(name).card
        except Exception as error:  # one broken plug-in must not hide all other methods
            broken.append((name, f"{type(error).__name__}: {error}"))
            continue
        if (stage is None or stage in card.stages) and kind in (None, card.kind):
            found.append(_as_dict(card))
    for name, preset in PRESETS.items():
        stages = preset.recipe.stages
        if fnmatch(name, pattern) and kind in (None, RECIPE) and stage in (None, *stages):
            found.append(
                {
                    "name": name,
                    "kind": RECIPE,
                    "stages": list(stages),
                    "arxiv": "",
                    "summary": " ".join(filter(None, (preset.summary, preset.claim)))
                    + f" {preset.text}.",
                    "recipe": preset.text,
                    "positions": preset.positions,
                }
            )
    return found, broken


def cards_table(found: list[dict[str, Any]]) -> Table:
    """One row per method."""
    table = plain_table()
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("stages", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("arXiv", no_wrap=True, style="dim")
    table.add_column("what it does")
    for card in found:
        stages = ", ".join(card["stages"])
        summary = escape(card["summary"])
        table.add_row(card["name"], stages, card["kind"], card["arxiv"], summary)
    return table


def _as_dict(card: Card) -> dict[str, Any]:
    names = ("name", "title", "paper", "arxiv", "year", "url", "licence", "kind", "summary")
    data: dict[str, Any] = {name: getattr(card, name) for name in names}
    data["stages"] = list(card.stages)
    data["retain"] = card.retain
    data["headline"] = list(card.headline)
    data["notes"] = list(card.notes)
    data["defaults"] = dict(card.defaults)
    return data
