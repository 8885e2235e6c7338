"""Recipes of several methods on one model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import foveate
from foveate.core import PRESETS, Card, Method, Reduction
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
    with torch.no_grad(), foveate.reduce(model, recipe, retain=0.25) as run:
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
    with pytest.raises(RecipeError, match="put it first"):
        foveate.reduce(model, "divprune(retain=0.5) + holitom", retain=0.5)
    assert not any(module._forward_hooks for module in model.model.language_model.layers)


@dataclass(frozen=True)
class Padded(Method):
    """Returns a reduction with a padded target, as a batched method might."""

    card = Card("padded", "Padded", "test", ("projector",), "baseline", "For tests.")

    def projector(self, tokens, context):
        index = torch.tensor([[0, 5, -1]])
        return Reduction.select(index, tokens.num_tokens, mask_BM=index >= 0)


def test_padding_of_a_reduction_never_becomes_a_token(model, video):
    with torch.no_grad(), foveate.reduce(model, Padded(), retain=0.5) as run:
        out = model(**video)
    item = run.report.items[0]
    assert item.after == 2
    assert item.reduction.anchor_BM.tolist() == [[0, 5]]
    assert out.logits.shape[1] == video["input_ids"].shape[1] - item.before + 2


@pytest.mark.parametrize(
    ("recipe", "each"),
    [
        ("divprune + fastv", (0.5, 0.5)),
        ("divprune(share=3) + fastv", (0.25**0.75, 0.25**0.25)),
        ("divprune(retain=0.4) + fastv", (0.4, 0.625)),
    ],
)
def test_the_budget_is_what_all_leave_together(model, video, recipe, each):
    with torch.no_grad(), foveate.reduce(model, recipe, retain=0.25) as run:
        model(**video)
    report = run.report
    before, text = report.visual_before, report.prompt_lengths[0] - report.visual_after
    left = report.layer_lengths[0][-1] - text
    assert abs(left - 0.25 * before) <= 2
    if "fastv" in recipe:
        assert abs(report.visual_after - each[0] * before) <= 2
        assert abs(left - each[1] * report.visual_after) <= 2


def test_a_count_is_what_all_leave_together(model, video):
    with torch.no_grad(), foveate.reduce(model, "divprune + fastv", tokens=4) as run:
        model(**video)
    report = run.report
    text = report.prompt_lengths[0] - report.visual_after
    assert report.layer_lengths[0][-1] - text == 4
    assert report.visual_after == round((4 * report.visual_before) ** 0.5)


@pytest.mark.parametrize("name", PRESETS)
def test_named_recipes_run(model, video, name):
    with torch.no_grad(), foveate.reduce(model, name, retain=0.25) as run:
        out = model.generate(**video, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == video["input_ids"].shape[1] + 2
    report = run.report
    before, text = report.visual_before, report.prompt_lengths[0] - report.visual_after
    if PRESETS[name].recipe.stages != ("encoder",):  # that one gives its tokens back
        assert report.layer_lengths[0][-1] - text <= 0.25 * before + 2
    if "encoder" in PRESETS[name].recipe.stages:
        assert report.flops["reduced"]["encoder"] < report.flops["untouched"]["encoder"]


# -- the preset "fast" -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "video_llava"])
@pytest.mark.parametrize(("retain", "left"), [(None, 0.12), (0.4, 0.4)])
def test_fast_shortens_the_encoder_of_videos(family, retain, left):
    model = tiny_model(family)
    inputs = tiny_inputs(family, modality="video", frames=4)
    with torch.no_grad(), foveate.reduce(model, "fast", retain=retain) as run:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    report = run.report
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2
    assert {(s.stage, s.method) for s in report.stages} == {("encoder", "centerclip")}
    shortened = report.stages[0]
    assert shortened.after[0] == pytest.approx(left * shortened.before[0], abs=2)
    # The projector gets every frame at full length.
    assert report.visual_after == report.visual_before
    assert report.flops["reduced"]["encoder"] < report.flops["untouched"]["encoder"]


@pytest.mark.parametrize(("family", "modality"), [("llava", "image"), ("internvl", "video")])
def test_fast_leaves_the_encoder_of_single_images_alone(family, modality):
    model, inputs = tiny_model(family), tiny_inputs(family, modality=modality, frames=4)
    with torch.no_grad():
        plain = model(**inputs).logits
        with foveate.reduce(model, "fast") as run:
            assert torch.equal(model(**inputs).logits, plain)
    assert not run.report.stages
    assert run.report.flops["reduced"]["encoder"] == run.report.flops["untouched"]["encoder"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_fast_is_refused_by_packed_encoders(family):
    with pytest.raises(AttachmentError, match="centerclip acts inside the encoder"):
        foveate.reduce(tiny_model(family), "fast")


def test_fast_at_one_changes_nothing(model, video):
    with torch.no_grad():
        plain = model(**video).logits
        with foveate.reduce(model, "fast", retain=1.0):
            assert torch.equal(model(**video).logits, plain)
