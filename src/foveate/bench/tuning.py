"""`tune`: search the arguments of a recipe so that a model notices the reduction least."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.bench.flow import InformationFlow, mean_cosine
from foveate.bench.identity import run_identity
from foveate.bench.inputs import Prompts
from foveate.bench.runner import Progress
from foveate.bench.search import Optimiser, Trial, optimiser_named, random_point
from foveate.bench.suite import Item, Suite, WorldSuite
from foveate.bench.tune_store import TuneFolder, TuneResult, best_of
from foveate.checkpoints import EMBEDDED, frame_side, load_model
from foveate.core import Budget, Method, Recipe, SearchRange, get_method, list_methods
from foveate.errors import FoveateError, RecipeError


def tune(
    recipe: str | Recipe,
    retain: float = 0.25,
    suite: Suite | None = None,
    *,
    out: str | Path,
    model: nn.Module | str | Path = EMBEDDED,
    processor: Any = None,
    model_name: str | None = None,
    space: Mapping[str, SearchRange] | None = None,
    samples: int = 32,
    trials: int = 300,
    random: int = 27,
    optimiser: str = "auto",
    frames: int = 16,
    batch: int = 16,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress = lambda what, done, total: None,
    on_trial: Callable[[Trial, bool], None] = lambda trial, is_best: None,
) -> TuneResult:
    """Search arguments that keep the last prompt token's final state closest to the untouched one.

    The objective is the mean cosine between both states over some questions; no answers are needed.
    The untouched model runs once, every trial is one forward per sample. Trials go to a folder as
    they are ready: a search that was stopped goes on there as if it had not been, and a larger
    `trials` adds to a finished one.

    Args:
        recipe: as in `foveate.reduce`. Arguments written into it stay as they are.
        retain: fraction of visual tokens kept, in (0, 1); settings are for this budget.
        suite: the questions; None: generated clips that the test suite does not hold.
        out: folder of the search.
        model: "embedded", a folder, a hub id, or a loaded model (then with `processor`).
        processor: of a loaded model.
        model_name: how the results call it.
        space: argument -> range; None: what the methods declare (`Method.search_space`).
        samples: questions, of as many clips as there are, tasks in turn.
        trials: evaluations beside the one of the recipe as it is given.
        random: the first so many of them are drawn at random.
        optimiser: "gp" (Gaussian process of Optuna), "local" (steps away from the best), or "auto":
            the first where it is installed.
        frames: frames taken evenly from every clip, at most all.
        batch: samples that run together.
        seed: of the search, and of methods that draw at random.
        device, dtype: of a model given by name; as in `foveate.checkpoints.load_model`.
        progress: told what is being done.
        on_trial: called with every trial once it is written, and whether it is the best so far.

    Returns:
        All trials and the best recipe, which lies in `out` as best.json, too.

    Raises:
        RecipeError: no argument of the recipe can be searched, or it takes no budget.
        AttachmentError: the recipe as given cannot act on the model.
        MissingDependencyError: "gp" is asked for and not installed.
        ValueError: a value is out of range, or `out` holds something else or another search.

    Example:
        >>> from foveate.bench import tune
        >>> found = tune("vflowopt", 0.25, out="tuned")                     # doctest: +SKIP
        >>> foveate.reduce(model, found.recipe, retain=0.25)                # doctest: +SKIP

    Source: VFlowOpt (arXiv 2508.05211), its search made general.
    """
    limits = {"samples": samples, "trials": trials, "frames": frames, "batch": batch}
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if random < 1:
        raise ValueError(f"random must be at least 1, so that there is a start, got {random}.")
    if not 0 < retain < 1:
        raise ValueError(f"retain must lie in (0, 1): at 1 nothing is reduced, got {retain}.")
    made = Recipe.of(recipe)
    made.budgets(Budget(retain=retain))
    ranges = search_space(made, retain) if space is None else _checked(made, space)
    found = optimiser_named(optimiser)
    folder = TuneFolder(out)
    if isinstance(model, nn.Module):
        if processor is None:
            raise ValueError(
                "a loaded model needs its processor; foveate.checkpoints.load_model gives both."
            )
        name, loaded = model_name or type(model).__name__, model
    else:
        progress("load the model", 0, 1)
        loaded, processor = load_model(model, device=device, dtype=dtype)
        name = model_name or str(model)
    suite = suite or WorldSuite(samples, frames=frames, seed=seed, split="train")
    chosen = some_of(suite.sized_for(frame_side(processor)), samples)
    progress("read the clips", 0, 1)
    prompts = Prompts(loaded, processor, chosen, frames)
    run = {
        **run_identity(loaded, name, prompts),
        "recipe": str(made),
        "retain": retain,
        "space": {key: dataclasses.asdict(value) for key, value in ranges.items()},
        "random": random,
        "optimiser": found.name,
        "frames": frames,
        "batch": batch,
        "seed": seed,
    }
    search = _Search(made, ranges, run, found, InformationFlow(loaded, prompts, batch, seed))
    with folder:
        finished = folder.begin(run)
        full_KD = folder.states(search.flow.states)
        try:
            while len(finished) <= trials:
                progress("search", len(finished), trials + 1)
                trial = search.next(finished, full_KD)
                folder.add(trial, run)
                finished.append(trial)
                is_best = best_of(finished) is trial
                if is_best:
                    search.result(folder.path, finished).write()
                on_trial(trial, is_best)
        finally:
            # What is there after Ctrl-C is worth a table, too.
            if finished:
                search.result(folder.path, finished).write()
    return search.result(folder.path, finished)


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
    """One search: makes trials out of those before."""

    recipe: Recipe
    space: Mapping[str, SearchRange]
    run: dict[str, Any]
    optimiser: Optimiser
    flow: InformationFlow

    def next(self, before: list[Trial], full_KD: torch.Tensor) -> Trial:
        """Evaluate the next point.

        Raises:
            FoveateError, ValueError: the recipe as given cannot run.
        """
        number, seed = len(before), self.run["seed"]
        if number == 0:
            return Trial(0, {}, self._score({}, full_KD), "given")
        if number <= self.run["random"]:
            how, arguments = "random", random_point(self.space, number, seed)
        else:
            how = self.optimiser.name.partition(" ")[0]
            arguments = self.optimiser.propose(self.space, before, seed)
        try:
            score, error = self._score(arguments, full_KD), None
        except (FoveateError, ValueError) as reason:
            # Arguments that do not go together are as bad as can be, and no reason to stop.
            score, error = 0.0, " ".join(str(reason).split())
        return Trial(number, arguments, score, how, error)

    def _score(self, arguments: Mapping[str, float], full_KD: torch.Tensor) -> float:
        made = with_values(self.recipe, arguments)
        return mean_cosine(full_KD, self.flow.states(made, self.run["retain"]))

    def result(self, folder: Path, trials: list[Trial]) -> TuneResult:
        """What is known by now."""
        best = with_values(self.recipe, best_of(trials).arguments)
        return TuneResult(folder, self.run, tuple(trials), best)


# -- space ----------------------------------------------------------------------------------------


def search_space(recipe: Recipe, retain: float) -> dict[str, SearchRange]:
    """The ranges that the methods of a recipe declare, without the arguments that it sets.

    An argument that several methods have is called "method.argument".

    Raises:
        RecipeError: nothing can be searched.

    Example:
        >>> search_space(Recipe.of("holitom(beta=0.5)"), 0.25)
        {'tau': SearchRange(low=0.5, high=1.0, integer=False, log=False)}
    """
    declared = []
    for step, budget in zip(recipe, recipe.budgets(Budget(retain=retain)), strict=True):
        share = retain if budget.retain is None else float(budget.fraction(1))
        fixed = step.method.arguments()
        ranges = step.method.search_space(share)
        declared.append({name: found for name, found in ranges.items() if name not in fixed})
    times = Counter(name for ranges in declared for name in ranges)
    space = {
        name if times[name] == 1 else f"{step.method.name}.{name}": found
        for step, ranges in zip(recipe, declared, strict=True)
        for name, found in ranges.items()
    }
    if not space:
        able = [n for n in list_methods() if get_method(n).search_space is not Method.search_space]
        raise RecipeError(
            f"{recipe} leaves nothing to search: its methods declare no ranges, or the recipe sets "
            f"every argument. Pass space={{...}}, or choose from {', '.join(able)}."
        )
    return space


def with_values(recipe: Recipe, values: Mapping[str, float]) -> Recipe:
    """A copy with the arguments of a trial.

    Example:
        >>> str(with_values(Recipe.of("holitom + fastv"), {"holitom.tau": 0.7, "beta": 0.5}))
        'holitom(tau=0.7, beta=0.5) + fastv'
    """
    steps = []
    for step in recipe:
        fields = {f.name for f in dataclasses.fields(step.method)}
        mine = {}
        for key, value in values.items():
            method, _, name = key.rpartition(".")
            if name in fields and method in ("", step.method.name):
                mine[name] = value
        steps.append(dataclasses.replace(step, method=step.method.with_arguments(**mine)))
    return dataclasses.replace(recipe, steps=tuple(steps))


def _checked(recipe: Recipe, space: Mapping[str, SearchRange]) -> dict[str, SearchRange]:
    """A space of the caller's own, every argument of which some method has."""
    if not space:
        raise ValueError("space names no argument.")
    for key in space:
        method, _, name = key.rpartition(".")
        owners = [step.method for step in recipe if method in ("", step.method.name)]
        if not any(name in {f.name for f in dataclasses.fields(owner)} for owner in owners):
            raise ValueError(f"no method of {recipe} has the argument {key!r}.")
    return dict(space)


# -- samples --------------------------------------------------------------------------------------


def some_of(suite: Suite, samples: int) -> Suite:
    """So many questions of a suite: of every clip one, tasks in turn, then the next of each."""
    clips: dict[str, list[Item]] = {}
    for item in suite:
        clips.setdefault(item.clip_id, []).append(item)

    def in_turn() -> Iterator[Item]:
        for turn in range(max(map(len, clips.values()), default=0)):
            for number, items in enumerate(clips.values()):
                if turn < len(items):
                    yield items[(number + turn) % len(items)]

    chosen = [item for item, _ in zip(in_turn(), range(samples), strict=False)]
    args = {**suite.args, "samples": samples}
    return Suite(suite.name, chosen, args=args, errors=suite.errors, lettered=suite.lettered)
