"""The weights that ship with the package do what their card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import foveate
from foveate.checkpoints import embedded_folder
from foveate.errors import FoveateError
from foveate.training import Size, Stage, summary, world_accuracy

try:
    FOLDER: Path | None = embedded_folder()
except FoveateError as error:
    FOLDER, REASON = None, str(error)
else:
    REASON = ""
pytestmark = pytest.mark.skipif(FOLDER is None, reason=REASON)
CLIPS = 64


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    assert FOLDER is not None
    return json.loads((FOLDER / "card.json").read_text())


def size_of(card: dict[str, Any]) -> Size:
    plain = {k: tuple(x) if isinstance(x, list) else x for k, x in card["size"].items()}
    stages = {name: Stage(**plain[name]) for name in ("tower", "answers", "joint")}
    return Size(**{**plain, **stages})


def test_it_fits_into_the_package(card: dict[str, Any]) -> None:
    assert FOLDER is not None
    assert (FOLDER / "model.safetensors").stat().st_size <= 25e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    from math import prod

    assert sum(prod(shape) for shape in shapes) == card["parameters"]
    # Checkpoints of the training stay out of the package.
    assert not [path.name for path in FOLDER.iterdir() if path.suffix in (".pt", ".tmp")]


def test_it_answers_as_well_as_its_card_says(card: dict[str, Any]) -> None:
    size = size_of(card)
    try:
        model, processor = foveate.embedded()
        found = {
            view: summary(
                world_accuracy(model, size, seed=card["seed"], split="test", clips=CLIPS, view=view)
            )
            for view in ("clip", "one frame", "blind")
        }
    except foveate.FoveateError as error:  # pragma: no cover
        if "foveate[demo]" in str(error):
            pytest.skip(str(error))
        raise
    told = card["test"]["accuracy"]
    # Some 400 questions: three standard errors are below eight points.
    for view, rows in found.items():
        assert rows["overall"] == pytest.approx(told[view]["overall"], abs=0.08), view
    for view in ("one frame", "blind"):
        assert found["clip"]["overall"] > found[view]["overall"] + 0.15
        assert told["clip"]["overall"] > told[view]["overall"] + 0.15
    assert processor.tokenizer.unk_token == "<unk>"
