"""Black-box search over arguments of methods: what to try next, given what was tried.

A proposal depends on the seed, its number and the trials before it alone, never on the state of a
running process: that is what lets a killed search go on exactly where it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from foveate.core import SearchRange
from foveate.errors import MissingDependencyError

Space = Mapping[str, SearchRange]
#: Standard deviations of local steps, as fractions of a range, one after the other.
_SCALES = (0.3, 0.15, 0.075, 0.0375, 0.01875)


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Attributes:
        number: 0 for the recipe as it was given, then 1, 2, ...
        arguments: what was tried, by key of the space; empty for trial 0.
        score: mean cosine to the untouched model.
        how: "given", "random", or the optimiser's name.
        error: why it could not run; the score is 0 then.
    """

    number: int
    arguments: dict[str, float] = field(default_factory=dict)
    score: float = 0.0
    how: str = "given"
    error: str | None = None


class Optimiser(Protocol):
    """Proposes arguments that promise a higher score."""

    @property
    def name(self) -> str:
        """Name and version, part of a search's identity."""
        ...

    def propose(self, space: Space, trials: Sequence[Trial], seed: int) -> dict[str, float]:
        """The arguments of trial number `len(trials)`."""
        ...


def random_point(space: Space, number: int, seed: int) -> dict[str, float]:
    """Arguments drawn evenly from their ranges.

    Example:
        >>> point = random_point({"alpha": SearchRange(0, 1)}, number=3, seed=0)
        >>> point == random_point({"alpha": SearchRange(0, 1)}, number=3, seed=0)
        True
    """
    unit = np.random.default_rng([seed, number]).random(len(space))
    return {name: space[name].at(float(u)) for name, u in zip(sorted(space), unit, strict=True)}


class LocalSearch:
    """Steps away from the best trial so far, wide and narrow ones in turn.

    Each step moves a random part of the arguments by a normal number; ranges end in mirrors.
    """

    name = "local"

    def propose(self, space: Space, trials: Sequence[Trial], seed: int) -> dict[str, float]:
        """Arguments near the best ones."""
        number, names = len(trials), sorted(space)
        rng = np.random.default_rng([seed, number, 1])
        tried = [trial for trial in trials if trial.arguments]
        if not tried:
            return random_point(space, number, seed)
        best = max(tried, key=lambda trial: (trial.score, -trial.number)).arguments
        unit = np.array([space[name].place(best[name]) for name in names])
        moved = rng.random(len(names)) < 0.5
        moved[rng.integers(len(names))] = True
        step = rng.normal(size=len(names)) * _SCALES[number % len(_SCALES)]
        unit = np.abs(np.where(moved, unit + step, unit)) % 2
        unit = np.where(unit > 1, 2 - unit, unit)
        return {
            name: space[name].at(float(u)) if move else best[name]
            for name, u, move in zip(names, unit, moved, strict=True)
        }


class GaussianProcess:
    """Optuna's Gaussian-process sampler, fitted anew to all trials for every proposal.

    Raises:
        MissingDependencyError: Optuna or SciPy is not installed.
    """

    def __init__(self) -> None:
        try:
            import optuna  # pyright: ignore[reportMissingImports]
            import scipy  # noqa: F401 - its sampler asks for it at the first proposal only
        except ImportError as error:
            raise MissingDependencyError(
                'the Gaussian process needs Optuna and SciPy: pip install "foveate[tune]"; or '
                'search with optimiser="local".'
            ) from error
        self._optuna: Any = optuna

    @property
    def name(self) -> str:
        """With Optuna's version, as another one may propose other points."""
        return f"gp (optuna {self._optuna.__version__})"

    def propose(self, space: Space, trials: Sequence[Trial], seed: int) -> dict[str, float]:
        """Arguments of the largest expected improvement."""
        optuna, names = self._optuna, sorted(space)
        ranges = {name: self._distribution(space[name]) for name in names}
        own_seed = int(np.random.SeedSequence([seed, len(trials), 2]).generate_state(1)[0])
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the sampler calls itself experimental
                sampler = optuna.samplers.GPSampler(
                    seed=own_seed, n_startup_trials=0, deterministic_objective=True
                )
                study = optuna.create_study(direction="maximize", sampler=sampler)
                study.add_trials(
                    optuna.trial.create_trial(
                        params=trial.arguments, distributions=ranges, value=trial.score
                    )
                    for trial in trials
                    if trial.arguments
                )
                found = study.ask(ranges).params
        finally:
            optuna.logging.set_verbosity(level)
        return {name: found[name] for name in names}

    def _distribution(self, found: SearchRange) -> Any:
        kinds = self._optuna.distributions
        if found.integer:
            return kinds.IntDistribution(int(found.low), int(found.high), log=found.log)
        return kinds.FloatDistribution(found.low, found.high, log=found.log)


def optimiser_named(name: str) -> Optimiser:
    """ "gp", "local", or "auto": the Gaussian process where Optuna is installed.

    Raises:
        ValueError: there is no such optimiser.
        MissingDependencyError: "gp" is asked for and not installed.
    """
    if name == "local":
        return LocalSearch()
    if name == "gp":
        return GaussianProcess()
    if name != "auto":
        raise ValueError(f'optimiser must be "auto", "gp" or "local", got {name!r}.')
    try:
        return GaussianProcess()
    except ImportError:
        return LocalSearch()
