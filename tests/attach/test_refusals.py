"""What cannot be attached or reduced is refused with a reason, and leaves nothing behind."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass

import pytest
import torch
from attach_suite import (
    attach,
    greedy,
    logits_of,
    one_of,
)
from oracle_methods import EveryOther, EveryOtherAtEntry, EveryOtherSlot, _card
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import foveate
from foveate.attach.encoder import EncoderStage
from foveate.core import Method, Reduction
from foveate.errors import AttachmentError, UnknownMethodError
from foveate.models.registry import adapter_for
from tiny import tiny_encoder, tiny_model

FAMILY = "llava_onevision"


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


@dataclass(frozen=True)
class Misplaces(Method):
    """Puts two tokens in one place, or new ones in none."""

    card = _card("misplaces", "decoder")
    anchors: tuple[int, ...] = (1, 1)

    def decoder_layers(self, num_layers):
        return (2,)

    def decoder(self, tokens, context):
        if not self.anchors:
            return Reduction.synthesise(tokens.x_BND[:, :3], tokens.num_tokens)
        return Reduction.select(torch.tensor(self.anchors), tokens.num_tokens)


@pytest.mark.parametrize("anchors", [(1, 1), (5, 2, 5), ()])
def test_tokens_need_places_of_their_own_in_the_language_model(model, anchors):
    with (
        foveate.reduce(model, Misplaces(anchors), retain=0.5),
        pytest.raises(ValueError, match=r"misplaces: .* in the place of one of their sources"),
    ):
        model(**one_of(FAMILY))
    order = (9, 0, 4)  # any order is right: places are filled in that of the prompt
    with foveate.reduce(model, Misplaces(order), retain=0.5) as run:
        logits_of(model, one_of(FAMILY))
    assert run.report.items[0].alive[2].tolist() == sorted(order)


@pytest.mark.parametrize("size", [8, 40, 200])
def test_prefill_in_chunks_is_refused(model, size):
    with (
        attach("divprune", model),
        pytest.raises(AttachmentError, match="prefill_chunk_size=None"),
    ):
        model.generate(**one_of(FAMILY), max_new_tokens=2, prefill_chunk_size=size)
