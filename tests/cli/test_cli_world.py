from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.cli import main
from foveate.world import World
from foveate.world.backgrounds import natural_pictures

pytest.importorskip("typer")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["world", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_options_reach_the_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--clips 2 --first 7 --seed 3 --split val --frames 5 --size 240x256 --fps 2"
    folder = tmp_path / "out"
    code, out, err = run(
        capsys, folder, *options.split(), "--tasks", "what, when", "--format", "png", "--json"
    )
    assert (code, err) == (0, "")
    world = World(3, "val", frames=5, size=(240, 256), tasks=("what", "when"), fps=2)
    samples = [world.sample(index) for index in (7, 8)]
    document = json.loads(out)
    assert document["clips"] == 2
    assert document["questions"] == sum(len(sample.questions) for sample in samples)
    for sample, name in zip(samples, ("clip-00007", "clip-00008"), strict=True):
        for frame in range(5):
            with Image.open(folder / name / f"frame-{frame:04d}.png") as picture:
                np.testing.assert_array_equal(np.asarray(picture), sample.frames_THWC[frame])
        truth = json.loads((folder / "truth" / f"{name}.json").read_text())
        assert (truth["name"], truth["fps"]) == (sample.name, 2)


def test_the_summary_says_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    monkeypatch.setenv("COLUMNS", "400")
    code, out, err = run(capsys, tmp_path / "out", "--clips", 1, "--size", 32, "--masks")
    assert (code, err) == (0, "")
    assert "wrote 1 clip and" in out and str(tmp_path / "out" / "overview.png") in out
    assert (tmp_path / "out" / "clip-00000.mp4").is_file()
    assert (tmp_path / "out" / "masks" / "clip-00000").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "big"], "HEIGHTxWIDTH in pixels, got 'big'"),
        (["--size", "8"], "at least 16 pixels"),
        (["--split", "dev"], "unknown split 'dev'"),
        (["--tasks", "why"], "unknown task 'why'"),
        (["--format", "avi"], "unknown format 'avi'"),
        (["--natural", "2"], "natural is a fraction"),
        (["--fps", "0"], "fps must be positive"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, tmp_path / "out", *arguments)
    assert code == 2 and not out and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_missing_are_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    natural_pictures.cache_clear()
    options = ("--natural", 0.5, "--format", "png", "--size", 16)
    code, out, err = run(capsys, tmp_path / "out", *options)
    assert code == 2 and not out and "pip install" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "is not empty; name a new folder" in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_long_clips_are_a_folder_or_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    from foveate.video import Clip
    from foveate.world.long import LongWorld

    options = "--minutes 0.2 --clips 2 --first 3 --events 2 --fps 5 --size 32x48 --seed 1 --json"
    code, out, err = run(capsys, tmp_path / "out", *options.split(), "--split", "val")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert (document["clips"], document["questions"], document["seconds"]) == (2, 4, 24)
    clip = Clip(tmp_path / "out" / "clip-00001.mp4")
    assert (clip.info.duration, clip.info.height, clip.info.width) == (12, 32, 48)
    rows = (tmp_path / "out" / "questions.jsonl").read_text().splitlines()
    world = LongWorld(12, 1, "val", fps=5, events=2)
    asked = [event.question.text for index in (3, 4) for event in world.sample(index).events]
    assert [json.loads(row)["question"] for row in rows] == asked

    options = ("--minutes", "0.1", "--tasks", "order, count", "--letterbox", "--size", "32x48")
    code, out, err = run(capsys, tmp_path / "one.mp4", *options)
    assert (code, err) == (0, "") and "6.00 s of video in 1 clip and 1 question" in out
    assert json.loads((tmp_path / "one.jsonl").read_text())["task"] == "order"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "1", "--masks"], "goes without --frames"),
        (["--minutes", "1", "--frames", "8"], "goes without --frames"),
        (["--minutes", "0.01"], "do not fit"),
        (["--minutes", "1", "--tasks", "when"], "tasks are some of"),
        (["--events", "2"], "give --minutes"),
        (["--letterbox"], "give --minutes"),
    ],
)
def test_options_of_long_clips_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, tmp_path / "out", *arguments)
    assert (code, out) == (2, "") and message in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, tmp_path / "a.mp4", "--minutes", "1", "--clips", "2")
    assert code == 2 and "is one file" in err
