"""Which cells a run has: recipes times budgets, checked before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from foveate.bench.even_frames import EvenFrames
from foveate.bench.store import UNTOUCHED, Key
from foveate.core import BackboneMethod, Budget, Recipe, get_method, list_methods

#: What every recipe has to beat at the same budget.
BASELINES = ("random", "uniform", "pool", "even_frames")
#: Of these the last takes fewer frames; it runs where a recipe of the run chooses frames, too.
_OF_FRAMES = BASELINES[3:]


@dataclass(frozen=True)
class PlannedCell:
    """One recipe at one budget; `recipe` None is the untouched model."""

    name: str
    recipe: Recipe | None
    retain: float

    @property
    def key(self) -> Key:
        """What names the cell in the files."""
        return self.name, round(self.retain, 9)


def plan_cells(
    recipes: str | Iterable[str | Recipe], retain: float | Iterable[float], baselines: bool = True
) -> list[PlannedCell]:
    """The untouched model once, then every recipe at every budget, then the baselines.

    Args:
        recipes: recipes, or a text as in `split_recipes`; "all" is every registered method that
            reduces and needs no arguments.
        retain: fractions of visual tokens kept, in (0, 1].
        baselines: add random, uniform and pool where they are not named, and even_frames where a
            recipe chooses frames.

    Raises:
        UnknownMethodError: a recipe names a method that does not exist.
        RecipeError: a recipe cannot be read, or takes no budget.
        ValueError: there is no recipe or budget, or a budget is out of range.

    Example:
        >>> [cell.key for cell in plan_cells("fastv", [0.5], baselines=False)]
        [('untouched', 1.0), ('fastv', 0.5)]
    """
    budgets = [retain] if isinstance(retain, int | float) else list(dict.fromkeys(retain))
    if not budgets:
        raise ValueError("name at least one budget, for example retain=0.1.")
    parts = split_recipes(recipes) if isinstance(recipes, str) else list(recipes)
    if not parts:
        raise ValueError('name at least one recipe, for example "holitom", or all.')
    named: dict[str, Recipe] = {}
    made = [recipe for part in parts for recipe in _made(part)]
    if baselines:
        chosen = any(recipe.at("frames") for recipe in made)
        names = BASELINES if chosen else [n for n in BASELINES if n not in _OF_FRAMES]
        made += [recipe for name in names for recipe in _made(name)]
    for recipe in made:
        for budget in budgets:
            recipe.budgets(Budget(retain=budget))
        name = str(recipe)
        if recipe.positions != "auto":
            name += f" ({recipe.positions} positions)"
        named.setdefault(name, recipe)
    cells = [PlannedCell(UNTOUCHED, None, 1.0)]
    return cells + [
        PlannedCell(name, made, float(budget)) for name, made in named.items() for budget in budgets
    ]


def _made(part: str | Recipe) -> list[Recipe]:
    """The recipes that a name, a text or a recipe stands for."""
    if part == "all":
        return _all_methods()
    return [Recipe.of(EvenFrames() if part == EvenFrames.card.name else part)]


def split_recipes(text: str) -> list[str]:
    """Recipes between commas that stand outside of brackets and quotes.

    Example:
        >>> split_recipes('holitom, tome(retain=0.6, r=2)@encoder + holitom,,divprune')
        ['holitom', 'tome(retain=0.6, r=2)@encoder + holitom', 'divprune']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_budgets(text: str) -> list[float]:
    """Fractions between commas.

    Raises:
        ValueError: one is no number in (0, 1].

    Example:
        >>> parse_budgets("0.05, 0.1,1")
        [0.05, 0.1, 1.0]
    """
    budgets = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            budgets.append(float(part))
        except ValueError:
            raise ValueError(f"retain must be numbers in (0, 1], got {part!r}.") from None
        Budget(retain=budgets[-1])
    return budgets


def _all_methods() -> list[Recipe]:
    """Every method that reduces and runs with its defaults."""
    found = []
    for name in list_methods():
        try:
            get_method(name)
        except Exception as error:  # one broken plug-in must not take the others down with it
            warnings.warn(f"{name} is left out: {type(error).__name__}: {error}", stacklevel=2)
            continue
        recipe = Recipe.of(name)
        if isinstance(recipe.steps[0].method, BackboneMethod):
            continue  # it has a backbone of its own
        try:
            recipe.steps[0].method.check(None, None)
        except ValueError:
            continue  # it has to be told something about the prompt first
        if recipe.steps[0].reduces:  # a rule of attention has no budget to sweep over
            found.append(recipe)
    return found
