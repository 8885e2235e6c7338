from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("typer")
sys.path.insert(0, str(Path(__file__).parents[1] / "view"))

from checkpoints import save_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "140")
    return partial(run, "tune")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A tiny model, and questions about two pictures."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for name in ("one", "two"):
        pixels = np.random.default_rng(len(lines)).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        lines.append(json.dumps({"video": f"{name}.png", "question": "what is", "answer": "a"}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    model = save_checkpoint("llava_onevision", tmp_path_factory.mktemp("model"))
    return [
        *("--model", model, "--suite", folder, "--device", "cpu", "--samples", 2),
        *("--random", 1, "--optimiser", "local"),
    ]


def test_tune_writes_a_recipe_and_goes_on(run: Run, fixed: list[object], tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    code, printed, told = run("vflowopt", "--retain", 0.4, "--trials", 1, "--out", out, *fixed)
    assert code == 0, told
    best = out / "best.json"
    assert f"foveate bench --recipes {best} --retain 0.4" in printed
    assert "trial 0 (given): cosine" in told and "as given" in printed
    code, printed, _ = run(
        "vflowopt", "--retain", 0.4, "--trials", 3, "--out", out, "--json", *fixed
    )
    found = json.loads(printed)
    assert code == 0 and [row["trial"] for row in found["trials"]] == [0, 1, 2, 3]
    assert json.loads(best.read_text())["steps"][0]["arguments"] == found["best"]["arguments"]
    code, _, told = run("vflowopt", "--retain", 0.5, "--out", out, *fixed)
    assert code == 2 and "holds a different run: budget" in told.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("divprune",), "nothing to search"),
        (("nosuch",), "No method is named"),
        (("vflowopt", "--retain", 1), "retain must lie in (0, 1)"),
        (("vflowopt", "--optimiser", "best"), "optimiser must be"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, fixed: list[object], tmp_path: Path, arguments: tuple, message: str
) -> None:
    code, printed, told = run(*fixed, *arguments, "--out", tmp_path / "none")
    assert (code, printed) == (2, "") and message in told and told.count("\n") == 1
    assert not (tmp_path / "none").exists()
