"""What a published system says about itself, as data: listings, documentation and defaults read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
        if not self.name.replace("_", "").isalnum() or self.name != self.name.lower():
            raise ValueError(
                f"A method name is lower case letters, digits and underscores, got {self.name!r}."
            )
        unknown = set(self.stages) - set(STAGES)
        if unknown or not self.stages:
            raise ValueError(
                f"{self.name}: stages must be some of {list(STAGES)}, got {list(self.stages)}."
            )
