"""Every task: trains, is killed and goes on, is measured and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveate.cli.training_tasks import TASK_SUMMARIES
from foveate.training import TASKS, TaskTraining, load_task, make_task, measure_again


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_and_is_measured_and_loaded(name: str, tmp_path: Path) -> None:
    task = make_task(name, "tiny")
    seen: list[str] = []
    card = TaskTraining(task, tmp_path / "a").run(lambda stage, *_: seen.append(stage))
    assert list(dict.fromkeys(seen)) == [*task.stages, "evaluation"]
    assert card["outcomes"][0]["recipe"] == "untouched"
    for row in card["outcomes"]:
        assert row["metric"] and row["value"] == row["value"]
        assert (row["met"] is None) == (not row["bar"])
    assert any(row["bar"] for row in card["outcomes"])
    for stage in card["stages"].values():
        assert stage["curve"] and all(point["loss"] < 1e6 for point in stage["curve"])

    # Killed in the last stage, between two checkpoints.
    last = list(task.stages)[-1]

    def kill(stage: str, done: int, total: int, facts: dict[str, float]) -> None:
        if stage == last and facts:
            raise Killed

    folder = tmp_path / "b"
    with pytest.raises(Killed):
        TaskTraining(make_task(name, "tiny"), folder, every=1).run(kill)
    with pytest.raises(FileExistsError, match="go on with --resume"):
        TaskTraining(make_task(name, "tiny"), folder).run()
    again = TaskTraining(make_task(name, "tiny"), folder, resume=True).run()
    weights = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("a", "b")]
    assert weights[0] == weights[1]
    assert again["outcomes"] == card["outcomes"]

    loaded, modules = load_task(folder)
    assert loaded.name == name and not any(module.training for module in modules.values())
    assert measure_again(folder)["outcomes"] == card["outcomes"]
    assert json.loads((folder / "card.json").read_text())["outcomes"] == card["outcomes"]


@pytest.mark.parametrize("name", TASKS)
def test_batches_follow_from_their_numbers_alone(name: str) -> None:
    task = make_task(name, "tiny")
    for stage in task.stages:
        torch.manual_seed(0)
        first = task.batch(stage, 1)
        torch.manual_seed(1)
        second, other = make_task(name, "tiny").batch(stage, 1), task.batch(stage, 2)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)


def test_help_knows_every_task() -> None:
    assert list(TASK_SUMMARIES) == list(TASKS)


def test_names_and_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'dogs'; choose one of shapes"):
        make_task("dogs")
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        make_task("shapes", "huge")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        load_task(tmp_path)
