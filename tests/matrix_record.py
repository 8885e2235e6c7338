"""`--record-matrix FILE`: what the behaviour suite ran, one JSON line per finished test.

A test takes part through the marker `behaviour(property)`; `attach_suite.behaviour` sets it. What a
test finds out (a refusal, where a method acted) it adds with `note`. Reports carry both to the main
process, so that the file is the same with and without pytest-xdist. `scripts/compatibility.py`
draws the tables of docs/compatibility.md from it.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

KEY = "behaviour"


def note(request: pytest.FixtureRequest, **facts: Any) -> None:
    """Add plain data to the line of the running test."""
    for key, value in request.node.user_properties:
        if key == KEY:
            value.update(facts)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-matrix",
        type=Path,
        metavar="FILE",
        help="write what the behaviour suite found, for scripts/compatibility.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("record_matrix")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(MatrixRecorder(file))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give a behaviour test the properties of its line; other tests are left alone."""
    marker = item.get_closest_marker(KEY)
    if marker is None:
        return
    parameters = getattr(item, "callspec", None)
    given = dict(parameters.params) if parameters else {}
    facts = {"property": marker.args[0], "method": given.pop("name"), **marker.kwargs}
    facts["family"] = given.pop("family", None) or "llava_onevision"
    facts["place"] = [Path(item.location[0]).name, item.location[1]]
    facts["variant"] = {key: value for key, value in given.items() if _plain(value)}
    item.user_properties.append((KEY, facts))


def _plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


class MatrixRecorder:
    """Writes the lines; lives in the main process alone.

    Args:
        file: written anew; its folder must exist.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.began = time.perf_counter()

    def _command(self, arguments: Iterable[object]) -> str:
        """Of the run, files of this machine by their name alone."""
        texts = [str(argument) for argument in arguments]
        return shlex.join(
            ["pytest", *(Path(t).name if Path(t).is_absolute() else t for t in texts)]
        )

    def _write(self, mode: str, line: dict[str, Any]) -> None:
        with self.file.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        from foveate.core.hardware import hardware

        self._write(
            "w",
            {
                "kind": "run",
                "command": self._command(session.config.invocation_params.args),
                "date": datetime.now(UTC).date().isoformat(),
                **{name: version(name) for name in ("foveate", "torch", "transformers")},
                "python": platform.python_version(),
                "platform": sys.platform,
                "hardware": hardware("cpu"),
            },
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        for key, facts in report.user_properties:
            if key == KEY and isinstance(facts, dict):
                line = {"kind": "test", **facts, "outcome": report.outcome}
                self._write("a", {**line, "seconds": round(report.duration, 3)})

    def pytest_sessionfinish(self) -> None:
        seconds = round(time.perf_counter() - self.began, 1)
        self._write("a", {"kind": "end", **self.counts, "seconds": seconds})
