"""`foveate ask` on its way: stages, scorers, companions, isolation; with the embedded model."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import CLIPConfig, CLIPModel

from foveate.cli import stages
from foveate.core.timeline import TIMED_STAGES
from foveate.errors import UnknownModelError
from foveate.world.long import LongWorld
from foveate.world.long_files import write_clip
from tiny import VOCAB

pytest.importorskip("typer")
pytest.importorskip("av")
sys.path.insert(0, str(Path(__file__).parents[1] / "view"))

from checkpoints import save_checkpoint

Run = Callable[..., tuple[int, str, str]]
CLIP = LongWorld(24, fps=4.0).sample(0)
QUESTION = CLIP.events[0].question.text


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "clip.mp4"
    write_clip(CLIP, path, size=64)
    return path


@pytest.fixture(scope="module")
def companion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    text = {**size, "vocab_size": VOCAB, "max_position_embeddings": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.save_pretrained(folder)
    other = save_checkpoint("llava_onevision", tmp_path_factory.mktemp("words"))
    for file in other.glob("token*.json"):
        shutil.copy(file, folder)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


# -- asking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["quota", "f2c(anchors=4)@frames"])
def test_recipes_choose_frames_with_the_embedded_model(run: Run, video: Path, recipe: str) -> None:
    code, out, err = run("ask", video, QUESTION, "--recipe", recipe, "--json")
    document = json.loads(out)
    assert code == 0 and not err
    frames = document["frames"]
    assert frames["looked_at"] == 24 and 1 <= frames["shown"] == len(frames["seconds"]) <= 24
    assert list(document["timeline"]["seconds"]) == list(TIMED_STAGES)
    assert document["report"]["stages"][0]["stage"] == "frames"


def test_figures_name_the_stages(run: Run, video: Path) -> None:
    recipe = "f2c(anchors=4)@frames"
    code, out, err = run("ask", video, QUESTION, "-r", recipe, "--compare", "--frames", "8")
    assert code == 0 and not err
    for stage in TIMED_STAGES:
        assert f"time to {stage}" in out
    rows = {" ".join(line.split()) for line in out.splitlines()}
    assert "frames looked at 24 0" in rows
    assert any(row.startswith("frames shown, of 0:24:") for row in rows)


def test_isolated_decoding_answers_the_same(run: Run, video: Path) -> None:
    plain = json.loads(run("ask", video, QUESTION, "-r", "divprune", "--json")[1])
    code, out, err = run("ask", video, QUESTION, "-r", "divprune", "--json", "--isolate")
    apart = json.loads(out)
    assert code == 0 and not err and apart["answer"] == plain["answer"]
    assert apart["report"]["visual_after"] == plain["report"]["visual_after"]


def test_parts_are_told_before_the_answer(run: Run, video: Path) -> None:
    asked = ["ask", video, QUESTION, "-r", "divprune", "--parts", "2", "--frames", "8"]
    code, out, err = run(*asked)
    assert code == 0 and not err
    first, second, *rest = out.splitlines()
    assert first.startswith("0:00 to 0:12:") and second.startswith("0:12 to 0:24:") and rest[0]
    document = json.loads(run(*asked, "--json")[1])
    assert [thought["start"] for thought in document["thoughts"]] == [0.0, 12.0]
    assert document["frames"]["shown"] == 8


def test_a_companion_scores(run: Run, video: Path, companion: Path) -> None:
    for extra in ([], ["--scorer", "companion"]):
        code, out, err = run(
            *("ask", video, QUESTION, "-r", "quota", "--companion", companion, "--json"), *extra
        )
        document = json.loads(out)
        assert code == 0 and not err and document["frames"]["looked_at"] == 24


def test_companions_are_loaded_with_their_settings(companion: Path, tmp_path: Path) -> None:
    from foveate.checkpoints import load_companion

    loaded = load_companion(companion, lambda ids: "x")
    assert loaded.size == (32, 32) and loaded.mean == (0.1, 0.2, 0.3)
    assert loaded.embed_text("what is in the video").shape == (1, 12)
    assert not loaded.model.training
    with pytest.raises(UnknownModelError, match="no such folder"):
        load_companion(tmp_path / "nothing", lambda ids: "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorer", "oracle"], "--scorer is one of auto, self, answer, companion"),
        (["--scorer", "companion"], "name a CLIP-like checkpoint with --companion"),
        (["--scorer", "self"], "cannot be asked for a letter"),
        (["--companion", "./missing"], "no such folder"),
    ],
)
def test_bad_scorers_are_explained_in_one_line(
    run: Run, video: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run("ask", video, QUESTION, "-r", "quota", "--json", *arguments)
    assert code == 2 and not out and err.startswith("error: ") and message in err
    assert len(err.splitlines()) == 1


def test_interrupting_leaves_no_display(
    run: Run, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, progress: Callable[..., None], **options: object) -> None:
        progress("choose", 1, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr("foveate.cli.asking.ask", interrupted)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(stages, "err", lambda: terminal)
    code, out, err = run("ask", video, QUESTION)
    assert (code, err) == (130, "interrupted\n") and not out
    assert not terminal._live_stack, "the bars are gone"
    text = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "choose" in text and text.count("\x1b[?25l") == text.count("\x1b[?25h")


# -- the display ----------------------------------------------------------------------------------


def test_times_of_a_video() -> None:
    assert [stages.clock(s) for s in (0, 65.9, 3725.4)] == ["0:00", "1:05", "1:02:05"]


def test_words_say_how_far_a_stage_is() -> None:
    told = stages.Stages()
    told.position = lambda: 639.0
    assert told.words("choose", 640, 3600) == (
        "640 of 3,600 frames looked at, to 10:39 of the video"
    )
    assert told.words("choose", 0, 3600) == "0 of 3,600 frames looked at"
    assert told.words("prefill", 265, 265) == "265 of 265 tokens"
    assert told.words("answer", 1, 128) == "1 token" and told.words("load", 0, 1) == ""


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    monkeypatch.setattr(stages, "err", lambda: console)
    return console, text


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    _, text = shown(monkeypatch, terminal=False)
    with stages.stages() as tell:
        for done in range(0, 3601, 100):
            tell("choose", done, 3600)
            now[0] += 1.0
    lines = text.getvalue().splitlines()
    assert lines[0] == "choose: 1,000 of 3,600 frames looked at" and len(lines) == 3
    assert tell.totals == {"choose": 3600}


def test_quick_answers_say_nothing_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = shown(monkeypatch, terminal=False)
    with stages.stages() as tell:
        for stage in TIMED_STAGES:
            tell(stage, 1, 1)
    assert text.getvalue() == ""


def test_a_terminal_gets_a_bar_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    console, text = shown(monkeypatch, terminal=True)
    with stages.stages() as tell:
        tell("load", 0, 1)
        tell("load", 1, 1)
        for stage in TIMED_STAGES:
            tell(stage, 0, 4)
            tell(stage, 2, 4)
        assert len(tell._bars.tasks) == 6  # type: ignore[attr-defined]
        tell.stop()
        assert not console._live_stack
    for stage in ("load the model", *TIMED_STAGES):
        assert stage in text.getvalue()


def test_machines_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = shown(monkeypatch, terminal=True)
    with stages.stages(enabled=False) as tell:
        tell("choose", 1, 4)
    assert text.getvalue() == "" and tell.totals == {"choose": 4}
