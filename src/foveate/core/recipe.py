"""Methods of different systems composed over the stages, under one budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveate.core._files import write_text
from foveate.core.budget import Budget
from foveate.core.card import STAGES, Stage
from foveate.core.grid import Grid
from foveate.core.joint import joint_budgets, refuse_conflicts
from foveate.core.method import Count, Method
from foveate.core.presets import PRESETS
from foveate.core.step import (
    Step,
    fields_of,
    parse_term,
    split_terms,
    step_from_json,
    warn_unknown,
)
from foveate.errors import RecipeError

Positions = Literal["auto", "compact", "original"]


@dataclass(frozen=True)
class Recipe:
    """An ordered set of methods.

    The budget of a call is what all methods behind the encoder leave together: two methods keep its
    square root each, "todre(share=2) + video_xl2" goes two thirds of the way at the first, and a
    method with a budget of its own ("divprune(retain=0.5)") is counted in. An encoder brings its
    tokens back for the projector, so a method inside it is apart: it keeps its own budget or its
    default. A method that only changes attention takes none. A budget of 1 switches all of them
    off. Without a budget of the call all keep their default: the published one, or the recipe's
    ("fastv(default=0.8)").

    Args:
        steps: the methods in the order in which they act within a stage.
        positions: "compact" renumbers a shortened prompt, "original" keeps gaps, "auto" follows
            the first projector method (always "original" with M-RoPE).

    Example:
        >>> recipe = Recipe.parse("tome(retain=0.6)@encoder + holitom(tau=0.65)")
        >>> [step.method.name for step in recipe]
        ['tome', 'holitom']
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    steps: tuple[Step, ...]
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        if not self.steps:
            raise RecipeError('A recipe needs at least one method, e.g. "holitom".')
        if self.positions not in ("auto", "compact", "original"):
            raise RecipeError(
                f'positions must be "auto", "compact" or "original", got {self.positions!r}.'
            )

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps))

    # -- reading and writing --------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        recipe: Recipe | Step | Method | str | Path | Iterable[Method | Step | str],
        **arguments: Any,
    ) -> Recipe:
        """A recipe from a recipe, a method, a text, a JSON file, or a list of methods and texts.

        Args:
            recipe: what to read. A `Path`, or a text that ends in .json, names a file.
            arguments: hyper-parameters, given to the methods that have them.

        Raises:
            RecipeError: it cannot be read, or an argument belongs to none of the methods.

        Example:
            >>> from foveate.core import get_method
            >>> str(Recipe.of(["tome(r=8)", get_method("fastv")()]))
            'tome(r=8) + fastv'
        """
        if isinstance(recipe, str | Path):
            is_file = isinstance(recipe, Path) or recipe.endswith(".json")
            made = cls.load(recipe) if is_file else cls.parse(str(recipe))
        elif isinstance(recipe, Recipe):
            made = recipe
        elif isinstance(recipe, Iterable) and not isinstance(recipe, type):
            made = cls(tuple(step for part in recipe for step in _steps(part)))
        else:
            made = cls(_steps(recipe))
        return made.with_arguments(**arguments) if arguments else made

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read "name(argument=value, retain=0.5)@stage + name": arguments and stages are optional.

        A name may also be that of a whole recipe, one of `PRESETS`; its positions come with it.

        Raises:
            RecipeError: the text is malformed, or a method does not act at the stage.
            UnknownMethodError: no method has that name.
        """
        steps: list[Step] = []
        positions: Positions = "auto"
        for term in split_terms(text):
            preset = PRESETS.get(term.strip())
            if preset is None:
                steps.append(parse_term(term))
            else:
                steps += cls.parse(preset.text).steps
                positions = preset.positions
        return cls(tuple(steps), positions)

    def with_arguments(self, **arguments: Any) -> Recipe:
        """A copy with hyper-parameters set on every method that has them.

        Raises:
            RecipeError: no method has one of the arguments.

        Example:
            >>> str(Recipe.parse("tome + holitom").with_arguments(beta=0.5))
            'tome + holitom(beta=0.5)'
        """
        used: set[str] = set()
        steps = []
        for step in self.steps:
            fields = fields_of(type(step.method))
            mine = {name: value for name, value in arguments.items() if name in fields}
            used |= set(mine)
            steps.append(dataclasses.replace(step, method=step.method.with_arguments(**mine)))
        unknown = sorted(set(arguments) - used)
        if unknown:
            known = sorted({f for step in self.steps for f in fields_of(type(step.method))})
            raise RecipeError(
                f"No method of this recipe has the argument {', '.join(unknown)}; "
                f"they have: {', '.join(known) or 'none'}."
            )
        return Recipe(tuple(steps), self.positions)

    def to_json(self) -> str:
        """The recipe as JSON text, with the version of the library that wrote it."""
        from foveate import __version__

        steps = [
            {
                "method": step.method.name,
                "stages": list(step.stages),
                "arguments": step.method.arguments(),
                "retain": None if step.budget is None else step.budget.retain,
                "tokens": None if step.budget is None else step.budget.tokens,
                "default": step.default,
                "share": step.share,
            }
            for step in self.steps
        ]
        document = {"foveate": __version__, "positions": self.positions, "steps": steps}
        return json.dumps(document, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote, also in another version.

        Keys and arguments that this version does not know are left out with a `UserWarning`.

        Raises:
            RecipeError: the text is not such a document.
            UnknownMethodError: no method has a name in it.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"This is not a recipe document: {error}.") from error
        entries = document.get("steps") if isinstance(document, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("method"), str) for entry in entries
        ):
            raise RecipeError(
                'This is not a recipe document: it must look like {"steps": [{"method": "tome"}]}.'
            )
        steps = tuple(step_from_json(entry, document) for entry in entries)
        warn_unknown(document, ("foveate", "positions", "steps"), "recipe", document)
        return cls(steps, document.get("positions", "auto"))

    def save(self, path: str | Path) -> None:
        """Write the recipe as a JSON file, whole or not at all.

        Raises:
            ValueError: the folder does not exist.
        """
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file.

        Raises:
            RecipeError: the file is missing or is not a recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"Cannot read the recipe {path}: it is not a text file.") from error
        except OSError as error:
            raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
        return cls.from_json(text)

    # -- budgets --------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages at which anything happens, in the order of data flow."""
        return tuple(stage for stage in STAGES if self.at(stage))

    def at(self, stage: Stage) -> list[int]:
        """Indices of the steps that act at `stage`, in order."""
        return [index for index, step in enumerate(self.steps) if stage in step.stages]

    def budgets(self, budget: Budget) -> tuple[Budget, ...]:
        """The budget of every step, given the budget of the call.

        Raises:
            RecipeError: two methods do not go together (with the reason), every method has a
                budget of its own, or what they have cannot make up the call's.

        Example:
            >>> Recipe.parse("tome(retain=0.6) + holitom").budgets(Budget(retain=0.1))
            (Budget(retain=0.6, tokens=None), Budget(retain=0.1, tokens=None))
        """
        refuse_conflicts(self.steps)
        return joint_budgets(self.steps, budget)

    def count(self, grid: Grid, budget: Budget) -> Count:
        """How many tokens of an item reach the language model, before anything runs.

        A bound when several methods act at the projector: each sees what the one before it left.

        Example:
            >>> Recipe.parse("divprune").count(Grid.image(24, 24), Budget(tokens=64))
            Count(tokens=64, exact=True)
        """
        budgets = self.budgets(budget)
        acting = [index for index in self.at("projector") if not budgets[index].is_full]
        counts = [self.steps[index].method.count(grid, budgets[index]) for index in acting]
        tokens = min([grid.num_tokens, *(counted.tokens for counted in counts)])
        return Count(tokens, all(counted.exact for counted in counts) and len(counts) <= 1)


def _steps(part: Any) -> tuple[Step, ...]:
    """The steps of a method, a step, a text or a recipe."""
    if isinstance(part, Method):
        return (Step(part, part.stages()),)
    if isinstance(part, Step):
        return (part,)
    if isinstance(part, str):
        return Recipe.parse(part).steps
    if isinstance(part, Recipe):
        return part.steps
    if isinstance(part, type) and issubclass(part, Method):
        raise RecipeError(f"{part.__name__} is a class; write {part.__name__}().")
    raise RecipeError(f"A recipe is made of methods and their names, got {part!r}.")
