"""The curves of docs/encoders.md are those of the rows that were measured."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from foveate.core import Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("encoder_quality")


@pytest.fixture
def stored() -> dict[str, Any]:
    return json.loads((ROOT / "docs/encoder-quality.json").read_text())


def test_the_page_shows_what_is_stored(script: ModuleType, stored: dict[str, Any]) -> None:
    text = (ROOT / "docs/encoders.md").read_text()
    assert f"{script.BEGIN}\n{script.page(stored)}\n{script.END}" in text
    assert script.dump(stored) == (ROOT / "docs/encoder-quality.json").read_text()
    for key, (name, title) in script.CHARTS.items():
        panels = {s: [r for r in stored["rows"] if r["source"] == s] for s in script.SOURCES}
        drawn = script.chart(panels, key, title, list(script.METHODS))
        assert (ROOT / "docs/assets" / name).read_text() == drawn
        marks = len(re.findall(r"<(?:circle|polygon)", drawn))
        assert marks == len(stored["rows"]) + len(script.METHODS)  # and one each in the legend


def test_every_method_is_measured_at_every_budget(
    script: ModuleType, stored: dict[str, Any]
) -> None:
    for recipe in script.METHODS.values():
        assert Recipe.of(recipe).at("encoder")
    expected = {
        (source, name, retain)
        for source in script.SOURCES
        for name in script.METHODS
        for retain in script.BUDGETS
        if source == "clips" or name not in script.JOINING
    }
    assert {(r["source"], r["method"], r["retain"]) for r in stored["rows"]} == expected


def test_figures_are_those_of_the_features(script: ModuleType) -> None:
    cls_TD, dense_TPD = torch.eye(4) + 0.1 * torch.arange(4.0), torch.randn(4, 6, 8)
    whole = {"cls": cls_TD, "dense": dense_TPD, "flops": 1.0}
    same = script.compare(whole | {"flops": 0.5}, whole, 2)
    assert same["flops"] == 0.5 and same["same"] == 1.0
    assert same["cls"] == pytest.approx(1) and same["dense"] == pytest.approx(1)
    half = dense_TPD.clone()
    half[:, :3] = -half[:, :3]  # half of the patches point the other way
    assert script.compare(whole | {"dense": half}, whole, 2)["dense"] == pytest.approx(0, abs=1e-6)
    # Of two neighbours each, those of pictures 0 and 1 are swapped with 2 and 3.
    pairs = torch.tensor([[1.0, 0], [1.0, 0.1], [0, 1.0], [0.1, 1.0]])
    assert script.neighbours(pairs, 1).flatten().tolist() == [1, 0, 3, 2]
    moved = whole | {"cls": pairs}
    assert script.compare(whole | {"cls": pairs[[0, 2, 1, 3]]}, moved, 1)["same"] == 0.0


def test_cosines_are_drawn_by_their_distance_from_one(script: ModuleType) -> None:
    charts = importlib.import_module("encoder_charts")
    height, ticks = charts._scale([0.9, 0.999], "cls")
    assert height(0.99) - height(0.9) == pytest.approx(height(0.999) - height(0.99))
    assert 0 < height(0.9) < height(0.999) < 1 and (0.99, "0.99") in ticks
    height, ticks = charts._scale([0.55, 0.9], "same")
    assert (height(0.5), height(1.0)) == (0, 1) and ticks[0] == (0.5, "50 %")
    with pytest.raises(ValueError, match="nothing to draw"):
        charts.chart({"clips": []}, "cls", "title", ["tome"])
