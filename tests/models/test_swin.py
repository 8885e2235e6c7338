"""Swin: STViT-R's groups on the encoder's own blocks and on trained ones, and what is refused.

Legend: B images, N tokens of the longest stage, T semantic tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SwinBackbone, SwinConfig, SwinForImageClassification, SwinModel

import foveate
from foveate.core import METHODS, BackboneMethod, get_method
from foveate.core.window_flops import WindowDims, window_block_flops, window_flops
from foveate.errors import AttachmentError, UnsupportedModelError
from foveate.methods._stvit_windows import ROLES, group_flops
from foveate.methods.stvit import CrossBlock, SemanticGroup
from foveate.models.registry import adapter_for
from tiny import randomize

CLOSE = {"atol": 2e-5, "rtol": 0}
#: Two groups of six blocks and one more, on 8 x 8 tokens of 16 channels, in windows of 4 x 4.
SMALL = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 13, 2],
    "num_heads": [2, 4, 4],
    "window_size": 4,
}


def swin(kind: type = SwinModel, **options: Any) -> Any:
    config = SwinConfig(**{**SMALL, "num_labels": 3, **options})
    return randomize(kind(config), 0).eval()


def images(num: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))


def as_cross_block(block: Any) -> CrossBlock:
    """A block of Swin as one of the modules that are checked against the released code."""
    state = {f"{name}.{leaf}": value for name, leaf, value in _parameters(block)}
    tensors = {
        **{f"norm1.{leaf}": state[f"layernorm_before.{leaf}"] for leaf in ("weight", "bias")},
        **{f"norm2.{leaf}": state[f"layernorm_after.{leaf}"] for leaf in ("weight", "bias")},
        **{
            f"mlp.{n}.{p}": state[f"mlp.{n}.{p}"]
            for n in ("fc1", "fc2")
            for p in ("weight", "bias")
        },
        "layer_scale_1": torch.ones(16),
        "layer_scale_2": torch.ones(16),
    }
    for leaf in ("weight", "bias"):
        q, k, v, out = (state[f"attention.{name}_proj.{leaf}"] for name in "qkvo")
        tensors |= {f"attn.q.{leaf}": q, f"attn.kv.{leaf}": torch.cat([k, v])}
        tensors |= {f"attn.proj.{leaf}": out}
    return CrossBlock.from_tensors(tensors, heads=4, eps=block.layernorm_before.eps)


def _parameters(block: nn.Module):
    for name, value in block.named_parameters():
        yield (*name.rpartition(".")[::2], value.detach())


def by_hand(model: Any, x: torch.Tensor, groups: list[SemanticGroup]) -> torch.Tensor:
    """The whole encoder, with these groups in the place of blocks of its second stage."""
    x_BNC, plane = model.embeddings(x)
    for number, stage in enumerate(model.encoder.layers):
        place = 0
        while place < len(stage.blocks):
            x_BNC = stage.blocks[place](x_BNC, plane)[0]
            place += 1
            if number == 1 and place % 6 == 1 and place // 6 < len(groups):
                x_BNC = groups[place // 6](x_BNC, plane)
                place += 5
        if stage.downsample is not None:
            x_BNC, plane = stage.downsample(x_BNC, plane), (plane[0] // 2, plane[1] // 2)
    return model.layernorm(x_BNC)


def own_groups(model: Any, cells: tuple[int, int]) -> list[SemanticGroup]:
    blocks = [as_cross_block(block) for block in model.encoder.layers[1].blocks]
    return [
        SemanticGroup(*blocks[begin + 1 : begin + 6], window=(4, 4), cells=cells)
        for begin in (0, 6)
    ]


@pytest.mark.parametrize(("retain", "cells"), [(0.25, (2, 2)), (0.4, (2, 3)), (0.05, (1, 1))])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_blocks_of_the_encoder_by_hand(retain, cells, attn):
    model, pixels = swin(), images()
    model.set_attn_implementation(attn)
    with torch.no_grad():
        untouched = model(pixels).last_hidden_state
        expected = by_hand(model, pixels, own_groups(model, cells))
        with foveate.reduce(model, "stvit", retain=retain) as run:
            found = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, expected, **CLOSE)
    torch.testing.assert_close(found.pooler_output, expected.mean(1), **CLOSE)
    assert (expected - untouched).abs().max() > 0.1
    T = 4 * cells[0] * cells[1]
    assert [(s.layer, s.before, s.after) for s in run.report.stages] == [
        (2, (64, 64), (T, T)),
        (8, (64, 64), (T, T)),
    ]
    assert run.encoder_reduction.num_in == 64 and run.encoder_reduction.num_out == T
    assert [tuple(h.shape[1:]) for h in found.hidden_states[-2:]] == [(16, 32), (16, 32)]


def test_by_hand_without_groups_is_the_encoder():
    model, pixels = swin(), images()
    with torch.no_grad():
        assert torch.equal(by_hand(model, pixels, []), model(pixels).last_hidden_state)


def weights(path: Any, centres: int = 16) -> dict[str, torch.Tensor]:
    """Trained blocks of both groups, with learned centres in the first."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    for group in range(2):
        for role in ROLES[: 5 - group]:  # the second group recovers by the encoder's own block
            block = CrossBlock(16, heads=4, hidden=24, scale=0.5)
            for name, value in block.state_dict().items():
                noise = torch.randn(value.shape, generator=draw) * 0.3
                tensors[f"groups.{group}.{role}.{name}"] = value + noise
    tensors["groups.0.global_tokens"] = torch.randn(1, centres, 16, generator=draw)
    save_file(tensors, path)
    return tensors


def test_trained_blocks_take_the_places_of_the_encoders_own(tmp_path):
    tensors = weights(tmp_path / "stvit.safetensors")
    model, pixels = swin(), images()
    groups = own_groups(model, (2, 2))
    for number, group in enumerate(groups):
        for role in ROLES[: 5 - number]:
            prefix = f"groups.{number}.{role}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            setattr(group, role, CrossBlock.from_tensors(own, heads=4))
    groups[0].global_tokens = nn.Parameter(tensors["groups.0.global_tokens"])
    path = str(tmp_path / "stvit.safetensors")
    with torch.no_grad():
        expected = by_hand(model, pixels, groups)
        with foveate.reduce(model, "stvit", weights=path, retain=0.25) as run:
            found = model(pixels).last_hidden_state
        torch.testing.assert_close(found, expected, **CLOSE)
        with foveate.reduce(model, "stvit", weights=path) as published:
            torch.testing.assert_close(model(pixels).last_hidden_state[:0], found[:0])
        assert published.report.stages[0].after == (16, 16)
        with (
            foveate.reduce(model, "stvit", weights=path, retain=0.5),
            pytest.raises(ValueError, match="have 16 learned centres; 32 semantic tokens"),
        ):
            model(pixels)
    inner = dict.fromkeys(ROLES, 24)
    first = group_flops(16, inner, (8, 8), (4, 4), (2, 2))
    second = group_flops(16, {**inner, "recover": 64}, (8, 8), (4, 4), (2, 2))
    own = 2 * group_flops(16, dict.fromkeys(ROLES, 64), (8, 8), (4, 4), (2, 2))
    with torch.no_grad(), foveate.reduce(model, "stvit", retain=0.25) as free:
        model(pixels)
    saved = free.report.flops["reduced"]["encoder"] - run.report.flops["reduced"]["encoder"]
    assert saved == 2 * (own - first - second)


def test_weights_without_groups_are_the_first_groups(tmp_path):
    path = tmp_path / "one.safetensors"
    block = CrossBlock(16, heads=4, hidden=64, scale=1.0)
    save_file({f"glob.{k}": v for k, v in block.state_dict().items()}, path)
    model, pixels = swin(), images()
    groups = own_groups(model, (2, 2))
    groups[0].glob = block
    with torch.no_grad(), foveate.reduce(model, "stvit", weights=str(path), retain=0.25):
        found = model(pixels).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(found, by_hand(model, pixels, groups), **CLOSE)


@pytest.mark.parametrize("kind", [SwinModel, SwinForImageClassification, SwinBackbone])
def test_keeping_all_is_the_untouched_model_and_removal_leaves_nothing(kind):
    model, pixels = swin(kind), images()

    def out() -> torch.Tensor:
        found = model(pixels)
        return found.feature_maps[-1] if kind is SwinBackbone else found[0]

    with torch.no_grad():
        expected = out()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        with foveate.reduce(model, "stvit", retain=1.0) as run:
            assert torch.equal(out(), expected) and not run.report.stages
            run.budget = 0.25
            assert not torch.equal(out(), expected) and len(run.report.stages) == 2
            run.budget = 1.0
            assert torch.equal(out(), expected)
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
        assert torch.equal(out(), expected)


def test_images_of_a_batch_equal_those_alone():
    model, pixels = swin(), images(3)
    with torch.no_grad(), foveate.reduce(model, "stvit", retain=0.25) as run:
        together, reduction = model(pixels).last_hidden_state, run.encoder_reduction
        for index in range(3):
            alone = model(pixels[index : index + 1]).last_hidden_state
            torch.testing.assert_close(together[index : index + 1], alone, **CLOSE)
            assert run.encoder_reduction.anchor_BM.equal(reduction.anchor_BM[:1])


def test_semantic_tokens_are_traced_to_their_windows():
    model = swin()
    with torch.no_grad(), foveate.reduce(model, "stvit", retain=0.25, evidence=True) as run:
        model(images())
    share_TN = run.encoder_reduction.matrix()[0]
    assert torch.allclose(share_TN.sum(1), torch.ones(16))
    window_T = run.encoder_reduction.anchor_BM[0] // 8 // 4 * 2
    window_T = window_T + run.encoder_reduction.anchor_BM[0] % 8 // 4
    window_N = (torch.arange(64) // 8 // 4) * 2 + torch.arange(64) % 8 // 4
    assert bool((share_TN > 0)[window_T[:, None] != window_N].logical_not().all())
    item = run.report.items[1]
    assert item.before == 64 and item.after == 16
    assert {noted.name for noted in item.evidence} == {"groups"}
    assert item.evidence[0].value.shape == (64,)


@pytest.mark.parametrize("side", [32, 64])
def test_flops_are_those_that_torch_counts(side):
    model = swin()
    model.set_attn_implementation("eager")
    pixels = images(2, side)

    def counted() -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(pixels)
        return counter.get_total_flops()

    with torch.no_grad():
        untouched = counted()
        with foveate.reduce(model, "stvit", retain=0.25) as run:
            assert counted() == run.report.flops["reduced"]["encoder"]
            assert run.report.flops["untouched"]["encoder"] == untouched


def test_flops_of_planes_that_are_padded():
    model = swin(depths=[2, 2, 2])
    model.set_attn_implementation("eager")
    parts, pixels = adapter_for(model).parts(model), images(1, 40)[..., :34]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels)
    assert window_flops(parts.dims, (20, 17), parts.windows()) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("width", "depth", "giga", "left"),
    [(96, 6, 4.5, 0.77), (96, 18, 8.7, 0.65), (128, 18, 15.4, 0.65)],
    ids=["Swin-T", "Swin-S", "Swin-B"],
)
def test_published_sizes(width, depth, giga, left):
    """Multiply-adds at 224 (arXiv 2103.14030, table 1), and what docs/encoders.md says is left."""
    dims, num = WindowDims(width, (2, 2, depth, 2), 4.0, 48), depth // 6
    full = window_flops(dims, (56, 56), (7,) * 4)
    assert round(full / 2e9, 1) == giga
    inner = dict.fromkeys(ROLES, dims.inner(2))
    group = group_flops(dims.width(2), inner, (14, 14), (7, 7), (3, 3))
    saved = num * (5 * window_block_flops(dims, 2, (14, 14), 7) - group)
    assert round(1 - saved / full, 2) == left


def test_the_published_number_of_tokens_is_the_default():
    model = SwinModel(SwinConfig(embed_dim=24, num_heads=[1, 1, 2, 4]))
    with torch.no_grad(), foveate.reduce(model.eval(), "stvit") as run:
        model(images(1, 224))
    assert run.report.stages[0].before == (196,) and run.report.stages[0].after == (36,)


# -- refusals --------------------------------------------------------------------------------------


def test_methods_that_shorten_a_sequence_are_refused():
    model = swin()
    inside = [
        name
        for name in METHODS
        if {"encoder", "patches"} & set(get_method(name).stages()) and name != "stvit"
    ]
    assert len(inside) > 8
    for name in inside:
        is_backbones = issubclass(get_method(name), BackboneMethod)
        recipe = name if is_backbones else f"{name}@{_stage(name)}"
        message = "runs on" if is_backbones else 'windows that must be whole. On Swin use "stvit"'
        with pytest.raises(AttachmentError, match=message):
            foveate.reduce(model, recipe)
    with pytest.raises(AttachmentError, match="must be whole"):
        foveate.reduce(model, "stvit + tome")
    with pytest.raises(AttachmentError, match="two would take the same blocks"):
        foveate.reduce(model, "stvit + stvit")
    with pytest.raises(AttachmentError, match="acts at projector"):
        foveate.reduce(model, "divprune")
    with pytest.raises(UnsupportedModelError, match="windows of a plane that shrinks"):
        adapter_for(model).tower(model)


def _stage(name: str) -> str:
    return "encoder" if "encoder" in get_method(name).stages() else "patches"


def test_what_does_not_fit_is_refused():
    with pytest.raises(AttachmentError, match=r"longest stage of this encoder has 5 .*\[2, 5\]"):
        foveate.reduce(swin(depths=[2, 5], num_heads=[2, 4]), "stvit")
    model = swin()
    with (
        torch.no_grad(),
        foveate.reduce(model, "stvit"),
        pytest.raises(
            AttachmentError, match=r"do not fill the 10 x 10 tokens.*multiples of 16 x 16"
        ),
    ):
        model(images(1, 40))
    with (
        torch.no_grad(),
        foveate.reduce(model, "stvit", after=2),
        pytest.raises(ValueError, match="leave after out"),
    ):
        model(images())
    with torch.no_grad(), foveate.reduce(model, "stvit") as run:
        model(images())  # a call that failed leaves nothing behind
    assert len(run.report.stages) == 2
