"""The task `scan`: its pictures, its baseline, and what its stages train."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch

import foveate
from foveate.training import make_task
from foveate.training.tasks.scan import (
    RETAIN,
    RandomPatches,
    Scan,
    as_input,
    evenness,
    listen,
)
from foveate.training.tasks.scan_data import BANDS, draw_pictures
from foveate.training.tasks.scan_measure import Measured, outcome_rows


def scan() -> Scan:
    task = make_task("scan", "tiny")
    assert isinstance(task, Scan)
    return task


def test_three_bright_shapes_lie_in_bands_of_their_own_and_one_is_a_ring():
    """A ring is dark in its middle, which is on the way through its band where it is bright."""
    pictures, labels = draw_pictures(np.random.default_rng(0), 200, 64)
    bright = (pictures > 130).all(1)
    rows = bright.reshape(200, BANDS, 16, 64).sum((2, 3))
    assert ((rows > 40).sum(1) == 3).all()
    assert set(labels.tolist()) == set(range(BANDS))
    for picture, label in zip(bright, labels, strict=True):
        band = picture[16 * label : 16 * label + 16]
        columns = np.flatnonzero(band.sum(0) > 2)
        assert not band[6:10, round(columns.mean())].all()
    area = rows[np.arange(200), labels].mean()
    radius = (0.1 + 0.13) / 2 * 64
    assert area == pytest.approx(0.7 * np.pi * radius**2, rel=0.15)


def test_random_patches_keep_as_many_and_cls_and_other_ones():
    torch.manual_seed(0)
    task = scan()
    model = task.build()["dense"].eval()
    images = as_input(task.batch("dense", 0)["pixels"])
    anchors = {}
    with torch.no_grad():
        for name, method in (("tovim", "tovim"), ("random", RandomPatches())):
            with foveate.reduce(model, method, retain=RETAIN) as run:
                model(images)
                anchors[name] = run.encoder_reduction.anchor_BM
                lengths = run.report.block_lengths
            assert lengths[0] == 17 and lengths[-1] == 9
    assert anchors["random"].shape == anchors["tovim"].shape
    assert bool((anchors["random"][:, 4] == 8).all())  # [CLS] in the middle of the sequence
    assert not torch.equal(anchors["random"], anchors["tovim"])


def test_fine_tuning_goes_on_from_the_dense_model_with_pruning_on():
    torch.manual_seed(0)
    task = scan()
    modules = task.build()
    task.begin("pruned", modules)
    for name, value in modules["dense"].state_dict().items():
        assert torch.equal(modules["pruned"].state_dict()[name], value)
    batch = task.batch("pruned", 0)
    pruned, _ = task.loss("pruned", modules, batch)
    whole, _ = task.loss("dense", modules, batch)
    assert pruned.item() != whole.item()
    pruned.backward()
    model = modules["pruned"]
    blind = [name for name, p in model.named_parameters() if p.grad is None]
    assert not blind
    # Nothing is left attached.
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dark_patch_is_a_step_without_input_at_the_start():
    """As the method takes dropped patches: nothing comes in, and the step has its bias's size."""
    torch.manual_seed(0)
    task = scan()
    model = task.build()["dense"].eval()
    with torch.no_grad(), ExitStack() as stack:
        heard = listen(model, stack)
        model(torch.zeros(1, 3, 32, 32))
    assert len(heard) == 2 * len(model.layers)
    steps = heard[0].shape[1]
    assert heard[0][0, steps // 2] > 0 and heard[0][0].count_nonzero() <= 4  # [CLS], convolved
    assert not model.layers[0].mixer.x_proj._forward_pre_hooks
    for group, _ in task.groups("dense", {"dense": model}):
        assert not {id(model.pos_embed), id(model.cls_token)} & {id(p) for p in group.parameters()}


def test_evenness_does_not_know_how_loud_it_is():
    loud = torch.rand(3, 9) + 0.1
    assert torch.allclose(evenness(loud), evenness(100 * loud))
    assert evenness(loud) < evenness(loud + 1) < 1
    assert evenness(torch.zeros(1, 4)) == 0


def measured_runs(right: dict[str, float], far: dict[str, float]) -> dict[str, Measured]:
    wave = torch.arange(2000) % 2
    return {
        name: Measured(
            [100.0 * (torch.arange(2000) < 20 * value).float()],
            [far.get(name, 20.0) + 0.01 * wave * len(name)],
        )
        for name, value in right.items()
    }


def test_bars_compare_what_they_say():
    right = {
        "untouched": 95.0,
        "aligned": 80.0,
        "naive": 70.0,
        "random": 50.0,
        "aligned, fewer": 40.0,
        "naive, fewer": 40.0,
        "random, fewer": 20.0,
        "tuned aligned": 93.5,
        "tuned naive": 90.0,
    }
    found = measured_runs(right, {"aligned": 10.0, "naive, fewer": 10.0})
    met = [row.met for row in outcome_rows(found, 0.5, 0.3) if row.bar]
    # Equal is not above; 1.5 points is within; nearer; not nearer.
    assert met == [True, False, True, True, False]
    found = measured_runs(right | {"tuned aligned": 93.4}, {})
    rows = outcome_rows(found, 0.5, 0.3)
    assert next(row for row in rows if "within" in row.bar).met is False
