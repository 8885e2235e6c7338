"""The page of the behaviour suite: what it says of a record, and that the stored one is current."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foveate.core.registry import _BUILTIN
from tiny import TINY_FAMILIES

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "attach"))
from method_table import METHOD_TABLE  # noqa: E402

PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
RENEW = "renew the page: make matrix"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "compatibility", ROOT / "scripts/compatibility.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compatibility", module)
    spec.loader.exec_module(module)
    return module


def line(method: str, family: str, prop: str = "acts", **facts: Any) -> dict[str, Any]:
    place = ["a.py", 2 if prop == "acts" else 1]
    known = {"kind": "test", "method": method, "family": family, "property": prop, "place": place}
    return {**known, "variant": {}, "outcome": "passed", "seconds": 0.1, **facts}


@pytest.fixture
def run(script: ModuleType) -> Any:
    both = {"image": ["decoder", "projector"], "video": ["projector", "decoder"]}
    tests = [
        line("all", "a", acted=both),
        line("all", "a", "beams"),
        line("all", "b", acted={"image": [], "video": ["projector", "decoder"]}),
        line("all", "b", "beams", outcome="failed"),
        line("half", "a", acted=both),
        line("half", "b", acted={"image": ["decoder"]}),
        line("some", "a", acted={"image": ["cache"], "video": ["encoder", "projector", "cache"]}),
        line("some", "a", "beams", refused="no beams here"),
        line("some", "b", refused="not on b"),
        line("idle", "a", acted={"image": [], "video": []}),
        line("idle", "b", acted={"image": []}),
    ]
    return script.Run({}, tests, {})


def test_families_show_what_a_method_does(script: ModuleType, run: Any) -> None:
    table, notes = script.families_table(run).split("\n\n")
    cells = {row.split("`")[1]: row.split(" | ")[1:3] for row in table.splitlines()[2:]}
    assert cells["all"] == ["●", "**✗**<sup>1</sup>"]
    assert cells["half"] == ["●", "◐<sup>2</sup>"]
    assert cells["idle"] == ["○<sup>3</sup>", "○<sup>4</sup>"]
    assert cells["some"] == ["◐<sup>5</sup>", "✕<sup>6</sup>"]
    nothing = "Changes nothing: it acts on videos alone; this model"
    assert notes.splitlines() == [
        "1. Fails: beams.",
        "2. Acts at decoder only.",
        f"3. {nothing} sees the frames of a video as images.",
        f"4. {nothing} takes no videos.",
        "5. Acts on images at cache, on videos at encoder, projector and cache.",
        "6. not on b",
    ]


def test_properties_show_where_they_fail(script: ModuleType, run: Any) -> None:
    assert run.properties == ["beams", "acts"]  # in the order of the source
    listed, table, notes = script.properties_table(run).split("\n\n")
    assert listed.splitlines()[0] == "1. beams (tests: 3, families: 2)"
    cells = {row.split("`")[1]: row.split(" | ")[1:] for row in table.splitlines()[2:]}
    assert [cell.strip(" |") for cell in cells["all"]] == ["**✗**<sup>1</sup>", "●"]
    assert [cell.strip(" |") for cell in cells["some"]] == ["✕<sup>2</sup>", "●"]
    assert [cell.strip(" |") for cell in cells["idle"]] == ["", "○"]
    assert notes.splitlines() == ["1. Fails on b; holds on 1 families.", "2. no beams here"]


def test_a_run_in_parts_counts_its_last_results(script: ModuleType, tmp_path: Path) -> None:
    files = []
    parts = [
        [line("all", "a", outcome="failed"), line("all", "b")],
        [line("all", "a"), line("all", "a", variant={"beams": 3})],
    ]
    for number, tests in enumerate(parts):
        head = {"kind": "run", "command": f"pytest part{number}", "date": "2026-01-01"}
        end = {"kind": "end", "passed": 2, "failed": 0, "seconds": 1.5}
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in [head, *tests, end]))
    run = script.Run.read(*files)
    assert [test["outcome"] for test in run.tests] == ["passed"] * 3
    assert run.head["command"] == "pytest part0\npytest part1" and run.end["seconds"] == 3


def test_records_of_stopped_runs_are_refused(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "matrix.jsonl"
    file.write_text(json.dumps({"kind": "run"}) + "\n" + json.dumps(line("all", "a")) + "\n")
    with pytest.raises(ValueError, match="not the record of a whole run"):
        script.Run.read(file)


SUITE = """
import pytest
from matrix_record import note

@pytest.mark.behaviour("acts")
@pytest.mark.parametrize("family", ["a", "b"])
@pytest.mark.parametrize("name", ["one"])
def test_acts(name, family, request):
    if family == "b":
        note(request, refused="not here")
        return
    note(request, acted={"image": ["cache"]})

@pytest.mark.behaviour("holds")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "family"), [("one", "a")])
def test_holds(name, family, beams):
    assert beams == 1

def test_of_something_else():
    pass
"""


@pytest.mark.parametrize("options", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_a_run_is_recorded(script: ModuleType, tmp_path: Path, options: list[str]) -> None:
    """What the tests found out, in this process or in others."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = behaviour\n")
    file = tmp_path / "matrix.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "matrix_record", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, "--record-matrix", str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 4 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    run = script.Run.read(file)
    assert run.end["passed"] == 4 and run.end["failed"] == 1
    assert [test["outcome"] for test in run.of(property="holds")] == ["passed", "failed"]
    assert [test["variant"] for test in run.of(property="holds")] == [{"beams": 1}, {"beams": 3}]
    assert run.of(family="a", property="acts")[0]["acted"] == {"image": ["cache"]}
    assert run.of(family="b")[0]["refused"] == "not here"
    assert run.properties == ["acts", "holds"] and len(run.tests) == 4
    assert "matrix.jsonl" in run.head["command"] and str(tmp_path) not in run.head["command"]


def test_the_stored_page_has_every_method_and_family_and_no_failure() -> None:
    header, *rows = [row for row in PAGE.splitlines() if row.startswith("| ")]
    tables = [row for row in PAGE.splitlines() if row.startswith("| [`")]
    named = [row.split("`")[1] for row in tables]
    # Once in each of the two tables; those that run on no family are named before them.
    here = [name for name in _BUILTIN if METHOD_TABLE[name].families]
    assert sorted(named) == sorted([*here, *here]), RENEW
    for name in set(_BUILTIN) - set(here):
        assert f"[`{name}`](methods/{name}.md)" in PAGE.partition("| ")[0], RENEW
    families = next(row for row in [header, *rows] if row.startswith("| Method | "))
    assert set(families.replace("<br>", "_").split(" | ")[1:-1]) == set(TINY_FAMILIES), RENEW
    assert "none failed" in PAGE and "✗" not in "".join(tables), RENEW
