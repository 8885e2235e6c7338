"""The model that ships, on clips of the world that were written to files."""

from __future__ import annotations

from pathlib import Path

import pytest

import foveate
from foveate.bench import FolderSuite, WorldSuite, run_bench
from foveate.checkpoints import embedded_folder
from foveate.world import World
from foveate.world.export import export

CLIPS = 4


def test_files_of_the_world_are_answered_like_the_world(tmp_path: Path) -> None:
    pytest.importorskip("av")
    try:
        embedded_folder()
    except foveate.FoveateError as error:
        pytest.skip(str(error))
    export([World(size=64).sample(index) for index in range(CLIPS)], tmp_path / "clips")
    found = {}
    for suite in (WorldSuite(CLIPS), FolderSuite(tmp_path / "clips")):
        result = run_bench(
            "uniform", 1, suite, out=tmp_path / suite.name, baselines=False, repeats=0
        )
        assert result.untouched is not None and result.untouched.accuracy is not None
        found[suite.name] = result.untouched.accuracy.value
        assert result.run["lettered"] is False
    # Letters, which this model cannot read, would lose most answers.
    assert found["world"] > 0.7
    assert found["questions"] == pytest.approx(found["world"], abs=0.1)
