"""The whole training: losses fall, kills cost nothing, folders are respected."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import LEARNED, SHORT, Killed, kill_at, training

import foveate
from foveate.checkpoints import load_model
from foveate.training import EmbeddedTraining, Size, Stage, build_model
from foveate.training import embedded as module
from foveate.training.data import AnswerBatches
from foveate.training.dense import DenseHeads, dense_labels
from foveate.training.folder import thinned
from foveate.training.packing import frame_tokens
from foveate.world.backgrounds import natural_pictures
from foveate.world.vocabulary import TASKS


def same_model(first: Path, second: Path) -> bool:
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    curves = []
    for folder in (first, second):
        stages = json.loads((folder / "card.json").read_text())["stages"]
        points = [point for stage in stages.values() for point in stage["curve"]]
        curves.append([{k: v for k, v in point.items() if k != "seconds"} for point in points])
    return weights[0] == weights[1] and curves[0] == curves[1]


# -- learning -------------------------------------------------------------------------------------


def curve(stage: str, folder: Path, steps: int) -> list[dict[str, float]]:
    """What a stage reports, alone and from nothing, on two clips again and again."""
    size = replace(SHORT, **{stage: Stage(steps, 2, 1e-2, 10)})
    torch.manual_seed(0)
    model = build_model(size)
    model.set_attn_implementation({"vision_config": "eager"})
    heads = DenseHeads(size.vision[0], size.text[0])
    whole = training(folder, size, every=steps)
    run = whole._prepare(stage, model.train(), heads)
    run.report_every = 5
    (batch,) = whole._batches(run, range(1))
    folder.mkdir()
    run.train(lambda steps: (batch for _ in steps), lambda *_: None)
    return run.history


def test_the_tower_learns_what_patches_show(tmp_path: Path) -> None:
    history = curve("tower", tmp_path / "run", steps=80)
    assert history[-1]["loss"] < 0.4 * history[0]["loss"]
    assert history[-1]["kind"] > 0.7 > 0.2 > history[0]["kind"]
    assert history[-1]["color"] > 0.7 and history[-1]["place"] < 0.2 * history[0]["place"]


@pytest.mark.parametrize("stage", ["answers", "joint"])
def test_the_language_model_learns_answers(tmp_path: Path, stage: str) -> None:
    history = curve(stage, tmp_path / "run", steps=40)
    assert history[-1]["loss"] < 0.65 * history[0]["loss"]
    assert history[-1]["answer_loss"] < 0.3 * history[0]["answer_loss"]
    assert history[-1]["right"] > 0.8 > 0.2 > history[0]["right"]


def test_the_joint_stage_adds_the_labels_of_its_frames() -> None:
    size = SHORT
    batch = AnswerBatches(size, 0, 2, first=3, labels=True)[1]
    for row, index in enumerate((5, 6)):
        sample = AnswerBatches(size, 0, 2).world.sample(index)
        frames = list(range(size.frames))
        for name, cell in (("patches", size.patch), ("tokens", 2 * size.patch)):
            expected = dense_labels(sample.scene, sample.masks_THW, frames, cell)
            for key, labels in expected.items():
                mine = batch[name][key].unflatten(0, (2, size.frames))[row]
                assert torch.equal(mine, torch.from_numpy(labels))
    model, heads = build_model(size), DenseHeads(size.vision[0], size.text[0])
    with torch.no_grad():
        asked, facts = module.answer_loss(model, batch)
        both, more = module.answer_loss(model, batch, heads)
        seen = frame_tokens(model, batch["frames"].flatten(0, 1))
        dense, _ = heads.loss(*seen, batch)
    torch.testing.assert_close(both, asked + module._DENSE_WEIGHT * dense)
    assert facts["right"] == more["right"] and "kind" in more and "kind" not in facts


def test_a_training_on_ever_new_clips_gets_better(
    learned: tuple[Path, list[tuple], dict[str, Any]],
) -> None:
    _, told, card = learned
    # Everything but the patches of ever new clips is learnt within these steps.
    for stage, least in (("tower", 0.85), ("answers", 0.6)):
        curve = card["stages"][stage]["curve"]
        assert curve[-1]["loss"] < least * curve[0]["loss"], stage
    ends = (card["stages"][name]["curve"][-1]["answer_loss"] for name in ("answers", "joint"))
    answers, joint = ends
    assert joint < answers + 0.3
    assert [name for name, done, *_ in told if done == 0] == [*module.STAGES, "evaluation"]


# -- kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", module.STAGES)
def test_a_training_that_is_killed_in_a_stage_ends_the_same(
    short: Path, tmp_path: Path, stage: str
) -> None:
    folder = tmp_path / "model"
    with pytest.raises(Killed):
        training(folder).run(kill_at(stage, 4))
    told: list[tuple] = []
    training(folder, resume=True).run(lambda *facts: told.append(facts))
    assert (stage, 2, 6, {}) in told
    assert same_model(short, folder)


def test_a_training_that_is_killed_again_and_again_ends_the_same(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    getitem = AnswerBatches.__getitem__

    def broken(self: AnswerBatches, step: int) -> dict[str, Any]:
        if step == 5:
            raise Killed
        return getitem(self, step)

    for stage, step in (("tower", 2), ("tower", 6), ("answers", 2)):
        with pytest.raises(Killed):
            training(folder, resume=True).run(kill_at(stage, step))
    with monkeypatch.context() as patch:
        patch.setattr(AnswerBatches, "__getitem__", broken)
        with pytest.raises(Killed):
            training(folder, resume=True).run()
    with monkeypatch.context() as patch:
        patch.setattr(module, "world_accuracy", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            training(folder, resume=True).run()
    assert not (folder / "model.safetensors").exists()
    training(folder, resume=True).run()
    assert same_model(short, folder)


def test_clips_from_another_process_are_the_same(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(Killed):
        training(folder, workers=1).run(kill_at("answers", 4))
    training(folder, workers=1, resume=True).run()
    assert same_model(short, folder)


def test_a_kill_while_the_model_is_written_leaves_no_half_model(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"

    def half(model: Any, size: Size, draft: Path) -> None:
        draft.mkdir()
        (draft / "model.safetensors").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_pretrained", half)
        with pytest.raises(Killed):
            training(folder).run()
    assert not (folder / "model.safetensors").exists()
    training(folder, resume=True).run()
    assert same_model(short, folder)
    assert not [path.name for path in folder.iterdir() if path.suffix == ".tmp"]


def test_another_seed_is_another_model(short: Path, tmp_path: Path) -> None:
    training(tmp_path / "model", seed=1).run()
    assert not same_model(short, tmp_path / "model")


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    build_model(SHORT)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


# -- folders --------------------------------------------------------------------------------------


def refused(error: type[Exception], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match):
        training(**options).run()


def test_a_finished_model_is_never_overwritten(short: Path) -> None:
    before = (short / "model.safetensors").read_bytes()
    for resume in (False, True):
        refused(FileExistsError, "holds a finished model", folder=short, resume=resume)
    assert (short / "model.safetensors").read_bytes() == before


def test_a_training_that_was_begun_is_not_begun_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        training(tmp_path / "model").run(kill_at("tower", 4))
    refused(FileExistsError, "was begun; go on with --resume", folder=tmp_path / "model")


def test_a_training_goes_on_with_the_release_that_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        training(tmp_path).run(kill_at("tower", 4))
    begun = json.loads((tmp_path / "training.json").read_text())
    assert begun["foveate"] == foveate.__version__
    monkeypatch.setattr(foveate, "__version__", "7.1.3")
    for version in ("7.2.3", "8.1.3"):
        (tmp_path / "training.json").write_text(json.dumps({**begun, "foveate": version}))
        match = f"begun with foveate {version}, and this is 7.1.3; go on with that version"
        refused(ValueError, match, folder=tmp_path, resume=True)
    (tmp_path / "training.json").write_text(json.dumps({**begun, "foveate": "7.1.2"}))
    going = training(tmp_path, resume=True)
    with (
        pytest.warns(UserWarning, match=r"7\.1\.2, and this is 7\.1\.3"),
        pytest.raises(Killed),
    ):
        going.run(kill_at("tower", 6))
    del begun["foveate"]  # of a release that did not write it
    (tmp_path / "training.json").write_text(json.dumps(begun))
    assert going.version_note() is None


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(FileExistsError, "is not empty", folder=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_settings_than_begun_with_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(Killed):
        training(folder).run(kill_at("tower", 4))
    longer = replace(SHORT, joint=replace(SHORT.joint, steps=7))
    refused(
        ValueError,
        r"begun with other settings: size\.joint\.steps was 6, is 7; seed was 0, is 3;",
        folder=folder,
        size=longer,
        seed=3,
        resume=True,
    )


def test_resuming_an_empty_folder_begins(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        training(tmp_path, resume=True).run(kill_at("tower", 6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tower.pt", "training.json"]


def test_pictures_that_are_missing_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    natural_pictures.cache_clear()
    with pytest.raises(foveate.FoveateError, match="pip install"):
        training(tmp_path / "model", replace(SHORT, natural=0.3), workers=1).run()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"clips": 0}, {"every": 0}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        EmbeddedTraining(SHORT, tmp_path, **wrong)


# -- card -----------------------------------------------------------------------------------------


def test_the_card_says_what_was_done(learned: tuple[Path, list[tuple], dict[str, Any]]) -> None:
    folder, _, card = learned
    assert card == json.loads((folder / "card.json").read_text())
    assert card["foveate"] == foveate.__version__ and card["torch"] == torch.__version__
    assert card["seed"] == 0 and card["hardware"].startswith("1 thread")
    size = json.loads((folder / "training.json").read_text())["size"]
    assert card["size"] == size == LEARNED.as_dict()
    assert card["visual_tokens"] == 4 * 4 + 1
    assert list(card["stages"]) == list(module.STAGES)
    for name, stage in card["stages"].items():
        assert stage["steps"] == size[name]["steps"] and stage["seconds"] > 0
        assert stage["clips"] == stage["steps"] * size[name]["clips"]
        assert stage["curve"][-1]["step"] == stage["steps"]
        assert all(point["loss"] > 0 for point in stage["curve"])
    test = card["test"]
    assert (test["split"], test["clips"]) == ("test", 20)
    assert list(test["accuracy"]) == ["clip", "one frame", "blind"]
    for rows in test["accuracy"].values():
        assert "overall" in rows and set(rows) <= {"overall", *TASKS} and len(rows) > 8
        assert all(0 <= value <= 1 for value in rows.values())
        # Overall is over questions, not over tasks.
        right = sum(rows[task] * count for task, count in test["questions"].items())
        assert rows["overall"] == pytest.approx(right / sum(test["questions"].values()))
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    assert card["parameters"] == sum(value.numel() for value in weights.values())


def test_long_curves_are_thinned_to_their_last_point() -> None:
    history = [{"step": float(step), "loss": 1 / step} for step in range(1, 302)]
    kept = thinned(history)
    assert len(kept) <= 41 and kept[-1]["step"] == 301
    assert thinned(history[:3]) == [
        {"step": 1.0, "loss": 1.0},
        {"step": 2.0, "loss": 0.5},
        {"step": 3.0, "loss": 0.33333},
    ]
    assert thinned([]) == []


def test_weights_are_evaluated_as_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    real = module.world_accuracy

    def noted(model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return real(model, *arguments, **options)

    monkeypatch.setattr(module, "world_accuracy", noted)
    training(tmp_path / "model", replace(SHORT, dtype="bfloat16")).run()
    stored, _ = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert len(seen) == 3 and stored.state_dict().keys() == seen[0].keys()
    for name, value in stored.state_dict().items():
        assert seen[0][name].dtype == torch.float32
        assert torch.equal(seen[0][name], value.float()), name
