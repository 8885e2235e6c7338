"""Methods of different systems composed over the stages, under one budget."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveate.core.budget import Budget
from foveate.core.card import STAGES, Stage
from foveate.core.grid import Grid
from foveate.core.method import Count, Method
from foveate.core.registry import get_method
from foveate.errors import RecipeError

Positions = Literal["auto", "compact", "original"]
_TERM = re.compile(r"^\s*([a-z0-9_]+)\s*(\(.*\))?\s*(?:@\s*([a-z,\s]+))?\s*$", re.DOTALL)
#: The stage that a recipe's budget speaks of: the first of these that the recipe has.
_BUDGET_ORDER: tuple[Stage, ...] = ("projector", "decoder", "cache", "encoder")


@dataclass(frozen=True)
class Step:
    """One method of a recipe.

    Attributes:
        method: the configured method.
        stages: the stages it acts at here (a subset of what it can).
        budget: its own budget; None takes the recipe's or the method's default.
    """

    method: Method
    stages: tuple[Stage, ...]
    budget: Budget | None = None

    def __post_init__(self) -> None:
        missing = [stage for stage in self.stages if stage not in self.method.stages()]
        if missing or not self.stages:
            raise RecipeError(
                f"{self.method.name} acts at {', '.join(self.method.stages())}, "
                f"not at {', '.join(missing) or 'no stage'}."
            )

    def __str__(self) -> str:
        arguments = [f"{name}={value!r}" for name, value in self.method.arguments().items()]
        if self.budget is not None:
            amount = "retain" if self.budget.retain is not None else "tokens"
            arguments.append(f"{amount}={getattr(self.budget, amount)!r}")
        text = self.method.name + (f"({', '.join(arguments)})" if arguments else "")
        return text if self.stages == self.method.stages() else f"{text}@{','.join(self.stages)}"


@dataclass(frozen=True)
class Recipe:
    """An ordered set of methods.

    The budget of a call goes to one method: the one at the projector, else in the decoder, else at
    the cache, else in the encoder. Every other method keeps the budget written into the recipe
    ("tome(retain=0.6)") or its published default. A budget of 1 switches all of them off.

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
    def of(cls, recipe: Recipe | Method | str | Iterable[Method], **arguments: Any) -> Recipe:
        """A recipe from a recipe, a method, a list of methods, a text, or a path to a JSON file.

        Args:
            recipe: what to read.
            arguments: hyper-parameters, given to the methods that have them.

        Raises:
            RecipeError: it cannot be read, or an argument belongs to none of the methods.
        """
        if isinstance(recipe, Method):
            recipe = cls((Step(recipe, recipe.stages()),))
        elif isinstance(recipe, str):
            recipe = cls.load(recipe) if recipe.endswith(".json") else cls.parse(recipe)
        elif not isinstance(recipe, Recipe):
            methods = list(recipe)
            strange = [m for m in methods if not isinstance(m, Method)]
            if strange:
                raise RecipeError(f"A recipe is made of methods, got {strange[0]!r}.")
            recipe = cls(tuple(Step(m, m.stages()) for m in methods))
        return recipe.with_arguments(**arguments) if arguments else recipe

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read "name(argument=value, retain=0.5)@stage + name": arguments and stages are optional.

        Raises:
            RecipeError: the text is malformed, or a method does not act at the stage.
            UnknownMethodError: no method has that name.
        """
        return cls(tuple(_parse_term(term) for term in _split(text)))

    def with_arguments(self, **arguments: Any) -> Recipe:
        """A copy with hyper-parameters set on every method that has them."""
        used: set[str] = set()
        steps = []
        for step in self.steps:
            fields = step.method.__dataclass_fields__
            mine = {name: value for name, value in arguments.items() if name in fields}
            used |= set(mine)
            steps.append(Step(step.method.with_arguments(**mine), step.stages, step.budget))
        unknown = sorted(set(arguments) - used)
        if unknown:
            known = sorted({f for step in self.steps for f in step.method.__dataclass_fields__})
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
            }
            for step in self.steps
        ]
        document = {"foveate": __version__, "positions": self.positions, "steps": steps}
        return json.dumps(document, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            RecipeError: the text is not such a document.
        """
        try:
            document = json.loads(text)
            steps = tuple(_step_from_json(entry) for entry in document["steps"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecipeError(f"This is not a recipe document: {error!r}.") from error
        return cls(steps, document.get("positions", "auto"))

    def save(self, path: str | Path) -> None:
        """Write the recipe as a JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file.

        Raises:
            RecipeError: the file is missing or is not a recipe.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error

    # -- budgets --------------------------------------------------------------------------------

    def at(self, stage: Stage) -> list[int]:
        """Indices of the steps that act at `stage`, in order."""
        return [index for index, step in enumerate(self.steps) if stage in step.stages]

    def budgets(self, budget: Budget) -> tuple[Budget, ...]:
        """The budget of every step, given the budget of the call.

        Raises:
            RecipeError: several methods share the stage that the budget speaks of and none of them
                has a budget of its own.
        """
        if budget.is_full and budget.retain is not None:
            return tuple(Budget(retain=1.0) for _ in self.steps)
        free = [index for index, step in enumerate(self.steps) if step.budget is None]
        main: int | None = None
        if budget.retain is not None or budget.tokens is not None:
            for stage in _BUDGET_ORDER:
                candidates = [index for index in self.at(stage) if index in free]
                if len(candidates) > 1:
                    names = " and ".join(self.steps[i].method.name for i in candidates)
                    raise RecipeError(
                        f"{names} both act at the {stage}: write a budget of its own for all but "
                        f'one, e.g. "{self.steps[candidates[0]].method.name}(retain=0.5)".'
                    )
                if candidates:
                    main = candidates[0]
                    break
            if main is None:
                raise RecipeError(
                    f"Every method of {self} has a budget of its own; drop retain/tokens here."
                )
        return tuple(
            step.budget or (budget if index == main else Budget(retain=step.method.card.retain))
            for index, step in enumerate(self.steps)
        )

    def count(self, grid: Grid, budget: Budget) -> Count:
        """How many tokens of an item reach the language model, before anything runs."""
        tokens, exact = grid.num_tokens, True
        for index in self.at("projector"):
            step_budget = self.budgets(budget)[index]
            if step_budget.is_full:
                continue
            counted = self.steps[index].method.count(grid, step_budget)
            tokens, exact = min(tokens, counted.tokens), exact and counted.exact
        return Count(tokens, exact)


def _split(text: str) -> list[str]:
    terms, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "+" and depth == 0:
            terms.append(current)
            current = ""
        else:
            current += character
    return [*terms, current]


def _parse_term(term: str) -> Step:
    match = _TERM.match(term)
    if match is None:
        raise RecipeError(
            f'Cannot read {term.strip()!r} in a recipe; write "name", "name(argument=value)", '
            '"name@stage", joined by " + ".'
        )
    name, call, stages = match.groups()
    arguments: dict[str, Any] = {}
    if call:
        try:
            node = ast.parse(f"f{call}", mode="eval").body
            assert isinstance(node, ast.Call) and not node.args
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except (SyntaxError, ValueError, AssertionError) as error:
            raise RecipeError(
                f"Cannot read the arguments {call} of {name}; write argument=value pairs with "
                "plain values."
            ) from error
    chosen = [part.strip() for part in stages.split(",")] if stages else None
    return _make_step(name, chosen, arguments)


def _step_from_json(entry: dict[str, Any]) -> Step:
    arguments = dict(entry.get("arguments") or {})
    arguments |= {key: entry[key] for key in ("retain", "tokens") if entry.get(key) is not None}
    return _make_step(entry["method"], entry.get("stages"), arguments)


def _make_step(name: str, stages: list[str] | None, arguments: dict[str, Any]) -> Step:
    cls = get_method(name)
    budget = None
    if {"retain", "tokens"} & set(arguments):
        budget = Budget(arguments.pop("retain", None), arguments.pop("tokens", None))
    try:
        method = cls(**_tuples(arguments))
    except TypeError as error:
        fields = ", ".join(cls.__dataclass_fields__) or "none"
        raise RecipeError(f"{name}: {error}. Its arguments: {fields}.") from error
    unknown = [stage for stage in stages or () if stage not in STAGES]
    if unknown:
        raise RecipeError(f"Unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}.")
    chosen = cls.stages() if stages is None else tuple(s for s in STAGES if s in stages)
    return Step(method, chosen, budget)


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    # JSON has no tuples, and frozen methods must stay hashable.
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
