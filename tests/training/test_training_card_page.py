"""The page of a model is rendered from its card, figure by figure."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foveate.training import SIZES, build_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_card", ROOT / "scripts/model_card.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading: first column -> the others."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = [line.strip("| \n").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in table[2:]}


def test_the_page_repeats_the_card(
    script: ModuleType, learned: tuple[Path, list[tuple], dict[str, Any]], tmp_path: Path
) -> None:
    folder, _, card = learned
    script.main(folder / "card.json", tmp_path)
    page = (tmp_path / "embedded-model.md").read_text()
    test = card["test"]
    shown = rows(page, "Accuracy")
    assert list(shown) == list(test["accuracy"]["clip"])
    for task, (asked, *views) in shown.items():
        count = test["questions"].get(task, sum(test["questions"].values()))
        assert asked == f"{count:,}"
        for view, cell in zip(test["accuracy"], views, strict=True):
            value, _, margin = cell.partition(" ± ")
            assert value == f"{test['accuracy'][view][task]:.1%}"
            expected = 196 * (test["accuracy"][view][task] * (1 - float(value[:-1]) / 100)) ** 0.5
            assert float(margin[:-1]) == pytest.approx(expected / count**0.5, abs=0.06)
    stages = rows(page, "Training")
    assert len(stages) == 3
    for line, stage in zip(stages.values(), card["stages"].values(), strict=True):
        assert line[:2] == [f"{stage['steps']:,}", f"{stage['clips']:,}"]
        last = stage["curve"][-1]
        assert line[3] == f"{last['loss']:.3f}"
        assert line[4].startswith(f"{last.get('right', last.get('kind')):.1%} of ")
    settings = rows(page, "Settings")
    assert settings["seed"] == ["0"] and settings["hardware"] == [card["hardware"]]
    assert settings["parameters"] == [f"{card['parameters']:,}"]
    assert "{" not in page and "None" not in page


def test_the_picture_shows_every_stage_inside_its_frame(
    script: ModuleType, learned: tuple[Path, list[tuple], dict[str, Any]]
) -> None:
    card = learned[2]
    root = ET.fromstring(script.picture(card))
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    lines = [node for node in root if node.tag.endswith("polyline")]
    assert len(lines) == 3
    for line, stage in zip(lines, card["stages"].values(), strict=True):
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert len(points) == len(stage["curve"])
        assert all(0 < x < width and 0 < y < height for x, y in points)
        # A lower loss is drawn lower: y grows downwards.
        losses = [point["loss"] for point in stage["curve"]]
        order = sorted(range(len(losses)), key=losses.__getitem__)
        ys = [points[at][1] for at in order]
        assert ys == sorted(ys, reverse=True)
    words = " ".join(node.text or "" for node in root)
    assert all(f"{stage['steps']} steps" in words for stage in card["stages"].values())


def test_a_card_without_counts_is_shown_without_margins(
    script: ModuleType, learned: tuple[Path, list[tuple], dict[str, Any]]
) -> None:
    card = json.loads(json.dumps(learned[2]))
    del card["test"]["questions"], card["foveate"]
    page = script.page(card)
    assert "±" not in page and "Questions" not in page
    assert len(rows(page, "Accuracy")["overall"]) == 3


@pytest.mark.parametrize("value, top", [(0.9, 1), (1.2, 2), (4.9, 5), (5.1, 10), (17, 20)])
def test_axes_end_on_round_numbers(script: ModuleType, value: float, top: float) -> None:
    assert script._ceiling(value) == top


def test_the_document_lists_the_sizes_as_they_are() -> None:
    page = (ROOT / "docs/training.md").read_text()
    section = page.partition("## The model")[2].partition("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    names = [re.sub("`", "", cell) for cell in table[0][1:]]
    told = {row[0]: row[1:] for row in table[2:]}
    assert names == list(SIZES)
    for column, size in enumerate(SIZES.values()):
        vision, text = size.vision, size.text
        parameters = sum(p.numel() for p in build_model(size).parameters())
        expected = {
            "frames": f"{size.frames} of {size.image} x {size.image}",
            "visual tokens of a clip": f"{size.visual_tokens}",
            "vision tower, layers x width": f"{vision[1]} x {vision[0]}",
            "language model, layers x width": f"{text[1]} x {text[0]}",
            "heads (keys and values)": f"{text[2]} ({text[3]})",
            "parameters": f"{parameters / 1e6:.2g} M",
        }
        assert {name: row[column] for name, row in told.items()} == expected, size.name
