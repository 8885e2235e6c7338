"""Attaching, failing and removing: the model is as it was, and says clearly what it cannot do."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from attach_suite import TOLERANCE, attach, batch_of, greedy, logits_of, model_of, one_of
from method_table import METHOD_TABLE
from oracle_methods import EveryOther, EveryOtherAtEntry, EveryOtherSlot, _card
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import foveate
from foveate.attach.encoder import EncoderStage
from foveate.core import Method, Reduction
from foveate.errors import AttachmentError, UnknownMethodError
from foveate.models.registry import adapter_for
from tiny import TINY_ENCODERS, TINY_FAMILIES, tiny_encoder, tiny_inputs, tiny_model

FAMILY = "llava_onevision"


def snapshot(model: nn.Module) -> dict[str, dict]:
    """Everything every module holds; containers are copied, the rest compared by identity."""
    taken = {}
    for name, module in model.named_modules():
        taken[name] = {
            key: type(value)(value) if isinstance(value, (dict, list, set, OrderedDict)) else value
            for key, value in vars(module).items()
        }
    return taken


def assert_same(before: dict[str, dict], after: dict[str, dict]) -> None:
    assert before.keys() == after.keys()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        for key, value in attributes.items():
            now = after[name][key]
            if isinstance(value, dict):
                assert list(value) == list(now), (name, key)
                assert all(value[k] is now[k] for k in value), (name, key)
            elif isinstance(value, (list, set)):
                assert value == now, (name, key)
            else:
                assert value is now or value == now, (name, key)


@pytest.fixture
def model():
    """A model of the cache, checked to be clean before and after."""
    found = model_of(FAMILY)
    logits_of(found, one_of(FAMILY), output_hidden_states=True)  # transformers' own hooks
    before = snapshot(found)
    yield found
    assert_same(before, snapshot(found))


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


def test_double_attachment_is_refused(model):
    base = adapter_for(model).base(model)
    with foveate.reduce(model, "divprune", retain=0.5):
        for part, recipe in ((model, "random"), (base, "random"), (base.vision_tower, "tome")):
            with pytest.raises(AttachmentError, match="carries divprune already"):
                foveate.reduce(part, recipe)
        assert logits_of(model, one_of(FAMILY)).shape[1] < one_of(FAMILY)["input_ids"].shape[1]
    with (
        foveate.reduce(base.vision_tower, "tome", restore=True),
        pytest.raises(AttachmentError, match="carries tome already"),
    ):
        foveate.reduce(model, "divprune")
    with foveate.reduce(base, "random", retain=0.5) as run, torch.no_grad():
        base(**one_of(FAMILY))
        by_name = run.report.visual_after
        ids, pixels = one_of(FAMILY)["input_ids"], one_of(FAMILY)["pixel_values_videos"]
        run.report = foveate.core.Report()
        names = list(inspect.signature(type(base).forward).parameters)[1:]
        given = {"input_ids": ids, "pixel_values_videos": pixels}
        last = names.index("pixel_values_videos")
        base(*[given.get(name) for name in names[: last + 1]])  # arguments by position
        assert run.report.visual_after == by_name < run.report.visual_before


def test_failing_to_attach_leaves_nothing(model, monkeypatch):
    for recipe, options, error, match in (
        ("holytom", {}, UnknownMethodError, "holitom"),
        ("holitom", {"tao": 0.5}, ValueError, "tao"),
        ("holitom(tau=7)", {}, ValueError, "tau"),
        ("fastv(layer=9)", {}, ValueError, "4 layers"),
        (EveryOther((1, 4)), {}, AttachmentError, "before layer 4"),
        ("holitom(scores='cls')", {}, AttachmentError, "no .CLS. token"),
        ("divprune", {"retain": 1.5}, ValueError, "retain"),
        ("divprune", {"retain": 0.5, "tokens": 3}, ValueError, "not both"),
        ("divprune", {"positions": "compressed"}, ValueError, "positions"),
    ):
        with pytest.raises(error, match=match):
            foveate.reduce(model, recipe, **options)
    with pytest.raises(ValueError, match="no adapter"):
        foveate.reduce(nn.Linear(2, 2), "divprune")
    # Whatever fails half-way through: the hooks that are in place come off.
    for broken in ("_before_mlp", "_after_block"):
        with monkeypatch.context() as patch:
            patch.setattr(EncoderStage, broken, lambda self, index: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                foveate.reduce(model, "tome + divprune(retain=0.5)")
    with attach("divprune", model) as run:
        assert run.attached


def test_fastervlm_falls_back_where_there_is_no_cls(model):
    with attach("fastervlm", model) as run:
        logits_of(model, one_of(FAMILY))
    assert run.report.visual_after < run.report.visual_before
    with pytest.raises(AttachmentError, match="is an encoder alone"):
        foveate.reduce(tiny_encoder("siglip"), "fastv")


def test_several_feature_layers_need_a_whole_encoder():
    model = tiny_model("llava", vision_feature_layer=[-3, -2])
    with pytest.raises(AttachmentError, match="one feature layer"):
        foveate.reduce(model, "tome")
    with foveate.reduce(model, "divprune", retain=0.5) as run:
        logits_of(model, one_of("llava"))
    assert run.report.retained == 0.5


class Quantised(DynamicLayer):
    pass


def test_caches_that_cannot_be_shortened_are_refused(model):
    inputs, config = one_of(FAMILY), adapter_for(model).text_config(model)
    quantised = DynamicCache()
    quantised.layers = [Quantised() for _ in range(4)]
    offloaded = DynamicCache()
    offloaded.offloading = True
    static = StaticCache(config=config, max_cache_len=256)
    expected = logits_of(model, inputs)
    for method in (EveryOther((2,)), EveryOtherAtEntry(), EveryOtherSlot()):
        with foveate.reduce(model, method, retain=0.5):
            for cache, match in (
                (static, "static cache"),
                (quantised, "Quantised"),
                (offloaded, "offloaded"),
            ):
                with pytest.raises(AttachmentError, match=match):
                    model(**inputs, past_key_values=cache)
    assert torch.equal(logits_of(model, inputs), expected)
    own = tiny_model(FAMILY)  # transformers leaves traces of a static cache on its model
    with (
        foveate.reduce(own, EveryOther((2,)), retain=0.5),
        pytest.raises(AttachmentError, match="static cache"),
    ):
        own.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_sliding_windows_are_refused():
    model = tiny_model(FAMILY)
    config = adapter_for(model).text_config(model)
    config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(AttachmentError, match="sliding_attention layers"):
        foveate.reduce(model, "divprune")


def test_a_shortened_cache_does_not_leave_its_recipe(model):
    with foveate.reduce(model, EveryOther((2,)), retain=0.5):
        out = greedy(model, one_of(FAMILY), 2)
    with torch.no_grad(), pytest.raises(AttachmentError, match="This cache was shortened"):
        model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)


def test_calls_that_cannot_be_reduced_are_refused(model):
    inputs = one_of(FAMILY)
    length = inputs["input_ids"].shape[1]
    expected = logits_of(model, inputs)
    with attach("divprune", model) as run:
        with pytest.raises(AttachmentError, match="labels have the length"):
            model(**inputs, labels=inputs["input_ids"])
        square = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with pytest.raises(AttachmentError, match="2-D attention mask"):
            model(**{**inputs, "attention_mask": square})
        run.budget = 1.0
        assert torch.isfinite(model(**inputs, labels=inputs["input_ids"]).loss)
        assert torch.equal(logits_of(model, inputs), expected)


def test_gradient_checkpointing_is_refused():
    model = tiny_model("llava").train()
    for layer in adapter_for(model).layers(model):
        layer.gradient_checkpointing = True
    with (
        attach("fastv", model),
        pytest.raises(AttachmentError, match="runs layers again"),
    ):
        model(**one_of("llava"), use_cache=False)


def test_copies_of_an_attached_model_are_refused(model):
    for recipe in ("divprune", "tome"):
        with foveate.reduce(model, recipe, retain=0.5):
            with pytest.raises(AttachmentError, match="copied or pickled"):
                copy.deepcopy(model)
            with pytest.raises(Exception, match=r"copied or pickled|pickle"):
                pickle.dumps(model)
    encoder = tiny_encoder("vit")
    with (
        foveate.reduce(encoder, "tome"),
        pytest.raises(AttachmentError, match="copied or pickled"),
    ):
        copy.deepcopy(encoder)
    twin = copy.deepcopy(encoder)
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(twin(pixels).last_hidden_state, encoder(pixels).last_hidden_state)


def test_compiled_models_are_refused():
    with pytest.raises(AttachmentError, match="is compiled"):
        attach("divprune", torch.compile(tiny_model("llava"), backend="eager"))
    encoder = tiny_encoder("vit")
    encoder.compile(backend="eager")
    with pytest.raises(AttachmentError, match="is compiled"):
        attach("tome", encoder)


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
