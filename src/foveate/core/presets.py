"""Recipes with names of their own: combinations found by a recorded search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from foveate.core.recipe import Recipe


@dataclass(frozen=True)
class Preset:
    """A named recipe; the name stands wherever a recipe can.

    Attributes:
        text: the recipe.
        positions: how a shortened prompt is numbered.
        summary: what it is for, in one sentence.
        claim: what was measured of it, on what; "" where docs/combined-recipes.md has only tables.

    Example:
        >>> from foveate.core import Recipe
        >>> name, preset = next(iter(PRESETS.items()))
        >>> Recipe.parse(name) == preset.recipe
        True
    """

    text: str
    positions: Literal["auto", "compact", "original"]
    summary: str
    claim: str = ""

    @property
    def recipe(self) -> Recipe:
        """The recipe itself."""
        from foveate.core.recipe import Recipe

        return Recipe(Recipe.parse(self.text).steps, self.positions)


#: Name -> recipe. What each is worth, and the search: docs/combined-recipes.md.
PRESETS: Mapping[str, Preset] = {
    "lean": Preset(
        "tome(retain=0.3) + divprune",
        "original",
        "Merges inside the vision encoder, then keeps the tokens of the prompt that differ most: "
        "for the tightest budgets.",
    ),
    "light": Preset(
        "tome(retain=0.3) + vidcom2",
        "original",
        "Merges inside the vision encoder, then keeps what is unlike its frame and its clip: for "
        "budgets of a tenth and more.",
    ),
    "fast": Preset(
        "centerclip(after=0.25, iterations=2, aggregate='mean', prop_attn=True, default=0.12)",
        "auto",
        "Joins the frames of a video inside the vision encoder: the fastest found that keeps 99 % "
        "of the embedded model's accuracy; its budget is that of the encoder.",
        "Keeps 99.4 % [99.1, 99.7] of it on 7,229 held-out questions that nothing was chosen by. "
        "From the file to the first token it takes 93 % of the time with one clip, 78 % with eight "
        "at once, 46 % on a larger model (processor time, 1 thread of Intel Xeon, 2026-11-23).",
    ),
    "two_step": Preset(
        "vidcom2 + lvlm_csp",
        "original",
        "For encoders that must stay whole: half of the way before the language model, half "
        "inside it.",
    ),
}
