from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
av = pytest.importorskip("av")
sys.path.insert(0, str(Path(__file__).parents[1] / "view"))

from checkpoints import save_checkpoint  # noqa: E402

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "140")
    return partial(run, "bench")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two clips and five lines about them, two of which cannot be used."""
    folder = tmp_path_factory.mktemp("clips")
    for name, grey in (("one.mp4", 40), ("two.mp4", 120)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for number in range(8):
                picture = np.full((64, 96, 3), grey, np.uint8)
                picture[20:44, 8 * number : 8 * number + 24] = 210
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    what = {"question": "what is in the video", "options": ["house", "bike"], "answer": "B"}
    lines = [
        json.dumps({"video": "one.mp4", **what, "task": "what"}),
        json.dumps({"video": "two.mp4", **what, "task": "what"}),
        json.dumps({"video": "two.mp4", "question": "is it red", "answer": "no"}),
        "{",
        json.dumps({"video": "three.mp4", **what}),
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def arguments(model: Path, clips: Path, out: Path, *more: object) -> list[object]:
    fixed = ["--model", model, "--suite", clips, "--out", out, "--device", "cpu"]
    return [*fixed, "--frames", 4, "--repeats", 1, "--max-new-tokens", 2, *more]


def test_bench_prints_the_table_and_writes_the_folder(
    run: Run, model: Path, clips: Path, tmp_path: Path
) -> None:
    # There is no such layer in the model, so the second recipe fails.
    recipes = "tome(r=2)@encoder + holitom(tau=0.7, beta=0.5),fastv(layer=99)"
    options = arguments(model, clips, tmp_path / "out", "--recipes", recipes, "--retain", "0.3,1")
    code, out, err = run(*options)
    assert code == 0, err
    rows = [line.strip() for line in out.splitlines()]
    assert sum(row.startswith("tome(r=2) + holitom(") for row in rows) == 2
    assert sum(row.startswith("fastv(layer=99)") for row in rows) == 2
    assert sum(row.startswith(("random", "uniform", "pool")) for row in rows) == 6
    assert sum(row.startswith("untouched") for row in rows) == 1
    assert "3 questions about 2 clips, 4 frames" in out and "skipped: 2" in out
    assert "questions.jsonl:4: not JSON" in out and "the video three.mp4 does not exist" in out
    assert "layer = 99 does not exist" in err and out.count("failed") == 2
    assert "random at 0.3: " in err
    folder = tmp_path / "out"
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 11 and cells[0]["recipe"] == "untouched"
    assert (folder / "report.html").stat().st_size > 1000 and (folder / "table.md").exists()
    run_json = json.loads((folder / "run.json").read_text())
    assert len(run_json["skipped"]) == 2 and run_json["tasks"] == {"what": 2, "all": 1}
    # The same command again measures nothing.
    code, again, err = run(*options)
    assert code == 0 and err == "" and again == out


def test_bench_as_json_is_one_document(run: Run, model: Path, clips: Path, tmp_path: Path) -> None:
    more = ("-r", "fastv", "--retain", "0.5", "--tasks", "what", "--clips", 1, "--json")
    code, out, err = run(*arguments(model, clips, tmp_path / "out", *more))
    assert code == 0 and err == ""
    document = json.loads(out)
    assert document["run"]["items"] == 1 and document["run"]["suite_args"]["tasks"] == ["what"]
    cells = {cell["recipe"]: cell for cell in document["cells"]}
    assert set(cells) == {"untouched", "fastv", "random", "uniform", "pool"}
    assert cells["untouched"]["difference"] is None
    assert cells["fastv"]["accuracy"] == [cells["fastv"]["correct"], 0.0, 1.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipes", "holitim"), "No method is named 'holitim'. Did you mean holitom, hot?"),
        (("--recipes", "holitom(retain=0.5)"), "has a budget of its own"),
        (("--recipes", "holitom", "--retain", "5"), "must lie in (0, 1], got 5.0"),
        (("--recipes", "holitom", "--retain", "half"), "retain must be numbers in (0, 1]"),
        (("--recipes", "holitom", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("--recipes", "holitom", "--tasks", "why"), "no task why; tasks are what, all"),
        (("--recipes", "holitom", "--suite", "no/such"), "no such file or folder"),
        (("--recipes", "holitom", "--model", "./none"), "no such folder"),
        (("--recipes", "holitom", "--device", "gpu"), "the device 'gpu' cannot be used"),
    ],
)
def test_bench_explains_bad_input_in_one_line(
    run: Run, model: Path, clips: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    code, _, err = run(*arguments(model, clips, tmp_path / "out", *more))
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_another_run_is_refused(run: Run, model: Path, clips: Path, tmp_path: Path) -> None:
    options = arguments(model, clips, tmp_path / "out", "-r", "fastv", "--retain", "0.5")
    assert run(*options)[0] == 0
    code, _, err = run(*options, "--seed", 3)
    assert code == 2 and "holds a different run: seed (0 there, 3 here)" in err


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_interrupting_a_real_process_leaves_a_folder_that_goes_on(
    run: Run, model: Path, clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    budgets = ",".join(f"0.{n}" for n in range(100, 400))
    options = arguments(model, clips, out, "-r", "fastv", "--retain", budgets)
    command = [sys.executable, "-m", "foveate", "bench", *map(str, options)]
    # A suite started in the background ignores SIGINT, and so would its children.
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    deadline = time.monotonic() + 90
    while not (out / "cells.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and re.search("stopped; .* the same command goes on", err)
    lines = (out / "cells.jsonl").read_text().splitlines()
    assert 1 <= len([json.loads(line) for line in lines]) < 1201
    assert (out / "report.html").exists()
    # Fewer budgets of the same run: those that are finished stay.
    fewer = arguments(model, clips, out, "-r", "fastv", "--retain", "0.100,0.101")
    assert run(*fewer)[0] == 0
    assert (out / "cells.jsonl").read_text().startswith("\n".join(lines))


def test_long_clips_of_the_world(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    options = "--suite world-dense --minutes 0.15 --clips 1 --tasks order --frames 6 --repeats 1"
    code, out, err = run(
        *("-r", "f2c@frames", "--retain", 0.5, "-m", model, "-o", tmp_path / "out"),
        *options.split(),
        "--json",
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["run"]["suite"] == "world-dense"
    assert document["run"]["suite_args"]["seconds"] == 9
    cells = {cell["recipe"]: cell for cell in document["cells"]}
    assert {"untouched", "f2c@frames", "even_frames"} < cells.keys()
    assert all(cell["error"] is None for cell in cells.values())
    assert cells["f2c@frames"]["stage_seconds"]["choose"] > 0
    assert len(list((tmp_path / "cache" / "suites").glob("world-dense-*/clip-00000.mp4"))) == 1
    code, _, err = run(
        *("-r", "f2c", "-m", model, "-o", tmp_path / "other", "--minutes", 1, "--suite", "world")
    )
    assert code == 2 and "minutes are for world-needle" in err
