"""The generated motion, and how HoT on it is judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foveate
from foveate.training import make_task
from foveate.training.tasks.poses import KEPT, Measured, UniformFrames, joint_errors, judged
from foveate.training.tasks.poses_data import (
    FOCAL,
    FRAME_SECONDS,
    JOINTS,
    PARENTS,
    Clips,
    make_clips,
)


def clips(holds: float = 0.5, noise: float = 0.0, count: int = 40) -> Clips:
    return make_clips(np.random.default_rng(3), count, 27, holds=holds, noise=noise)


def test_bones_keep_their_length_and_both_sides_are_alike():
    joints_BFJ3 = clips().joints.astype(np.float64)
    length_BFJ = np.linalg.norm(joints_BFJ3[:, :, 1:] - joints_BFJ3[:, :, PARENTS[1:]], axis=-1)
    assert length_BFJ.min() > 0.1
    np.testing.assert_allclose(length_BFJ, length_BFJ[:, :1].repeat(27, 1), rtol=1e-5)
    bone = dict(zip(JOINTS[1:], length_BFJ[:, 0].T, strict=True))
    for right in (name for name in bone if name.startswith("right")):
        np.testing.assert_allclose(bone[right], bone[right.replace("right", "left")], rtol=1e-5)
    # Bodies differ in size alone.
    np.testing.assert_allclose(bone["right foot"] / bone["head"], 454 / 115, rtol=1e-4)
    assert 0.95 <= bone["head"].min() / 0.115 < bone["head"].max() / 0.115 <= 1.05


def test_the_camera_sees_the_joints_in_perspective():
    made = clips()
    place_BFJ3 = made.joints + made.root[:, :, None]
    assert made.joints[:, :, 0].any() == np.False_ and place_BFJ3[..., 2].min() > 2
    np.testing.assert_allclose(
        made.poses, FOCAL * place_BFJ3[..., :2] / place_BFJ3[..., 2:], rtol=1e-4, atol=1e-5
    )
    noisy = clips(noise=0.01).poses - made.poses
    assert noisy.std() == pytest.approx(0.01, rel=0.02) and abs(noisy.mean()) < 1e-3


def test_bodies_stand_upright_and_are_seen_from_all_sides():
    joints_BFJ3 = clips(count=200).joints
    by_name = {name: joints_BFJ3[:, 0, j] for j, name in enumerate(JOINTS)}
    assert (by_name["head"][:, 1] < by_name["left foot"][:, 1]).all()  # y goes down
    across_B3 = by_name["right hip"] - by_name["left hip"]
    assert 0.4 < (across_B3[:, 0] > 0).mean() < 0.6
    assert 0.4 < (across_B3[:, 2] > 0).mean() < 0.6


@pytest.mark.parametrize(("side", "sign"), [("knee", -1), ("elbow", 1)])
def test_hinges_bend_one_way(side, sign):
    """Knees bend backward and elbows forward, which is what tells front from back."""
    joints_BFJ3 = clips(count=100).joints
    upper, end = ("hip", "foot") if side == "knee" else ("shoulder", "wrist")
    place = {name: joints_BFJ3[:, :, j] for j, name in enumerate(JOINTS)}
    for body_side in ("left", "right"):
        first = place[f"{body_side} {side}"] - place[f"{body_side} {upper}"]
        second = place[f"{body_side} {end}"] - place[f"{body_side} {side}"]
        angle = np.arccos(
            (first * second).sum(-1)
            / (np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1))
        )
        assert angle.max() < 1.65 and angle.std() > 0.1
    right_B3 = (place["right hip"] - place["left hip"]).astype(np.float64)
    turn_BF = (np.cross(first, second) * right_B3).sum(-1)
    # About the body's right, up to how hips and shoulders twist.
    assert (np.sign(turn_BF) == sign).mean() > 0.9


def test_held_poses_stand_still_and_the_others_move():
    made = clips(holds=1.0)
    step_BF = np.linalg.norm(np.diff(made.joints[:, :, 16], axis=1), axis=-1)
    still_BF = made.still[:, 1:]
    assert (step_BF[still_BF] == 0).all()
    assert step_BF[~still_BF].mean() / FRAME_SECONDS > 1.0  # metres a second, of a wrist
    assert not made.still[:, 0].any()
    assert (made.still.sum(axis=1) >= 3).all() and 0.3 < made.still.mean() < 0.7
    assert not clips(holds=0.0).still.any()
    held = clips(holds=0.5, count=400).still.any(axis=1).mean()
    assert 0.4 < held < 0.6


def test_the_models_that_are_compared_see_the_same_clips_and_begin_alike():
    task = make_task("poses", "tiny")
    batches = [task.batch(stage, 0) for stage in ("untouched", "hot", "uniform")]
    for other in batches[1:]:
        assert torch.equal(batches[0]["poses"], other["poses"])
    assert not torch.equal(task.batch("first", 0)["poses"], batches[0]["poses"])
    modules = task.build()
    task.begin("untouched", modules)
    for name in ("hot", "uniform"):
        for key, weight in modules["untouched"].state_dict().items():
            assert torch.equal(modules[name].state_dict()[key], weight)
        assert [module for module, _ in task.groups(name, modules)] == [modules[name]]


def test_equal_distances_are_kept_inside_hot():
    task = make_task("poses", "tiny")
    model = task.build()["uniform"].eval()
    poses = task.batch("first", 0)["poses"]
    with torch.no_grad(), foveate.reduce(model, UniformFrames(layer=1), tokens=KEPT) as run:
        found = model(poses)
    assert found.shape == (2, 27, 17, 3)
    assert run.report.block_lengths == [27, 9, 9, 9]
    assert run.encoder_reduction.anchor_BM.tolist() == [list(range(1, 27, 3))] * 2


def test_the_error_is_in_mm_and_leaves_the_root_out():
    true = torch.zeros(2, 3, 17, 3)
    found = true.clone()
    found[0, 1, 5] = torch.tensor([0.0, 0.03, 0.04])
    found[:, :, 0] = 9.0
    torch.testing.assert_close(joint_errors(found, true), torch.tensor([50 / 51, 0.0]))


@pytest.mark.parametrize(("hot", "near", "better"), [(104.0, True, True), (106.0, False, False)])
def test_the_bars_are_those_of_the_card(hot, near, better):
    spread = torch.linspace(-1, 1, 50)
    errors = {
        "untouched": 100 + spread,
        "hot": hot + spread,
        "uniform": 105 + 2 * spread,
        "hot, untrained": 200 + spread,
        "uniform, untrained": 300 + spread,
    }
    measured = {name: Measured(error_C, 0.5) for name, error_C in errors.items()}
    rows = judged("holds", measured, compares=True)
    error, gain, untrained = (row for row in rows if row.bar)
    assert error.metric == "error (mm)" and error.met is near
    assert error.value == pytest.approx(hot)
    assert gain.metric == untrained.metric == "below equally spaced frames (mm)"
    assert gain.met is better and gain.value == pytest.approx(105 - hot, abs=1e-3)
    assert untrained.met and untrained.value == pytest.approx(100)
    without = judged("no holds", measured, compares=False)
    assert [row.recipe for row in without] == [row.recipe for row in rows[:-2]]
