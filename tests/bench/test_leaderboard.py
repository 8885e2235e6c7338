"""The leaderboard page and its picture, compared with the files of a run."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest
from bench_runs import BASELINES, BUDGETS, SMALL, TASKS, write_run

from foveate.bench import read_result

SCRIPT = Path(__file__).parents[2] / "scripts" / "leaderboard.py"
# Worse than random at small budgets, for certain.
WORST = ("worst", "projector", 3.5, 0.8)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leaderboard", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return write_run(folder, recipes=(*SMALL, WORST), failing=("quickvideo",))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    return tmp_path / "docs"


def tables(page: str) -> list[list[list[str]]]:
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        rows = [re.split(r" \| ", line[2:-2]) for line in block.splitlines()]
        assert len({len(row) for row in rows if set(row[0]) - set(": -")}) == 1
        found.append([rows[0], *rows[2:]])
    return found


def name_of(cell: str) -> str:
    return re.sub(r"\]\(.*\)$", "", cell).strip("[`*")


def number(text: str) -> float:
    found = re.match(r"[(*]*([+\u2212]?[\d.]+)", text)
    assert found, text
    return float(found[1].replace("\u2212", "-"))


def test_the_tables_have_the_figures_of_the_run(
    script: ModuleType, run: Path, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(run), "--docs", str(docs)]) == 0
    page = (docs / "leaderboard.md").read_text()
    rows = [json.loads(line) for line in (run / "cells.jsonl").read_text().splitlines()]
    cells = {(row["recipe"], row["retain"]): row for row in rows}
    ran = {name for name, *_ in (*SMALL, WORST)} - {"quickvideo"} | set(BASELINES)
    accuracy, *ranked, costs, at_10, at_20, failed = tables(page)
    assert len(ranked) == len(BUDGETS)
    assert {name_of(row[0]) for row in accuracy[1:]} == ran | {"untouched"}
    for row in accuracy[2:]:
        for budget, shown in zip(BUDGETS, row[1:], strict=True):
            cell = cells[name_of(row[0]), budget]
            assert number(shown) == pytest.approx(100 * cell["correct"] / cell["items"], abs=0.051)
    result = read_result(run)
    for budget, table in zip(BUDGETS, ranked, strict=True):
        assert f"<summary>{100 * budget:g} % of the visual tokens kept" in page
        standings = result.standings(budget)
        assert [name_of(row[1]) for row in table[1:]] == [s.cell.recipe for s in standings]
        for row, standing in zip(table[1:], standings, strict=True):
            for shown, gap in ((row[3], standing.cell.difference), (row[4], standing.to_baseline)):
                if gap is None:
                    assert shown.strip() == "" and standing.cell.recipe in BASELINES
                    continue
                assert number(shown) == pytest.approx(100 * gap.value, abs=0.051)
                assert shown.startswith("(") == (not gap.excludes_zero)
    for row in costs[2:]:
        cell = cells[name_of(row[0]), 0.05]
        share = 100 * cell["flops"]["reduced"] / cell["flops"]["untouched"]
        tokens, flops, times = row[1].split(" · ")
        assert number(tokens) == pytest.approx(sum(cell["layer_tokens"]) / 4 - 20, abs=0.06)
        assert number(flops) == pytest.approx(share, abs=0.51) and times.endswith("\u00d7")
    for budget, table in ((0.1, at_10), (0.2, at_20)):
        assert table[0] == ["recipe", *TASKS]
        for row in table[2:]:
            tasks = cells[name_of(row[0]), budget]["tasks"]
            for task, shown in zip(TASKS, row[1:], strict=True):
                assert number(shown) == pytest.approx(
                    100 * tasks[task][0] / tasks[task][1], abs=0.6
                )
    assert "needs encoder.cls_attention" in failed[1][2]
    for fact in ("embedded (LlavaOnevision", "AMD EPYC", "2026-03-14", "foveate bench --model"):
        assert fact in page


def test_losing_to_random_needs_evidence_and_an_explanation(
    script: ModuleType, run: Path, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = read_result(run)
    low = {
        cell.recipe
        for cell in result.cells
        for floor in [result.cell("random", cell.retain)]
        if cell.recipe in result.methods and floor and cell.accuracy and floor.accuracy
        if cell.accuracy.value < floor.accuracy.value
    }
    assert "worst" in low and "holitom" not in low
    script.main([str(run), "--docs", str(docs)])
    warned = re.findall(r"warning: (.*) is below random and not", capsys.readouterr().err)
    assert set(warned) == low
    page = (docs / "leaderboard.md").read_text()
    section = page.split("### worst\n")[1].split("\n#")[0]
    assert "*Not explained yet.*" in section
    pairs = [(result.cell("worst", b), result.cell("random", b)) for b in BUDGETS]
    gaps = {worst.retain: (worst.against(floor), worst, floor) for worst, floor in pairs}
    for budget, (gap, *_) in gaps.items():
        told = re.search(rf"\b{100 * budget:g} % kept: \(?(\u2212[\d.]+)", section)
        assert bool(told) == (gap.value < 0)
        if told:
            assert number(told[1]) == pytest.approx(100 * gap.value, abs=0.051)
    budget, (_, worst, floor) = min(gaps.items(), key=lambda item: item[1][0].value)
    lost = [t for t in TASKS if (g := worst.against(floor, t)) is not None and g.high < 0]
    named = re.search(rf"At {100 * budget:g} %, it loses to `random` on (.*?)\.\s", section)
    assert lost and named
    assert set(re.findall(r"(\w+) \u2212", named[1])) == set(lost)
    # Explained, it is no longer warned about; a note on what did not run is.
    (docs / "leaderboard-notes.toml").write_text(
        'worst = "It keeps the *corners*."\nnobody = "x"\n"holitom" = "It merges first."\n'
    )
    script.main([str(run), "--docs", str(docs)])
    told = capsys.readouterr().err
    assert "worst" not in told and "a note on nobody, which is not in the run" in told
    page = (docs / "leaderboard.md").read_text()
    assert "It keeps the *corners*." in page.split("### worst\n")[1].split("\n#")[0]
    assert "It merges first." in page.split("## Notes\n")[1]


def test_a_run_that_is_not_finished_is_refused(
    script: ModuleType, run: Path, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "cells.jsonl").read_text().splitlines(keepends=True)
    (run / "cells.jsonl").write_text("".join(lines[:-3]))
    assert script.main([str(run), "--docs", str(docs)]) == 2
    assert "error: 3 planned cells without a result yet" in capsys.readouterr().err
    assert list(docs.iterdir()) == []
    (docs / "leaderboard-notes.toml").write_text("worst = 3\n")
    assert script.main([str(run), "--docs", str(docs)]) == 2
    assert "worst must be text" in capsys.readouterr().err


def test_commands_are_shown_without_folders_of_the_machine(script: ModuleType) -> None:
    command = "foveate bench --model /data/me/models/tiny --recipes 'tome@encoder + holitom'"
    assert script.portable(command) == (
        "foveate bench --model tiny --recipes 'tome@encoder + holitom'"
    )


def test_the_picture_stands_alone_in_light_and_dark(
    script: ModuleType, run: Path, docs: Path
) -> None:
    script.main([str(run), "--docs", str(docs)])
    root = ET.parse(docs / "assets" / "leaderboard.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    css = "".join(root.find(f"{svg}style").itertext())
    defined = set(re.findall(r"(--[\w-]+):", css))
    assert set(re.findall(r"var\((--[\w-]+)\)", css)) <= defined
    assert "prefers-color-scheme: dark" in css
    text = (docs / "assets" / "leaderboard.svg").read_text()
    assert not re.search(r"url\(|@import|<script|href=", text)
    ran = {name for name, *_ in (*SMALL, WORST)} - {"quickvideo"} | set(BASELINES)
    drawn = [g.get("data-recipe") for g in root.iter(f"{svg}g") if g.get("data-recipe")]
    assert set(drawn) == ran and len(drawn) == len(ran)
    # Every class that is drawn is painted.
    used = {name for node in root.iter() for name in node.get("class", "").split()}
    unpainted = {name for name in used if f".{name}" not in css}
    assert {re.sub(r"\d+$", "", name) for name in unpainted} <= {
        *("grid", "tick", "curves", "s", "untouched")
    }
