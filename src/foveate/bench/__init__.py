"""Accuracy against budget: recipes on a model and a suite of questions, with intervals.

Example:
    >>> from foveate.bench import WorldSuite, run_bench
    >>> result = run_bench("holitom,divprune", [0.1, 0.5], WorldSuite(clips=50), out="report")
    ...                                                                     # doctest: +SKIP
    >>> print(result)                                                       # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.bench.cells import Cell
    from foveate.bench.long_suite import LongWorldSuite
    from foveate.bench.matching import is_correct
    from foveate.bench.report import write_report
    from foveate.bench.results import BenchResult, read_result
    from foveate.bench.runner import run_bench
    from foveate.bench.stats import Interval, accuracy, difference, wilson
    from foveate.bench.suite import FolderSuite, Item, Suite, WorldSuite, open_suite
    from foveate.bench.tune_store import TuneResult
    from foveate.bench.tuning import tune

# Resolved at first use: help texts need neither torch nor transformers.
_LAZY = {
    "BenchResult": "foveate.bench.results",
    "Cell": "foveate.bench.cells",
    "FolderSuite": "foveate.bench.suite",
    "Interval": "foveate.bench.stats",
    "Item": "foveate.bench.suite",
    "LongWorldSuite": "foveate.bench.long_suite",
    "Suite": "foveate.bench.suite",
    "TuneResult": "foveate.bench.tune_store",
    "WorldSuite": "foveate.bench.suite",
    "accuracy": "foveate.bench.stats",
    "difference": "foveate.bench.stats",
    "is_correct": "foveate.bench.matching",
    "open_suite": "foveate.bench.suite",
    "read_result": "foveate.bench.results",
    "run_bench": "foveate.bench.runner",
    "tune": "foveate.bench.tuning",
    "wilson": "foveate.bench.stats",
    "write_report": "foveate.bench.report",
}

__all__ = [
    "BenchResult",
    "Cell",
    "FolderSuite",
    "Interval",
    "Item",
    "LongWorldSuite",
    "Suite",
    "TuneResult",
    "WorldSuite",
    "accuracy",
    "difference",
    "is_correct",
    "open_suite",
    "read_result",
    "run_bench",
    "tune",
    "wilson",
    "write_report",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'foveate.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
