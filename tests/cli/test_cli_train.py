"""`foveate train embedded`, and `foveate ask` without a model named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate.cli import main

pytest.importorskip("typer")

from foveate.checkpoints import loading
from foveate.cli.training import Pace, cpu_settings, fact_line
from foveate.training import SIZES, Stage, sizes
from foveate.training import embedded as module
from foveate.world import World

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps a stage."""
    stage = Stage(3, 2, 1e-3, 1)
    short = replace(SIZES["tiny"], tower=stage, answers=stage, joint=stage)
    monkeypatch.setitem(sizes.SIZES, "tiny", short)


@pytest.fixture
def run(run: Run) -> Run:
    """Train the tiny size here; gives exit code, standard output and standard error."""

    def call(folder: Path, *arguments: object) -> tuple[int, str, str]:
        fixed = ("--size", "tiny", "--clips", 4, "--workers", 0, "--threads", 1, "--device", "cpu")
        return run("train", "embedded", "--out", folder, *fixed, *arguments)

    return call


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Ask about a clip; gives exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["ask", *map(str, arguments), "--device", "cpu", "--max-new-tokens", "2"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def embedded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the place of the one that ships with the package."""
    folder = tmp_path / "weights"
    assert run(folder)[0] == 0
    monkeypatch.setattr(loading, "_FOLDER", folder)
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Iterator[Path]:
    """Four frames of the world."""
    frames = World(frames=4, size=32).sample(0).frames_THWC
    pictures = [Image.fromarray(frame) for frame in frames]
    path = tmp_path / "clip.gif"
    pytest.importorskip("av")
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250)
    yield path


# -- train ----------------------------------------------------------------------------------------


def test_training_shows_progress_and_says_how_to_use_the_model(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    code, out, err = run(folder)
    assert code == 0
    reports = [line for line in err.splitlines() if line]
    assert [line.split(",")[0] for line in reports if " 0/" not in line][:3] == [
        "tower 3/3",
        "answers 3/3",
        "joint 3/3",
    ]
    assert "visual tokens " in err and "answers 0.0% right" in err and "loss " in err
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert rows[0][0] == "overall" and all(len(row) == 4 for row in rows) and len(rows) > 5
    assert "one frame" in out and "blind" in out and "4 clips" in out
    assert f"--model {folder}" in out and "foveate ask" in out and "foveate bench" in out
    assert (folder / "model.safetensors").exists()


def test_json_is_the_card_and_nothing_else(run: Run, tmp_path: Path) -> None:
    code, out, err = run(tmp_path / "model", "--json")
    document = json.loads(out)
    assert code == 0 and not err
    assert document.pop("folder") == str(tmp_path / "model")
    assert document == json.loads((tmp_path / "model" / "card.json").read_text())


def test_bad_input_is_one_line(run: Run, tmp_path: Path) -> None:
    finished = tmp_path / "finished"
    assert run(finished)[0] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for folder, arguments, message in (
        (finished, (), "holds a finished model"),
        (finished, ("--resume",), "holds a finished model"),
        (tmp_path / "other", (), "is not empty"),
        (tmp_path / "other" / "file", (), "file"),
        (tmp_path / "new", ("--size", "huge"), "unknown size 'huge'; choose one of tiny, small"),
        (tmp_path / "new", ("--device", "abacus"), "'abacus'"),
    ):
        code, out, err = run(folder, *arguments)
        lines = err.splitlines()
        assert code == 2 and not out, message
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage", module.STAGES)
def test_interrupting_leaves_a_folder_that_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = tmp_path / "model"
    data = module.EmbeddedTraining._batches

    def interrupted(self: Any, stage_run: Any, steps: range) -> Any:
        for step, batch in zip(steps, data(self, stage_run, steps), strict=True):
            if (stage_run.name, step) == (stage, 1):
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(module.EmbeddedTraining, "_batches", interrupted)
        code, out, err = run(folder)
    assert code == 130 and not out
    last = err.splitlines()[-1]
    assert last.startswith("interrupted: ") and str(folder) in last and "--resume" in last
    code, _, err = run(folder)
    assert code == 2 and "--resume" in err
    code, _, err = run(folder, "--resume", "--seed", 5)
    assert code == 2 and "seed was 0, is 5" in err
    assert run(folder, "--resume")[0] == 0
    whole = tmp_path / "whole"
    assert run(whole)[0] == 0
    files = [path / "model.safetensors" for path in (folder, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_breaks_on_the_way_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError("no space left on device\nsome C++ trace")

    monkeypatch.setattr(torch, "save", full)
    code, out, err = run(tmp_path / "model")
    last = err.splitlines()[-1]
    assert code == 2 and not out
    assert last.startswith("error: no space left on device; checkpoints so far are in ")


def test_settings_of_the_processor_are_put_back() -> None:
    before = torch.get_num_threads()
    tiny = torch.tensor([1e-39])
    with cpu_settings(before + 1):
        assert torch.get_num_threads() == before + 1
        # Whether denormal numbers can be flushed depends on the processor.
        flushed = float(tiny * 0.5) == 0
        assert flushed == torch.set_flush_denormal(True)
    assert torch.get_num_threads() == before and float(tiny * 0.5) != 0


def test_pace_counts_from_where_this_run_began() -> None:
    pace = Pace(first=400, now=1000.0)
    assert pace.at(400, 1000, 1000.0) == ""
    assert pace.at(420, 1000, 1010.0) == "2.00 steps/s, 4:50 left"
    assert pace.at(410, 3610, 1010.0) == "1.00 steps/s, 53:20 left"
    assert pace.at(410, 7610, 1010.0) == "1.00 steps/s, 2:00:00 left"


def test_facts_name_what_is_right() -> None:
    assert fact_line({}) == ""
    assert fact_line({"loss": 1.23456, "kind": 0.5}) == "loss 1.235, visual tokens 50.0% right"
    assert fact_line({"loss": 2.0, "right": 0.25}) == "loss 2.000, answers 25.0% right"


def test_a_folder_called_embedded_is_not_the_model_that_ships(
    run: Run, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("embedded")
    code, out, _ = run(folder, "--seed", 1)
    assert code == 0 and f"--model .{os.sep}embedded" in out and "--model embedded" not in out
    given = [loading.load_model(name)[0] for name in (folder, f".{os.sep}embedded", "embedded")]
    mine, named, shipped = (model.lm_head.weight for model in given)
    assert torch.equal(mine, named) and not torch.equal(mine, shipped)


# -- ask ------------------------------------------------------------------------------------------


def test_the_embedded_model_answers_when_none_is_named(
    ask: Run, embedded: Path, clip: Path
) -> None:
    code, out, err = ask(
        clip, "what color is the star?", "--frames", 4, "--recipe", "uniform", "--retain", "0.5"
    )
    assert code == 0 and not err
    assert "LlavaOnevisionForConditionalGeneration" in out and "note:" not in out
    named = ask(clip, "what color is the star?", "--frames", 4, "--model", embedded, "--json")
    default = ask(clip, "what color is the star?", "--frames", 4, "--json")
    assert json.loads(named[1])["answer"] == json.loads(default[1])["answer"]


def test_it_says_what_it_does_not_know(ask: Run, embedded: Path, clip: Path) -> None:
    code, out, _ = ask(clip, "what is the zebra, dear?", "--frames", 3)
    assert code == 0
    assert "note: the embedded model was trained on 4 frames; it got 3" in out
    assert "note: the embedded model does not know: zebra, dear (" in out
    _, out, _ = ask(clip, "what is the zebra?", "--frames", 3, "--json")
    assert len(json.loads(out)["report"]["notes"]) == 2


@pytest.mark.parametrize("one", ["picture", "frame"])
def test_it_refuses_a_single_picture(
    ask: Run, embedded: Path, clip: Path, tmp_path: Path, one: str
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(picture)
    arguments = (picture,) if one == "picture" else (clip, "--frames", 1)
    code, out, err = ask(arguments[0], "what is it?", *arguments[1:])
    assert code == 2 and not out
    assert err.startswith("error: the embedded model was trained on clips") and err.count("\n") == 1
    # Other checkpoints take pictures; this one does so, too, when it is named as any other.
    assert ask(picture, "what is it?", "--model", embedded, "-r", "uniform", "--retain", 1)[0] == 0


def test_without_the_weights_it_says_where_to_get_some(
    ask: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_FOLDER", tmp_path / "nowhere")
    code, out, err = ask(clip, "what is it?")
    assert code == 2 and not out
    assert err.startswith("error: this installation comes without the embedded model: train one")


def test_a_task_prints_what_was_asked_and_fits_a_narrow_terminal() -> None:
    from rich.console import Console

    from foveate.cli.training_tasks import outcome_table

    rows = [
        ("", "untouched", "right (%)", 64.25, 1.0, "", None),
        ("", "tome(retain=0.5)", "right (%)", 63.0, 0.551, "within a point of untouched", False),
        ("small ones", "tome[half]", "kept (%)", 12.5, None, "at least a tenth", True),
    ]
    names = ("on", "recipe", "metric", "value", "flops", "bar", "met")
    card = {"task": "shapes", "outcomes": [dict(zip(names, row, strict=True)) for row in rows]}
    console = Console(width=66)
    with console.capture() as caught:
        console.print(outcome_table(card))
    lines = [line.rstrip() for line in caught.get().splitlines()]
    assert max(map(len, lines)) <= 66
    assert [line.split() for line in lines[2:5]] == [
        ["right", "(%)"],
        ["untouched", "64.25", "100.0", "%"],
        ["tome(retain=0.5)", "63.00", "55.1", "%"],
    ]
    assert lines[5:] == [
        "    asked: within a point of untouched: not met",
        "kept (%), small ones",
        f"{'  tome[half]':<{len(lines[3].split('64.25')[0])}}12.50",
        "    asked: at least a tenth: met",
    ]
