"""Attaching, failing and removing: the model is as it was, and says clearly what it cannot do."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from attach_suite import (
    TOLERANCE,
    assert_same,
    attach,
    batch_of,
    greedy,
    logits_of,
    model_of,
    one_of,
    snapshot,
)
from method_table import METHOD_TABLE
from oracle_methods import EveryOther, EveryOtherAtEntry, _card

import foveate
from foveate.core import Method, Reduction
from foveate.models.registry import adapter_for
from tiny import TINY_ENCODERS, TINY_FAMILIES, tiny_encoder, tiny_inputs, tiny_model

FAMILY = "llava_onevision"


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_removal_restores_every_attribute(family):
    model = tiny_model(family)
    greedy(model, one_of(family), 2)
    before, state = snapshot(model), dict(model.state_dict(keep_vars=True))
    for name, row in METHOD_TABLE.items():
        if family not in row.families:
            continue
        run = attach(name, model)
        greedy(model, one_of(family), 2)
        assert run.attached and "attached" in repr(run)
        run.remove()
        run.remove()
        assert not run.attached and "removed" in repr(run)
        assert_same(before, snapshot(model))
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is value for key, value in state.items())


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_removal_restores_encoders(family):
    model = tiny_encoder(family)
    pixels = torch.randn(2, 3, 48, 48)
    expected = model(pixels).last_hidden_state
    before = snapshot(model)
    with foveate.reduce(model, "tome", retain=0.5):
        assert model(pixels).last_hidden_state.shape[1] < expected.shape[1]
    assert_same(before, snapshot(model))
    assert torch.equal(model(pixels).last_hidden_state, expected)


def test_feature_method_of_the_instance_comes_back(model):
    base = adapter_for(model).base(model)
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return type(base).get_video_features(base, *args, **kwargs)

    base.__dict__["get_video_features"] = own
    try:
        with foveate.reduce(model, EveryOtherAtEntry(), retain=0.5) as run:
            logits_of(model, one_of(FAMILY))
        assert calls == [1] and run.report.visual_after < run.report.visual_before
        assert base.__dict__["get_video_features"] is own
    finally:
        del base.__dict__["get_video_features"]


@dataclass(frozen=True)
class Breaks(Method):
    """Raises at its place while `at` is not empty."""

    card = _card("breaks", "projector")
    at: tuple[str, ...] = ()

    def decoder_layers(self, num_layers):
        return (2,)

    def projector(self, tokens, context):
        return self._act("projector", tokens.num_tokens)

    def decoder(self, tokens, context):
        return self._act("decoder", tokens.num_tokens)

    def encoder(self, tokens, context):
        return self._act("encoder", tokens.num_tokens)

    def cache(self, keys_BGNd, values_BGNd, context):
        return self._act("cache", keys_BGNd.shape[2])

    def _act(self, stage, num):
        if stage in ARMED:
            raise RuntimeError(f"broken at the {stage}")
        if stage == "encoder":
            return None
        return Reduction.select(torch.arange(1, num), num)


ARMED: set[str] = set()


@pytest.mark.parametrize("stage", ["encoder", "projector", "decoder", "cache"])
def test_a_method_that_raises_leaves_the_next_call_right(model, stage):
    untouched = logits_of(model, one_of(FAMILY))
    with foveate.reduce(model, Breaks(), retain=0.5) as run:
        expected = logits_of(model, one_of(FAMILY))[:, -1]
        report = run.report
        ARMED.add(stage)
        try:
            for _ in range(2):
                with pytest.raises(RuntimeError, match=f"broken at the {stage}"):
                    model.generate(**one_of(FAMILY), max_new_tokens=2)
        finally:
            ARMED.clear()
        assert run.report is report, "a call that failed has no report"
        text = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
        assert logits_of(model, text).shape[1] == 4
        assert run.report is report
        assert torch.equal(logits_of(model, one_of(FAMILY))[:, -1], expected)
    assert torch.equal(logits_of(model, one_of(FAMILY)), untouched)


def test_wrong_input_leaves_the_next_call_right(model):
    with attach("holitom", model) as run:
        expected = logits_of(model, one_of(FAMILY))[:, -1]
        short = {k: v[:, 3:] if k == "input_ids" else v for k, v in one_of(FAMILY).items()}
        short["input_ids"] = short["input_ids"][:, :-9]
        with pytest.raises((ValueError, RuntimeError)):
            model(**short)
        # Nothing of the failed call's video may be taken for this call's image.
        image = tiny_inputs(FAMILY, modality="image")
        logits_of(model, image)
        assert [item.modality for item in run.report.items] == ["image"]
        assert torch.equal(logits_of(model, one_of(FAMILY))[:, -1], expected)


def test_two_models_at_once_do_not_mix():
    one, other = model_of(FAMILY), model_of("qwen3_vl")
    with attach("divprune", one):
        expected = logits_of(one, one_of(FAMILY))
    with attach("holitom", other):
        expected_other = logits_of(other, one_of("qwen3_vl"))
    with attach("divprune", one) as run, attach("holitom", other) as other_run:
        assert torch.equal(logits_of(one, one_of(FAMILY)), expected)
        assert torch.equal(logits_of(other, one_of("qwen3_vl")), expected_other)
        assert str(run.report.recipe) != str(other_run.report.recipe)
    with attach("divprune", one):
        assert torch.equal(logits_of(one, one_of(FAMILY)), expected)


@pytest.mark.parametrize("recipe", ["tome(retain=0.6) + holitom", "fastervlm + fastv", "aim"])
def test_threads_do_not_mix(model, recipe):
    prompts = [one_of(FAMILY, 0), one_of(FAMILY, 1), one_of(FAMILY, 2), batch_of(FAMILY)]
    results: dict[int, list] = {}
    with foveate.reduce(model, recipe, retain=0.5):
        expected = [greedy(model, prompt, 3) for prompt in prompts]

        def work(number: int) -> None:
            results[number] = [greedy(model, prompts[number], 3) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, alone in enumerate(expected):
        assert len(results[number]) == 3
        for got in results[number]:
            assert got.sequences.tolist() == alone.sequences.tolist()
            for ours, theirs in zip(got.logits, alone.logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_the_text_model_alone_is_left_alone(model):
    text = adapter_for(model).language_model(model)
    ids = torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        expected = text(input_ids=ids).last_hidden_state
        with attach("divprune", model):
            assert torch.equal(text(input_ids=ids).last_hidden_state, expected)


@pytest.mark.parametrize(
    "recipe",
    ["divprune", "pool", "holitom(inner_layer=2)", "fastv", "tome", EveryOther((1,), merge=True)],
    ids=str,
)
def test_gradients_reach_the_pixels(model, recipe):
    inputs = dict(one_of(FAMILY))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].clone().requires_grad_()
    with foveate.reduce(model, recipe, retain=0.5):
        model(**inputs).logits[0, -1].logsumexp(-1).backward()
    gradient = inputs["pixel_values_videos"].grad
    assert torch.isfinite(gradient).all() and (gradient != 0).float().mean() > 0.3
    model.zero_grad()


@pytest.mark.parametrize("recipe", ["tome(retain=0.6) + holitom", "fastv", "quickvideo"])
def test_nothing_of_a_call_outlives_it(model, recipe):
    alive: list[weakref.ref] = []

    def remember(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        alive.append(weakref.ref(tensor))

    adapter = adapter_for(model)
    tower = adapter.towers(model)["video"]
    watched = [*adapter.layers(model), *tower.blocks, *tower.attentions]
    run = foveate.reduce(model, recipe, retain=0.5)
    handles = [module.register_forward_hook(remember) for module in watched]
    logits_of(model, one_of(FAMILY))
    for handle in handles:
        handle.remove()
    gc.collect()
    assert len(alive) == len(watched) and not any(ref() is not None for ref in alive)
    run.remove()
    handle_ref = weakref.ref(run)
    del run
    gc.collect()
    assert handle_ref() is None
