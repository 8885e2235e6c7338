"""Heads behind an encoder that read all of its tokens: merged ones weigh what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracle_methods import _card
from torch import nn

import foveate
from foveate.core import Method, Reduction
from tiny import VISION, randomize, tiny_encoder

CLOSE = {"atol": 2e-5, "rtol": 0}
CLASSIFIERS = {
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
    ),
    "clip": ("CLIPConfig", "CLIPForImageClassification"),
    "siglip": ("SiglipConfig", "SiglipForImageClassification"),
}
every_classifier = pytest.mark.parametrize("name", CLASSIFIERS)
TOME = "tome(r=3)"


@dataclass(frozen=True)
class Runs(Method):
    """Block 1 averages runs of patches: of two in the first image, of three in the second, ..."""

    card = _card("runs", "encoder")
    proportional_attention = True

    def encoder(self, tokens, context):
        if context.layer != 1:
            return None
        place_N = torch.arange(tokens.num_tokens) - context.num_prefix
        longer_B1 = 2 + torch.arange(tokens.batch)[:, None]
        target_BN = torch.where(place_N < 0, place_N, place_N // longer_B1) + context.num_prefix
        return Reduction.merge(target_BN, int(target_BN.max()) + 1)


def sizes_of(run, num_images: int = 3) -> torch.Tensor:
    """What every token stands for, [B, M]; padding: nothing."""
    reduction = run.encoder_reduction
    assert not reduction.mask_BM.all()
    return reduction.sizes(torch.ones(num_images, reduction.num_in)) * reduction.mask_BM


def classifier(name: str) -> nn.Module:
    """A random classifier of 5 classes around an encoder of 36 patches."""
    import transformers

    config_name, model_name = CLASSIFIERS[name]
    make = getattr(transformers, config_name)
    if name in ("clip", "siglip"):
        text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
        config = make(vision_config=dict(VISION), text_config=text, num_labels=5)
    else:
        config = make(**VISION, mlp_ratio=2, num_labels=5)
    return randomize(getattr(transformers, model_name)(config), 0).eval()


def images(num: int = 2) -> torch.Tensor:
    pixels = torch.randn(num, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    pixels[-1] *= 5
    return pixels


def head_input(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(pixels)
    handle.remove()
    return seen[0]


@every_classifier
def test_the_mean_is_that_of_all_patches(name):
    model, pixels = classifier(name), images()
    with torch.no_grad():
        untouched = model(pixels).logits
        with foveate.reduce(model, TOME, retain=0.5) as run:
            found = model(pixels).logits
        assert run.encoder_reduction.num_out < 36
        with foveate.reduce(model, TOME, retain=0.5, restore=True):
            expected = model(pixels).logits
        again = model(pixels).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - untouched).abs().max() > 1e-3
    assert torch.equal(again, untouched)


@every_classifier
def test_a_mean_that_is_no_mean_of_the_tokens_is_left_alone(name):
    model, pixels = classifier(name), images()
    others = torch.randn(2, model.classifier.in_features)
    for other in (others, others[0], others[None]):
        with torch.no_grad(), foveate.reduce(model, TOME, retain=0.5):
            next(model.children())(pixels)
            found = model.classifier(other)
            assert torch.equal(found, nn.functional.linear(other, *model.classifier.parameters()))


@every_classifier
def test_padding_takes_no_part_in_a_mean(name):
    model, pixels = classifier(name), images(3)
    encoder, seen = next(model.children()), []
    handles = [
        encoder.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state)),
        model.classifier.register_forward_hook(lambda *call: seen.append(call[1][0])),
    ]
    with torch.no_grad(), foveate.reduce(model, Runs(), retain=0.5) as run:
        model(pixels)
    for handle in handles:
        handle.remove()
    first = sizes_of(run).shape[1] - 18
    x_BMC, size_BM1 = seen[0][:, first:], sizes_of(run)[:, first:, None]
    expected_BC = (x_BMC * size_BM1).sum(1) / 36
    torch.testing.assert_close(seen[1][:, -24:], expected_BC, **CLOSE)


def test_the_query_of_siglip_attends_to_merged_tokens_by_their_size():
    model, pixels = tiny_encoder("siglip"), images()
    with torch.no_grad():
        untouched = model(pixels).pooler_output
        with foveate.reduce(model, TOME, retain=0.5) as run:
            found = model(pixels)
        with foveate.reduce(model, TOME, retain=0.5, restore=True):
            expected = model(pixels).pooler_output
        again = model(pixels).pooler_output
        x_BMC = found.last_hidden_state
        size_BM = run.encoder_reduction.sizes(torch.ones(2, 36))
        assert size_BM.max() > 1
        every = torch.stack(
            [x.repeat_interleave(size.long(), 0) for x, size in zip(x_BMC, size_BM, strict=True)]
        )
        by_hand = model.head(every)
    torch.testing.assert_close(found.pooler_output, expected, **CLOSE)
    torch.testing.assert_close(found.pooler_output, by_hand, **CLOSE)
    assert (found.pooler_output - untouched).abs().max() > 1e-3
    assert torch.equal(again, untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_query_of_siglip_does_not_read_padding(dtype):
    model, pixels = tiny_encoder("siglip", dtype=dtype), images(3).to(dtype)
    close = CLOSE if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    with torch.no_grad():
        with foveate.reduce(model, Runs(), retain=0.5) as run:
            found = model(pixels)
        for image, size_M in enumerate(sizes_of(run).long()):
            x_NC = found.last_hidden_state[image].repeat_interleave(size_M, 0)
            alone_1C = model.head(x_NC[None])
            torch.testing.assert_close(found.pooler_output[image : image + 1], alone_1C, **close)
