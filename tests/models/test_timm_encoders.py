"""Vision transformers of timm: the same numbers as those of transformers with the same weights.

Everything runs on the recorded interface, and once more on timm itself where that is importable.

Legend: B images, P patches, M tokens left, C channels.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import recorded_timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import (
    METHODS,
    BackboneMethod,
    Budget,
    Card,
    EncoderContext,
    Method,
    Tokens,
    get_method,
)
from foveate.errors import AttachmentError, UnknownModelError, UnsupportedModelError
from foveate.methods.dtop import MaskHead
from foveate.methods.tome import ToMe
from foveate.models.registry import adapter_for
from tiny import randomize, tiny_encoder

CLOSE = {"atol": 2e-5, "rtol": 0}
SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
#: A recipe of every method that acts inside a vision transformer.
RECIPES = {
    "centerclip": "centerclip(segments=1)",
    "dtop": "dtop(after=(0.34, 0.67))",
    "flowcut": "flowcut@encoder",
    "grt": "grt(tau=19.6)@patches",
    "gtp_vit": "gtp_vit",
    "stvit": "stvit",
    "tempme": "tempme",
    "token_transforming": "token_transforming",
    "tome": "tome",
    "zero_tprune": "zero_tprune",
}


@pytest.fixture(params=["recorded", "timm"])
def library(request: pytest.FixtureRequest) -> ModuleType:
    """Where VisionTransformer is."""
    if request.param == "recorded":
        return recorded_timm
    pytest.importorskip("timm", exc_type=ImportError)  # also without its torchvision
    found = importlib.import_module("timm.models.vision_transformer")
    found.VisionTransformerDistilled = importlib.import_module(  # pyright: ignore
        "timm.models.deit"
    ).VisionTransformerDistilled
    return found


def vit(library: ModuleType, **options: Any) -> Any:
    """A random VisionTransformer in eval mode; it takes images [B, 3, 48, 48]."""
    model = library.VisionTransformer(**{**SMALL, "num_classes": 5, **options})
    return randomize(model, 0).eval()


def images(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def copied(library: ModuleType, family: str) -> tuple[nn.Module, Any]:
    """An encoder of transformers, and one of timm with its weights."""
    theirs = tiny_encoder(family)
    state = dict(theirs.state_dict())
    options: dict[str, Any] = {"mlp_ratio": 40 / 24, "num_classes": 0}
    if family == "dinov2_with_registers":
        options |= {"mlp_ratio": 2, "init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}
    if family == "siglip":
        options |= {"class_token": False, "global_pool": ""}
    kind = library.VisionTransformerDistilled if family == "deit" else library.VisionTransformer
    model = kind(**{**SMALL, **options})
    places = state.get("embeddings.position_embeddings")
    if places is None:
        places = state["embeddings.position_embedding.weight"][None]
    own = {"pos_embed": places}
    if "embeddings.cls_token" in state:
        own["cls_token"] = state["embeddings.cls_token"]
    if family == "dinov2_with_registers":
        own["reg_token"] = state["embeddings.register_tokens"]
        own["cls_token"], own["pos_embed"] = own["cls_token"] + places[:, :1], places[:, 1:]
    if family == "deit":
        own["dist_token"] = state["embeddings.distillation_token"]
    patches = "embedding" if family == "siglip" else "embeddings.projection"
    last = "post_layernorm" if family == "siglip" else "layernorm"
    blocks = "encoder.layer" if family.startswith("dino") else "layers"
    blocks = "encoder.layers" if family == "siglip" else blocks
    attention, out = ("self_attn", "out") if family == "siglip" else ("attention", "o")
    first, second = ("layernorm_before", "layernorm_after")
    first, second = ("norm1", "norm2") if family.startswith("dino") else (first, second)
    first, second = ("layer_norm1", "layer_norm2") if family == "siglip" else (first, second)
    for leaf in ("weight", "bias"):
        own[f"patch_embed.proj.{leaf}"] = state[f"embeddings.patch_{patches}.{leaf}"]
        own[f"norm.{leaf}"] = state[f"{last}.{leaf}"]
        for index in range(4):
            here, there = f"blocks.{index}", f"{blocks}.{index}"
            parts = [state[f"{there}.{attention}.{name}_proj.{leaf}"] for name in "qkv"]
            own[f"{here}.attn.qkv.{leaf}"] = torch.cat(parts)
            own[f"{here}.attn.proj.{leaf}"] = state[f"{there}.{attention}.{out}_proj.{leaf}"]
            own[f"{here}.norm1.{leaf}"] = state[f"{there}.{first}.{leaf}"]
            own[f"{here}.norm2.{leaf}"] = state[f"{there}.{second}.{leaf}"]
            for name in ("fc1", "fc2"):
                own[f"{here}.mlp.{name}.{leaf}"] = state[f"{there}.mlp.{name}.{leaf}"]
            if family.startswith("dino"):
                for number in (1, 2):
                    scale = state[f"{there}.layer_scale{number}.lambda1"]
                    own[f"{here}.ls{number}.gamma"] = scale
    loaded = model.load_state_dict(own, strict=False)
    assert not loaded.unexpected_keys and not [k for k in loaded.missing_keys if "head" not in k]
    eps = next(m.eps for m in theirs.modules() if isinstance(m, nn.LayerNorm))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
        if isinstance(module, nn.GELU) and family == "siglip":
            module.approximate = "tanh"
    return theirs, model.eval()


def attach(name: str, model: nn.Module, **options: Any) -> foveate.Attachment:
    arguments = {}
    if name == "dtop":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = (MaskHead(24, 3, width=8, num_heads=2).eval() for _ in range(3))
            arguments = {"heads": tuple(made)}
    return foveate.reduce(model, RECIPES[name], **{"retain": 0.5, **options}, **arguments)


def test_every_method_of_the_encoder_is_tested_here():
    found = {
        name
        for name in METHODS
        if {"encoder", "patches"} & set(get_method(name).stages())
        and not issubclass(get_method(name), BackboneMethod)
    }
    assert found == set(RECIPES)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2_with_registers", "siglip"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_method_does_what_it_does_to_transformers(library, family, name):
    theirs, ours = copied(library, family)
    pixels = images(4)
    with torch.no_grad():
        with attach(name, theirs) as run:
            expected, reduction = theirs(pixels).last_hidden_state, run.encoder_reduction
            report = run.report
        with attach(name, ours) as run:
            found = ours.forward_features(pixels)
            torch.testing.assert_close(found, expected, **CLOSE)
            assert all(sum(s.after) < sum(s.before) for s in run.report.stages)
            assert run.encoder_reduction.anchor_BM.equal(reduction.anchor_BM)
            assert run.encoder_reduction.groups_BN.equal(reduction.groups_BN)
            assert [s.after for s in run.report.stages] == [s.after for s in report.stages]


# -- what only timm's blocks have ------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"qk_norm": True, "scale_attn_norm": True, "pre_norm": True, "init_values": 0.1},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg"},
    "bare": {"class_token": False, "global_pool": "avg", "pos_embed": "none", "qkv_bias": False},
    "drop_path": {"drop_path_rate": 0.3, "pool_include_prefix": True, "global_pool": "avg"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Again(Method):
    """Gives the attention that a block has anyway; reduces nothing."""

    card = Card("again", "Again", "A test", ("encoder",), "baseline", "Computes attention itself.")
    reads_values: ClassVar[bool] = True

    def encoder(self, tokens, context):
        return None

    def encoder_attention(self, context):
        q, k, v = context.queries_BHNd, context.keys_BHNd, context.values_BHNd
        keys, values = context.keys_values(SEEN[-1])
        assert torch.allclose(keys, k, atol=1e-6) and torch.allclose(values, v, atol=1e-6)
        return nn.functional.scaled_dot_product_attention(q, k, v)


SEEN: list[torch.Tensor] = []


@every_kind
@pytest.mark.parametrize("fused", [True, False])
def test_queries_keys_and_values_are_those_of_the_block(library, kind, fused):
    """Attention computed from them goes through norm, projection and scale as the block's does."""
    model, pixels = vit(library, **KINDS[kind]), images()
    for block in model.blocks:
        block.attn.fused_attn = fused
        block.register_forward_pre_hook(lambda module, args: SEEN.append(args[0]))
    with torch.no_grad():
        expected = model(pixels)
        with foveate.reduce(model, Again(), retain=0.5):
            torch.testing.assert_close(model(pixels), expected, **CLOSE)


@every_kind
@pytest.mark.parametrize("fused", [True, False])
def test_merging_by_hand(library, kind, fused):
    """ToMe in every block: sizes in the attention, averages behind it, nothing else changed."""
    model, pixels = vit(library, **KINDS[kind]), images()
    for block in model.blocks:
        block.attn.fused_attn = fused
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        x_BNC, sizes = model.norm_pre(model._pos_embed(model.patch_embed(pixels))), None
        for block in model.blocks:
            keys = []
            block.attn.k_norm.register_forward_hook(lambda m, a, out, keys=keys: keys.append(out))
            mask = None if sizes is None else sizes.log()[:, None, None]
            x_BNC = x_BNC + block.ls1(block.attn(block.norm1(x_BNC), attn_mask=mask))
            tokens = Tokens(x_BNC, size_BN=sizes)
            context = EncoderContext(Budget(0.5), num_prefix=prefix, keys_BHNd=keys[0])
            tokens = tokens.reduce(ToMe(r=4).encoder(tokens, context))
            x_BNC, sizes = tokens.x_BND, tokens.size_BN
            x_BNC = x_BNC + block.ls2(block.mlp(block.norm2(x_BNC)))
        expected = model.norm(x_BNC)
        with foveate.reduce(model, "tome", r=4, retain=0.5) as run:
            found = model.forward_features(pixels)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert run.encoder_reduction.num_out == 36 + prefix - 16


@every_kind
@pytest.mark.parametrize("name", RECIPES)
def test_keeping_all_is_the_untouched_model_and_removal_leaves_nothing(library, kind, name):
    model, pixels = vit(library, **KINDS[kind]), images(4)
    with torch.no_grad():
        expected = model(pixels)
        before = {key: dict(vars(module)) for key, module in model.named_modules()}
        hooks = {key: _hooks(module) for key, module in model.named_modules()}
        with attach(name, model, retain=1.0) as run:
            assert torch.equal(model(pixels), expected)
            assert torch.equal(model.forward_intermediates(pixels)[0], model.norm(_last(model)))
            assert not run.report.stages
        assert {key: dict(vars(module)) for key, module in model.named_modules()} == before
        assert {key: _hooks(module) for key, module in model.named_modules()} == hooks
        assert torch.equal(model(pixels), expected)


def _last(model: Any) -> torch.Tensor:
    """What leaves the last block for the images of these tests."""
    return model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(images(4)))))


def _hooks(module: nn.Module) -> list[int]:
    return [len(value) for name, value in vars(module).items() if name.endswith("_hooks")]


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"centerclip", "grt", "tempme"}))
def test_images_of_a_batch_equal_those_alone(library, name):
    model, pixels = vit(library, reg_tokens=1), images(3)
    pixels[1] *= 5
    with torch.no_grad(), attach(name, model, retain=0.4, restore=True):
        together = model(pixels)
        alone = torch.cat([model(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_merged_tokens_weigh_in_the_mean_what_they_stand_for(library):
    model, pixels = vit(library, global_pool="avg", reg_tokens=1), images()
    with torch.no_grad():
        untouched = model(pixels)
        with foveate.reduce(model, "tome", retain=0.4) as run:
            logits = model(pixels)
            tokens = model.forward_features(pixels)
            by_parts = model.forward_head(tokens)
            others = torch.randn_like(tokens)
            plain = model.forward_head(others)
        every = run.encoder_reduction.restore(tokens)
        expected = model.forward_head(every)
        assert tokens.shape[1] == 2 + 14 and every.shape[1] == 2 + 36
        torch.testing.assert_close(logits, expected, **CLOSE)
        torch.testing.assert_close(by_parts, expected, **CLOSE)
        assert (model.forward_head(tokens) - expected).abs().max() > 1e-3  # unweighted
        assert torch.equal(plain, model.forward_head(others))
        assert (expected - untouched).abs().max() > 1e-3
        with foveate.reduce(model, "tome", retain=0.4, restore=True):
            torch.testing.assert_close(model(pixels), expected, **CLOSE)


def test_padding_takes_no_part_in_a_mean_and_is_refused_elsewhere(library):
    pixels = images(2)
    pixels[1] *= 5
    with torch.no_grad():
        model = vit(library, global_pool="avg")
        with foveate.reduce(model, "flowcut@encoder", retain=0.3) as run:
            together = model(pixels)
            assert run.encoder_reduction.mask_BM is not None
            alone = torch.cat([model(pixels[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(together, alone, **CLOSE)
        model = vit(library, global_pool="max")
        with foveate.reduce(model, "flowcut@encoder", retain=0.3):
            model(pixels[:1])
            with pytest.raises(AttachmentError, match="read the padding"):
                model(pixels)
        with foveate.reduce(model, "flowcut@encoder", retain=0.3, restore=True):
            model(pixels)


@every_kind
def test_flops_are_those_that_torch_counts(library, kind):
    model, pixels = vit(library, num_classes=0, **KINDS[kind]), images()
    for block in model.blocks:
        block.attn.fused_attn = False  # a kernel of its own is not counted on every CPU
    # The rule of docs/flops.md counts every token of the first block as an embedded patch.
    extra = 2 * model.num_prefix_tokens * adapter_for(model).dims(model).patch_embedding
    with torch.no_grad(), foveate.reduce(model, "tome(r=4)", retain=0.5) as run:
        with FlopCounterMode(display=False) as counter:
            model.forward_features(pixels)
        counted = counter.get_total_flops() - _matching(run)
        assert run.report.flops["reduced"]["encoder"] == counted + extra
        untouched = run.report.flops["untouched"]["encoder"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward_features(pixels)
    assert untouched == counter.get_total_flops() + extra


def _matching(run: foveate.Attachment) -> int:
    """What ToMe multiplies itself: keys of one half of the tokens with those of the other."""
    total, prefix = 0, run.encoder_reduction.num_in - 36
    for cut in range(4):
        tokens = 36 - 4 * cut + (prefix if prefix <= 2 else 0)
        total += 2 * 2 * -(-tokens // 2) * (tokens // 2) * 8
    return total


@pytest.mark.parametrize("gated", [False, True])
def test_dimensions_are_read_from_the_modules(library, gated):
    layers = importlib.import_module("timm.layers") if library is not recorded_timm else library
    extra = {"mlp_layer": layers.SwiGLUPacked, "mlp_ratio": 4} if gated else {"mlp_ratio": 2}
    model = vit(library, **extra)
    dims = adapter_for(model).dims(model)
    assert (dims.num_blocks, dims.hidden, dims.heads, dims.head_dim) == (4, 24, 3, 8)
    assert (dims.intermediate, dims.gated, dims.patch_inputs) == (48, gated, 192)


def test_other_image_sizes(library):
    model = vit(library, dynamic_img_size=True)
    pixels = torch.randn(2, 3, 32, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model.forward_features(pixels)
        with foveate.reduce(model, "stvit", retain=0.2, restore=True) as run:
            assert model.forward_features(pixels).shape == full.shape == (2, 41, 24)
        assert run.encoder_reduction.num_out == 1 + 8
    assert adapter_for(model).grid(model, pixels).num_tokens == 41


def test_as_transformers_wraps_it(library):
    wrapper = nn.Module()
    wrapper.config = SimpleNamespace(model_type="timm_wrapper")
    wrapper.timm_model = vit(library)
    wrapper.forward = wrapper.timm_model.forward_features
    with torch.no_grad(), foveate.reduce(wrapper, "tome", retain=0.5) as run:
        assert wrapper(images()).shape == (2, 19, 24)
    assert run.report.stages[0].after == (19, 19)


# -- refusals --------------------------------------------------------------------------------------


def test_sequences_between_blocks_are_not_handed_out_short(library):
    model, pixels = vit(library), images()
    with torch.no_grad(), foveate.reduce(model, "tome", retain=0.5) as run:
        with pytest.raises(AttachmentError, match="Call forward_features"):
            model.forward_intermediates(pixels)
        run.budget = 1.0
        assert model.forward_intermediates(pixels)[1][0].shape == (2, 24, 6, 6)
    assert "forward_intermediates" not in vars(model)


def test_other_blocks_and_other_models_are_refused(library):
    model = vit(library, block_fn=library.ResPostBlock)
    with pytest.raises(UnsupportedModelError, match="ResPostBlock with Attention"):
        foveate.reduce(model, "tome")

    class Eva(nn.Module):
        __module__ = "timm.models.eva"

    with pytest.raises(UnsupportedModelError, match="Eva is no VisionTransformer of timm"):
        foveate.reduce(Eva(), "tome")

    class VisionTransformer(nn.Module):
        """As torchvision has it."""

    with pytest.raises(UnknownModelError, match="VisionTransformer"):
        foveate.reduce(VisionTransformer(), "tome")
    with pytest.raises(AttachmentError, match="acts at projector"):
        foveate.reduce(vit(library), "divprune")


def test_a_release_without_attention_masks_is_told_so():
    model = vit(recorded_timm)
    for block in model.blocks:
        block.attn.forward = lambda x, own=block.attn: recorded_timm.Attention.forward(own, x)
        block.forward = lambda x, own=block: (
            x + own.attn(own.norm1(x)) + own.drop_path2(own.mlp(own.norm2(x)))
        )
    with (
        torch.no_grad(),
        foveate.reduce(model, "tome", retain=0.5),
        pytest.raises(AttachmentError, match="prop_attn=False"),
    ):
        model(images())


# -- the record ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("distilled", [False, True])
def test_the_record_computes_what_timm_does(kind, distilled):
    pytest.importorskip("timm", exc_type=ImportError)
    module = importlib.import_module(f"timm.models.{'deit' if distilled else 'vision_transformer'}")
    name = "VisionTransformerDistilled" if distilled else "VisionTransformer"
    options = {**SMALL, "num_classes": 5, **({} if distilled else KINDS[kind])}
    theirs, ours = getattr(module, name)(**options), getattr(recorded_timm, name)(**options)
    randomize(theirs.eval(), 0)
    ours.eval().load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(theirs(images()), ours(images()))
        assert torch.equal(theirs.forward_features(images()), ours.forward_features(images()))
    for own, their in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(own).__name__ == type(their).__name__
