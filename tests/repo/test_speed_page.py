"""docs/speed.md is what benchmarks/own_cost.py writes from its measurements and notes."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import own_cost  # noqa: E402

DATA = json.loads((ROOT / "docs" / "speed.json").read_text("utf-8"))
NOTES = tomllib.loads((ROOT / "docs" / "speed-notes.toml").read_text("utf-8"))


def test_the_page_is_written_by_the_script():
    assert (ROOT / "docs" / "speed.md").read_text("utf-8") == own_cost.page(DATA, NOTES)


def test_every_row_above_the_limit_is_explained():
    rows = [
        row
        for shape in DATA["shapes"].values()
        for budgets in shape["rows"].values()
        for row in budgets.values()
    ]
    assert len(rows) > 50 and any(map(own_cost.needs_note, rows))
    assert own_cost.unexplained(DATA, NOTES) == []
    with pytest.raises(ValueError, match="without an explanation: "):
        own_cost.page(DATA, {})


def test_both_shapes_and_every_reason():
    assert set(DATA["shapes"]) == set(own_cost.SHAPES)
    for shape in DATA["shapes"].values():
        for budgets in shape["rows"].values():
            for row in budgets.values():
                assert row.get("error", "") or own_cost.own(row) > 0


def test_a_share_is_of_what_is_saved():
    row = {"own_s": {"projector": 1.0}, "saved_s": {"prefill": 8.0, "encoder": 2.0}}
    assert own_cost.share({**row, "untouched_s": 20.0}) == 0.1
    assert own_cost.needs_note({**row, "untouched_s": 20.0})
    saves_nothing = {**row, "saved_s": {"prefill": 0.0, "encoder": 0.0}}
    assert own_cost.share({**saves_nothing, "untouched_s": 20.0}) is None
    assert not own_cost.needs_note({**saves_nothing, "untouched_s": 21.0})


def test_time_of_a_layer_is_fitted_from_lengths():
    token, pair = own_cost.fit({n: 3e-4 * n + 2e-8 * n * n for n in (100, 1000, 4000)})
    assert token == pytest.approx(3e-4) and pair == pytest.approx(2e-8)
