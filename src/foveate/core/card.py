"""What a published system says about itself, as data for listings, documentation and defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Stage = Literal["frames", "patches", "encoder", "projector", "decoder", "cache"]
STAGES: tuple[Stage, ...] = ("frames", "patches", "encoder", "projector", "decoder", "cache")
Kind = Literal["training-free", "trained", "baseline"]


@dataclass(frozen=True)
class Card:
    """The identity of one method.

    Attributes:
        name: registry name, lower case with underscores.
        title: the name the field uses.
        paper: title of the paper, or what the baseline does.
        arxiv: arXiv id, "" when there is none.
        year: of first publication.
        url: of the official code, "" when there is none.
        licence: of the official code; our code is written from the paper.
        stages: where it acts.
        kind: "training-free", "trained" or "baseline".
        summary: one sentence.
        defaults: published settings per model, as data.
        headline: published figures, each with what it was measured on (the paper's, not ours).
        notes: deviations and choices a user should know.
        positions: what happens to position ids of a shortened prompt by default.
        retain: the budget used when none is given.

    Raises:
        ValueError: name, stages, kind, positions or retain are not of those above.

    Example:
        >>> Card("thin", "Thin", "An example", ("decoder",), "baseline", "Keeps some.").retain
        0.25
    """

    name: str
    title: str
    paper: str
    stages: tuple[Stage, ...]
    kind: Kind
    summary: str
    arxiv: str = ""
    year: int = 0
    url: str = ""
    licence: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    positions: Literal["compact", "original"] = "compact"
    retain: float = 0.25

    def __post_init__(self) -> None:
        check_name(self.name)
        if isinstance(self.stages, str) or not self.stages or set(self.stages) - set(STAGES):
            raise ValueError(
                f"{self.name}: stages must be a tuple of some of {', '.join(STAGES)}, "
                f"got {self.stages!r}."
            )
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"{self.name}: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}."
            )
        if self.positions not in ("compact", "original"):
            raise ValueError(
                f'{self.name}: positions must be "compact" or "original", got {self.positions!r}.'
            )
        if not 0 < self.retain <= 1:
            raise ValueError(f"{self.name}: retain must lie in (0, 1], got {self.retain}.")


def check_name(name: str) -> None:
    """Raise `ValueError` unless `name` can stand in a recipe."""
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name):
        raise ValueError(
            f"A method name is lower case letters and digits, joined by single underscores, "
            f"got {name!r}."
        )
