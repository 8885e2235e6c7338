"""Shorter sequences inside encoders: the same numbers as a forward pass written by hand.

Legend: B images, N tokens of one of them (prefix included), P patches, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from attach_suite import logits_of, model_of
from encoder_methods import METHODS, ByHand, Keep, Pairs, Reverse
from oracle_methods import _card

import foveate
from foveate.core import EncoderAttentionView, Method
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from tiny import TINY_ENCODERS, tiny_encoder, tiny_inputs, tiny_model

FAMILIES = ("llava", "llava_onevision", "video_llava", "internvl", "smolvlm")
every_encoder = pytest.mark.parametrize("family", TINY_ENCODERS)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.encoder_point)
CLOSE = {"atol": 2e-5, "rtol": 0}


def images(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def inputs_of(module: torch.nn.Module, call) -> torch.Tensor:
    """The first argument of a module's first call while `call` runs."""
    seen = []

    def spy(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(spy, with_kwargs=True)
    with torch.no_grad():
        call()
    handle.remove()
    return seen[0]


def by_hand(model, tower, method, pixels) -> tuple[torch.Tensor, ByHand]:
    """Output of the feature block of a shortened encoder, not restored."""
    reference = ByHand(tower, method)
    with torch.no_grad():
        return reference(inputs_of(tower.blocks[0], lambda: model(pixels)), 3), reference


@every_encoder
@every_method
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_shortened_encoder_equals_the_loop_by_hand(family, method, attn):
    model, pixels = tiny_encoder(family, attn=attn), images()
    tower = adapter_for(model).tower(model)
    expected, reference = by_hand(model, tower, method, pixels)
    outputs = []
    with torch.no_grad(), foveate.reduce(model, method, retain=0.5) as run:
        handle = tower.blocks[-1].register_forward_hook(lambda m, a, out: outputs.append(out))
        out = model(pixels, output_hidden_states=True)
        handle.remove()
    got = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(got, expected, **CLOSE)
    assert out.last_hidden_state.shape == expected.shape
    # transformers recorded what each block really gave to the next one.
    torch.testing.assert_close(out.hidden_states[-1], expected, **CLOSE)
    assert [state.shape[1] for state in out.hidden_states][-1] < out.hidden_states[1].shape[1]
    assert run.encoder_reduction.groups_BN.tolist() == reference.reduction.groups_BN.tolist()
    assert run.report.stages[0].after == (expected.shape[1],) * 2


@every_encoder
def test_restoring_brings_every_token_back(family):
    model, pixels, method = tiny_encoder(family), images(), Pairs()
    tower = adapter_for(model).tower(model)
    short, reference = by_hand(model, tower, method, pixels)
    with torch.no_grad():
        full = model(pixels).last_hidden_state.shape
        with foveate.reduce(model, method, restore=True):
            block_out = inputs_of(tower.blocks[3], lambda: model(pixels))
            out = model(pixels, output_hidden_states=True)
    assert out.last_hidden_state.shape == full and block_out.shape[1] < full[1]
    expected = reference.reduction.restore(short)
    torch.testing.assert_close(out.hidden_states[-1], expected, **CLOSE)


@every_encoder
def test_reducing_nothing_is_bit_identical(family):
    model, pixels = tiny_encoder(family), images()
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
        with foveate.reduce(model, Keep(), retain=0.5):
            got = model(pixels, output_hidden_states=True)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert all(map(torch.equal, got.hidden_states, expected.hidden_states))


@pytest.mark.parametrize("family", ["dinov2", "siglip"])
def test_another_order_is_not_taken_for_no_reduction(family):
    """Attention and MLP do not mind the order, so all that changes is where things are."""
    model, pixels = tiny_encoder(family), images()
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        with foveate.reduce(model, Reverse(), retain=0.5) as run:
            turned = model(pixels).last_hidden_state
    assert (turned - expected).abs().max() > 0.1
    torch.testing.assert_close(run.encoder_reduction.restore(turned), expected, **CLOSE)


def features_with(model, tower, pixels, feature_block_output=None):
    """Projected features; the feature block's output is replaced if one is given."""
    base = adapter_for(model).base(model)
    handle = None
    if feature_block_output is not None:

        def replace(module, args, output):
            if isinstance(output, tuple):
                return (feature_block_output, *output[1:])
            return feature_block_output

        # Before the hooks with which transformers records hidden states.
        handle = tower.blocks[tower.feature_block].register_forward_hook(replace, prepend=True)
    with torch.no_grad():
        found = base.get_image_features(**pixels, return_dict=True).pooler_output
    if handle is not None:
        handle.remove()
    return found if isinstance(found, torch.Tensor) else torch.cat(list(found))


def image_arguments(family: str) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(family, modality="image")
    return {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}


@pytest.mark.parametrize("family", FAMILIES)
@every_method
@pytest.mark.parametrize("recorded_first", [True, False], ids=["after", "before"])
def test_inside_a_language_model(family, method, recorded_first):
    """The projector gets full length, whichever came first: our hooks or those of transformers."""
    pixels = image_arguments(family)
    model = model_of(family)
    tower = adapter_for(model).towers(model)["image"]
    entered = inputs_of(tower.blocks[0], lambda: features_with(model, tower, pixels))
    reference = ByHand(tower, method)
    with torch.no_grad():
        short = reference(entered, tower.feature_block)
    restored = reference.reduction.restore(short)
    expected = features_with(model, tower, pixels, restored)
    untouched = features_with(model, tower, pixels)
    if not recorded_first:
        model = tiny_model(family)  # never called before
        tower = adapter_for(model).towers(model)["image"]
    with foveate.reduce(model, method, retain=0.5):
        got = features_with(model, tower, pixels)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert got.shape == untouched.shape and (got - untouched).abs().max() > 1e-3
    assert torch.equal(features_with(model, tower, pixels), untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_reducing_nothing_inside_a_language_model_is_bit_identical(family):
    model, inputs = model_of(family), tiny_inputs(family)
    expected = logits_of(model, inputs)
    with foveate.reduce(model, Keep(), retain=0.5):
        assert torch.equal(logits_of(model, inputs), expected)


@dataclass(frozen=True)
class Reads(Method):
    """Notes a signal in the report."""

    card = _card("reads", "projector")
    needs = ("encoder.cls_attention", "encoder.received_attention")

    def projector(self, tokens, context):
        for name in self.needs:
            context.note(name, context.signal(name))
        return None


@every_method
def test_signals_of_a_shortened_encoder(method):
    """Attention as the block computed it, shared out among the patches that a token stands for."""
    model, inputs = model_of("llava", attn="eager"), tiny_inputs("llava")
    tower = adapter_for(model).towers(model)["image"]
    entered = inputs_of(tower.blocks[0], lambda: logits_of(model, inputs))
    reference = ByHand(tower, method)
    with torch.no_grad():
        reference(entered, tower.feature_block)
    rows_BHMM, reduction = reference.attention_rows, reference.reduction_of_rows
    size_BM = reference.sizes_of_rows
    share_BM = rows_BHMM[:, :, 0].mean(1) / size_BM
    received = rows_BHMM[:, :, 1:, 1:]
    received = received / received.sum(-1, keepdim=True) * size_BM[:, None, 1:, None]
    taken_BP = received.sum(2).mean(1) / size_BM[:, 1:].sum(1) / size_BM[:, 1:]
    taken_BM = torch.nn.functional.pad(taken_BP, (1, 0))
    with foveate.reduce(model, [method, Reads()], retain=0.5, evidence=True) as run:
        logits_of(model, inputs)
    (item,) = run.report.items
    noted = {entry.name: entry.value for entry in item.evidence}
    for name, score_BM in (
        ("encoder.cls_attention", share_BM),
        ("encoder.received_attention", taken_BM),
    ):
        expected = reduction.restore(score_BM)[0, 1:]
        torch.testing.assert_close(noted[name], expected, atol=1e-6, rtol=1e-4)


def test_signals_of_merged_copies_are_those_of_the_copies():
    """Tokens that are equal may be merged: with sizes, nothing changes for anybody."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 6, 8, generator=generator) * 2 for _ in range(2))
    size_BN = torch.tensor([[1.0, 1, 3, 1, 2, 1]]).expand(2, -1)
    copies = torch.tensor([0, 1, 2, 2, 2, 3, 4, 4, 5])
    view = EncoderAttentionView(q, k, num_prefix=1, has_cls=True)
    each = replace(view, q_IHMd=q[:, :, copies], k_IHMd=k[:, :, copies])
    for score in (EncoderAttentionView.cls, lambda view: view.received(keys="patches")):
        merged = score(replace(view, size_IM=size_BN))
        whole = score(each)
        torch.testing.assert_close(merged[:, copies[1:] - 1], whole)
        torch.testing.assert_close((merged * size_BN[:, 1:]).sum(1), whole.sum(1))


@pytest.mark.parametrize("method", [Pairs(), Pairs(proportional=False)], ids=["sizes", "plain"])
def test_sizes_weigh_in_attention_only_if_the_method_says_so(method):
    model, pixels = tiny_encoder("vit"), images()
    tower = adapter_for(model).tower(model)
    expected, _ = by_hand(model, tower, method, pixels)
    masks = []

    def note(module, args, kwargs):
        masks.append(args[1] if len(args) > 1 else kwargs.get("attention_mask"))

    with torch.no_grad(), foveate.reduce(model, method):
        for attention in tower.attentions:
            attention.register_forward_pre_hook(note, with_kwargs=True)
        out = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1], expected, **CLOSE)
    assert masks[0] is None and (masks[-1] is not None) == method.proportional


def test_padding_masks_inside_the_encoder_are_refused():
    model = tiny_encoder("vit")
    tower = adapter_for(model).tower(model)
    x_BNC = inputs_of(tower.blocks[0], lambda: model(images()))
    mask = torch.zeros(2, 1, 1, x_BNC.shape[1])

    def pad(module, args, kwargs):
        return (args[0], mask), {k: v for k, v in kwargs.items() if k != "attention_mask"}

    handle = tower.blocks[2].register_forward_pre_hook(pad, with_kwargs=True)
    with (
        torch.no_grad(),
        foveate.reduce(model, Pairs()),
        pytest.raises(AttachmentError, match="padding mask"),
    ):
        model(images())
    handle.remove()
