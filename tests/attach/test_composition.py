"""Recipes of several methods on one model."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.errors import AttachmentError, RecipeError
from tiny import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava_onevision")


@pytest.fixture(scope="module")
def video():
    return tiny_inputs("llava_onevision", modality="video", frames=8)


def test_second_projector_method_sees_what_the_first_left(model, video):
    recipe = "pool(retain=0.5) + divprune(retain=0.5)"
    with torch.no_grad(), foveate.reduce(model, recipe) as run:
        model(**video)
    with torch.no_grad(), foveate.reduce(model, "pool", retain=0.5) as pooled:
        model(**video)
    item = run.report.items[0]
    assert item.after == round(0.5 * pooled.report.items[0].after)
    assert item.reduction.matrix().shape == (1, item.after, item.before)
    # Provenance runs through both: every survivor averages a rectangle of one frame.
    sources = item.reduction.matrix()[0] > 0
    frames = item.grid.positions()[:, 0]
    assert all(frames[row].unique().numel() == 1 for row in sources)


def test_four_stages_at_once(model, video):
    recipe = "tome(retain=0.7)@encoder + holitom + quickvideo(retain=0.5)"
    with torch.no_grad(), foveate.reduce(model, recipe, retain=0.5) as run:
        out = model.generate(**video, max_new_tokens=3, do_sample=False)
    stages = [(entry.stage, entry.method) for entry in run.report.stages]
    for expected in (("encoder", "tome"), ("projector", "holitom"), ("decoder", "holitom")):
        assert expected in stages
    assert ("cache", "quickvideo") in stages
    assert out.shape[1] == video["input_ids"].shape[1] + 3
    cached, seen = run.report.cache_lengths[0], run.report.layer_lengths[0]
    assert all(slots < tokens for slots, tokens in zip(cached, seen, strict=True))
    assert run.report.flops["reduced"]["encoder"] < run.report.flops["untouched"]["encoder"]


def test_method_that_reads_frames_must_come_first(model):
    with pytest.raises(AttachmentError, match="put it first"):
        foveate.reduce(model, "divprune(retain=0.5) + holitom", retain=0.5)
    assert not any(module._forward_hooks for module in model.model.language_model.layers)


def test_shared_stage_needs_budgets(model):
    with pytest.raises(RecipeError, match="budget of its own"):
        foveate.reduce(model, "pool + divprune", retain=0.5)
