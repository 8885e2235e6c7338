"""Python in the documentation compiles, and what is complete enough to run is run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from foveate.models import registry as adapters

ROOT = Path(__file__).parents[2]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def run(document: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module made of all Python blocks of a document, run in order."""
    module = ModuleType(Path(document).stem)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    for block in PYTHON_BLOCK.findall((ROOT / document).read_text(encoding="utf-8")):
        exec(compile(block, document, "exec", dont_inherit=True), module.__dict__)
    return module


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_compile(document: Path) -> None:
    for block in PYTHON_BLOCK.findall(document.read_text(encoding="utf-8")):
        compile(block, str(document), "exec", dont_inherit=True)


def test_concepts_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = run("docs/concepts.md", monkeypatch)
    assert (tmp_path / "recipe.json").exists()
    assert [noted.name for noted in module.report.items[0].evidence] == ["attention"]
    assert (tmp_path / "saw.html").stat().st_size > 10_000
    assert module.merge.apply(module.x_BND).tolist() == [[[1, 2], [4, 5]]]
    assert module.merge.matrix().tolist() == [[[0.5, 0.5, 0, 0], [0, 0, 1, 0]]]


def test_asking_about_a_long_video_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = run("docs/long-videos.md", monkeypatch)
    assert module.answer.text == module.film.events[0].question.answer
    assert module.answer.timeline.seconds()["choose"] > 0


def test_backbones_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = run("docs/backbones.md", monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    said = re.findall(r"print\(.*\)  # ([\[(][\d, ]+[\])])", page)
    assert len(said) == 5 and all(line in printed for line in said)
    assert module.logits.shape == (1, 10)


def test_training_a_size_of_your_own_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = run("docs/training.md", monkeypatch)
    assert module.card["size"]["name"] == "mine" and (tmp_path / "mine/card.json").exists()
    assert module.model.config.text_config.hidden_size == 48


@pytest.mark.parametrize("document", ["README.md", "docs/start.md", "docs/training.md"])
def test_the_first_clip_of_the_world_can_be_asked_that(document: str) -> None:
    from foveate.world import World

    text = (ROOT / document).read_text(encoding="utf-8")
    asked = re.findall(r'clips/clip-00000\.mp4 "([^"]+)"', text)
    known = [question.text for question in World().sample(0).questions]
    assert asked and set(asked) <= set(known)


def test_the_adapter_in_ten_lines_serves_its_family(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))
    first = PYTHON_BLOCK.findall((ROOT / "docs/adapters.md").read_text(encoding="utf-8"))[0]
    lines = [line for line in first.splitlines() if line.strip()]
    assert len(lines) <= 10
    module = run("docs/adapters.md", monkeypatch)
    assert isinstance(adapters.adapter_for(module.model), module.VipLlavaAdapter)
    assert "16 -> 4" in capsys.readouterr().out


def test_known_families_are_all_listed() -> None:
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    section = page.partition("## Known families")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", section)) - {"UnknownModelError"}
    assert listed == set(adapters._ADAPTERS)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "Makefile"], ids=lambda path: path.name)
def test_commands_in_the_documents_exist(document: Path) -> None:
    import typer

    from foveate.cli.app import app

    commands = dict(typer.main.get_group(app).commands)
    for group in list(commands):
        inner = getattr(commands[group], "commands", {})
        commands |= {f"{group} {name}": command for name, command in inner.items()}
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?:^|[`/])foveate (\w+)([^`\n]*)", text, re.MULTILINE):
        assert name in commands, f"{document.name}: foveate {name}"
        if hasattr(commands[name], "commands") and rest.strip():
            name = f"{name} {rest.split()[0]}"
            assert name in commands, f"{document.name}: foveate {name}"
        known = {option for param in commands[name].params for option in param.opts}
        used = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", rest))
        assert used <= known, f"{document.name}: foveate {name} has no {sorted(used - known)}"
