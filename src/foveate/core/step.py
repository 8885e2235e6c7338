"""One method of a recipe, and how it is read from text and from documents."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from foveate.core.budget import Budget
from foveate.core.card import STAGES, Stage
from foveate.core.method import Method
from foveate.core.registry import get_method
from foveate.errors import RecipeError

#: What a recipe says of a step beside the method's own arguments.
_OF_STEPS = ("retain", "tokens", "default", "share")
_TERM = re.compile(r"^\s*(\w+)\s*(\(.*\))?\s*(?:@\s*([a-z,\s]+))?\s*$", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One method of a recipe.

    Attributes:
        method: the configured method.
        stages: the stages it acts at here (a subset of what it can).
        budget: its own budget; None takes its part of the call's, or the default.
        default: fraction kept where a call gives no budget; None: the method's published default.
        share: how large that part is beside the other methods'; 2 goes twice the way of 1.

    Raises:
        RecipeError: no stage, one at which the method does not act, or no such share or default.

    Example:
        >>> str(Step(get_method("tome")(r=8), ("encoder",), Budget(retain=0.5)))
        'tome(r=8, retain=0.5)'
    """

    method: Method
    stages: tuple[Stage, ...]
    budget: Budget | None = None
    share: float = 1.0
    default: float | None = None

    def __post_init__(self) -> None:
        if self.default is not None:
            self._check_default()
        if isinstance(self.share, bool) or not isinstance(self.share, int | float):
            raise RecipeError(f"{self.method.name}: share must be a number, got {self.share!r}.")
        if not 0 < self.share < math.inf or (self.budget is not None and self.share != 1):
            raise RecipeError(
                f"{self.method.name}: share must be above 0, and stands for a budget of the "
                f"method's own, not beside one; got share={self.share!r}."
            )
        missing = [stage for stage in self.stages if stage not in self.method.stages()]
        if missing or not self.stages:
            raise RecipeError(
                f"{self.method.name} acts at {', '.join(self.method.stages())}, "
                f"not at {', '.join(missing) or 'no stage'}."
            )
        if self.budget == Budget():
            # "No budget" would read as "the default" once written down; what it means is all.
            object.__setattr__(self, "budget", Budget(retain=1.0))

    def _check_default(self) -> None:
        name, value = self.method.name, self.default
        if self.budget is not None:
            raise RecipeError(
                f"{name}: default={value!r} would never hold beside a budget of the method's own; "
                "give one of them."
            )
        try:
            if not isinstance(value, int | float):
                raise ValueError(f"it must be a number in (0, 1], got {value!r}.")
            Budget(retain=value)
        except ValueError as error:
            raise RecipeError(f"{name}: default is what it keeps: {error}") from error

    @property
    def reduces(self) -> bool:
        """Whether it takes tokens away at any of its stages, or only changes attention."""
        return bool(set(self.stages) & set(self.method.reducing_stages()))

    def __str__(self) -> str:
        arguments = [f"{name}={value!r}" for name, value in self.method.arguments().items()]
        if self.budget is not None:
            amount = "retain" if self.budget.retain is not None else "tokens"
            arguments.append(f"{amount}={getattr(self.budget, amount)!r}")
        if self.default is not None:
            arguments.append(f"default={self.default!r}")
        if self.share != 1:
            arguments.append(f"share={self.share!r}")
        text = self.method.name + (f"({', '.join(arguments)})" if arguments else "")
        return text if self.stages == self.method.stages() else f"{text}@{','.join(self.stages)}"


def fields_of(cls: type[Method]) -> list[str]:
    """Hyper-parameters of a method."""
    return [spec.name for spec in dataclasses.fields(cls) if spec.init]


def split_terms(text: str) -> list[str]:
    """The terms of "a + b(c=1)", cut at every + outside brackets and quotes."""
    terms, depth, current, quote = [], 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "+" and depth == 0 and not quote:
            terms.append(current)
            current = ""
        else:
            current += character
    return [*terms, current]


def parse_term(term: str) -> Step:
    """The step that "name(argument=value)@stage" describes."""
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
            if not isinstance(node, ast.Call) or node.args:
                raise ValueError("no argument=value pairs")
            names = Counter(keyword.arg for keyword in node.keywords)
            if None in names or any(count > 1 for count in names.values()):
                raise ValueError("an argument without name or twice")
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except (SyntaxError, ValueError) as error:
            raise RecipeError(
                f"Cannot read the arguments {call} of {name}; write argument=value pairs with "
                "plain values."
            ) from error
    chosen = [part.strip() for part in stages.split(",")] if stages else None
    return _make_step(name, chosen, arguments)


def step_from_json(entry: dict[str, Any], document: dict[str, Any]) -> Step:
    """The step that an entry of a recipe document describes."""
    name, arguments = entry["method"], entry.get("arguments") or {}
    if not isinstance(arguments, dict):
        raise RecipeError(f"The arguments of {name} must be an object, got {arguments!r}.")
    warn_unknown(entry, ("method", "stages", "arguments", *_OF_STEPS), name, document)
    known = fields_of(get_method(name))
    warn_unknown(arguments, known, name, document)
    arguments = {key: value for key, value in arguments.items() if key in known}
    arguments |= {key: entry[key] for key in _OF_STEPS if entry.get(key) is not None}
    return _make_step(name, entry.get("stages"), arguments)


def warn_unknown(
    entry: dict[str, Any], known: Iterable[str], what: str, document: dict[str, Any]
) -> None:
    """Warn about keys of a document that this version does not know."""
    unknown = sorted(set(entry) - set(known))
    if unknown:
        writer = document.get("foveate", "an unknown version")
        warnings.warn(
            f"This version does not know {', '.join(unknown)} of {what} and leaves it out; the "
            f"recipe was written by foveate {writer}.",
            stacklevel=4,
        )


def _make_step(name: str, stages: list[str] | None, arguments: dict[str, Any]) -> Step:
    cls = get_method(name)
    budget = None
    if {"retain", "tokens"} & set(arguments):
        budget = Budget(arguments.pop("retain", None), arguments.pop("tokens", None))
    share, default = arguments.pop("share", 1.0), arguments.pop("default", None)
    try:
        method = cls(**_tuples(arguments))
    except TypeError as error:
        fields = ", ".join(fields_of(cls)) or "none"
        raise RecipeError(f"{name}: {error}. Its arguments: {fields}.") from error
    unknown = [stage for stage in stages or () if stage not in STAGES]
    if unknown:
        raise RecipeError(f"Unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}.")
    if stages is None:
        return Step(method, cls.stages(), budget, share, default)
    return Step(method, tuple(stage for stage in STAGES if stage in stages), budget, share, default)


def _tuples(value: Any) -> Any:
    # JSON has no tuples, and frozen methods must stay hashable.
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
