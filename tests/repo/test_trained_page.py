"""docs/trained.md is what scripts/trained_page.py writes from the cards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from foveate.training import TASKS

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import trained_page  # noqa: E402

FOLDER = ROOT / "docs" / "trained"


def test_the_page_is_written_by_the_script() -> None:
    assert (ROOT / "docs" / "trained.md").read_text("utf-8") == trained_page.page(FOLDER)


def test_every_task_has_a_card_and_a_text() -> None:
    for name in TASKS:
        card = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
        assert (card["task"], card["size"]) == (name, "small")
        assert card["outcomes"][0]["recipe"] == "untouched"
        assert len((FOLDER / f"{name}.md").read_text("utf-8")) > 200


def test_a_bar_that_was_missed_is_said() -> None:
    row = {"recipe": "x", "metric": "m", "value": 1.0, "flops": 0.5, "on": "", "note": ""}
    outcomes = [
        {**row, "recipe": "untouched", "value": 3.0, "flops": None, "bar": "", "met": None},
        {**row, "bar": "within 1", "met": False},
    ]
    said = trained_page.rows({"outcomes": outcomes})
    assert "| `x` | m | 1.00 | -2.00 | 50.0 % | within 1 | **no** |" in said
