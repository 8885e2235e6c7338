"""The page on long videos says what the run folders hold."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from foveate.bench import read_result
from foveate.core.timeline import TIMED_STAGES

sys.path.insert(0, str(Path(__file__).parent))
from bench_runs import write_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "long_videos_bench.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_videos_bench", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    recipes = (("even_frames", "projector", 1.8, 0.8), ("f2c", "projector", 0.3, 0.8))
    recipes += (("kffocus", "projector", 2.5, 0.8),)
    for seed, name in enumerate(script.RUNS):
        run = folder / name
        run.mkdir()
        tasks = ("what", "where", "reading")
        write_run(run, recipes=recipes, budgets=(0.0625, 0.25), tasks=tasks, clips=12, seed=seed)
        file = run / "cells.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["stage_seconds"] = dict(zip(TIMED_STAGES, (2.0, 0.5, 0.1, 0.05, 0.01), strict=True))
            row["layer_tokens"] = [1024 * row["retain"] + 20.0] * 4
            row["visual_before"] = 1024
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [["needle", 16, {"what": [19, 20], "where": [15, 20]}]]
    shown += [["needle", 1, {"what": [18, 20], "where": [11, 20]}]]
    (folder / "shown.json").write_text(json.dumps(shown))
    return folder


def test_rows_stand_beside_uniform_sampling_with_as_many_tokens(
    script: ModuleType, folder: Path
) -> None:
    page = script.page(folder)
    result = read_result(folder / "needle-5")
    start = page.index(script.TITLES["needle-5"])
    row = next(line for line in page[start:].splitlines() if line.startswith("| `f2c`"))
    cells = [part.strip() for part in row.strip("|").split("|")]
    for place, budget, frames, tokens in ((1, 0.25, 16, "256"), (5, 0.0625, 4, "64")):
        mine, even = result.cell("f2c", budget), result.cell("even_frames", budget)
        assert mine and even and mine.accuracy and even.accuracy
        gap = mine.against(even)
        assert gap is not None
        right = f"{100 * mine.accuracy.value:.1f} ± {100 * mine.accuracy.half:.1f}"
        said = gap.in_points("+", places=0)
        said = said if gap.excludes_zero else f"({said})"
        uniform = f"{100 * even.accuracy.value:.1f} ({frames} frames)"
        assert cells[place : place + 4] == [right, tokens, uniform, said]
    assert "| *even_frames* | 2.66 s | 2.00 s | 0.50 s |" in page.replace("0.500", "0.50")
    assert "| 1 of 16 | 90 | 55 |" in page
    for title in script.TITLES.values():
        assert f"## {title}\n\n60 questions about 12 clips." in page


def test_a_run_without_anything_to_compare_with_is_refused(
    script: ModuleType, folder: Path, tmp_path: Path
) -> None:
    for name in script.RUNS:
        (tmp_path / name).mkdir()
        for file in ("run.json", "cells.jsonl", "answers.jsonl"):
            (tmp_path / name / file).write_text((folder / name / file).read_text())
    (tmp_path / "shown.json").write_text((folder / "shown.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "dense" / "cells.jsonl").open()]

    def keep(wanted: list) -> None:
        text = "".join(json.dumps(row) + "\n" for row in wanted)
        (tmp_path / "dense" / "cells.jsonl").write_text(text)

    keep([row for row in rows if (row["recipe"], row["retain"]) != ("f2c", 0.25)])
    dense = script.page(tmp_path).partition(script.TITLES["dense"])[2]
    line = next(line for line in dense.splitlines() if line.startswith("| `f2c`"))
    assert line.count("\N{EN DASH}") == 4  # what is not measured yet is a dash
    keep([row for row in rows if row["recipe"] != "untouched"])
    with pytest.raises(ValueError, match="dense lacks the untouched model or even_frames"):
        script.page(tmp_path)


def test_events_that_are_shown_lie_where_they_are_said_to(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    items = list(script._shown_items("dense", 4, 2))
    assert [item.video.shape for item in items] == [(16, 128, 128, 3)] * 2
    assert {item.task for item in items} == {"direction", "order"}
