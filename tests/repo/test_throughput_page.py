"""The section on speed of docs/encoders.md is what benchmarks/encoder_throughput.py writes."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import encoder_throughput as bench  # noqa: E402

DATA = json.loads((ROOT / "docs" / "encoder-throughput.json").read_text("utf-8"))
NOTES = tomllib.loads(bench.NOTES.read_text("utf-8"))


def test_the_section_is_written_by_the_script() -> None:
    page = (ROOT / "docs" / "encoders.md").read_text("utf-8")
    found = page.split(bench.BEGIN)[1].split(bench.END)[0]
    assert found.strip() == bench.section(DATA, NOTES).strip()


def test_every_encoder_and_method_is_there() -> None:
    assert set(DATA["shapes"]) == set(bench.SHAPES)
    for key, shape in bench.SHAPES.items():
        assert set(DATA["shapes"][key]) == set(shape.methods)


def test_rows_below_the_bar_are_explained() -> None:
    row = {"retain": 0.5, "batch": 8, "flops": 0.6, "time": 0.8}
    data = {**DATA, "shapes": {"siglip": {"tome": [row, {**row, "time": 0.65}]}}}
    assert bench.below(data) == {"tome": ["siglip at 0.5"]}
    with pytest.raises(ValueError, match="without an explanation: tome"):
        bench.section(data, {})
    said = bench.section(data, {"tome": "It is slow."})
    assert "* `tome` (siglip at 0.5): It is slow." in said and "**75%**" in said
    assert "No row is slower." in said
    data["shapes"]["siglip"]["tome"][0]["time"] = 1.2
    assert "Slower than untouched: `tome` on siglip at 0.5" in bench.section(data, {"tome": ""})
