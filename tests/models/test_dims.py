"""Formulas against torch's FLOP counter, family by family, on meta tensors.

Widths are those of released checkpoints (CLIP-L/14-336, SigLIP-so400m, Qwen2-0.5B ...), depths are
cut, so that 1 % is a real test: nothing that is counted is small enough to hide. On the CPU torch
counts fused attention as 0 FLOPs; on the meta device it counts it right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.flops import (
    PerBlock,
    ProjectorDims,
    decode_flops,
    encoder_flops,
    encoder_segments,
    prefill_flops,
    projector_flops,
)
from foveate.models.dims import projector_dims, text_dims, vision_dims

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32064,
}
SMOLLM = {**LLAMA, "hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 336,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "vision_use_head": False,
}
QWEN_VIT = {"depth": 4, "num_heads": 16, "patch_size": 14}
# (frames, rows, columns) in patches; 44 and 28 leave smaller windows at the edge.
GRIDS = [(1, 32, 44), (3, 28, 28)]
PATCHES = sum(frames * rows * columns for frames, rows, columns in GRIDS)


def without_type(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model_type"}


def mrope(sections: list[int]) -> dict[str, Any]:
    return {
        **without_type(QWEN2),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    }


@dataclass(frozen=True)
class Family:
    """How to build a model, how to run its encoder, and what it then processes."""

    config: Callable[[], Any]
    encode: Callable[[nn.Module], Any]
    lengths: int = 0
    sequences: int = 2
    num_patches: int | None = None
    projected: int = 0
    heads_all_tokens: bool = False
    packed: bool = False


def images(model: nn.Module, tiles: int = 0) -> torch.Tensor:
    size = model.config.vision_config.image_size
    side = size if isinstance(size, int) else size[0]
    shape = (2, tiles, 3, side, side) if tiles else (2, 3, side, side)
    return torch.empty(shape, device="meta")


def tiled(tiles: int, size: int) -> Callable[[nn.Module], Any]:
    sizes = torch.tensor([[size, size]] * 2)
    return lambda model: model.get_image_features(images(model, tiles), image_sizes=sizes)


def connector(model: nn.Module) -> Any:
    # The public entry point first drops all-padding images, which takes values to look at.
    return model.model.connector(model.model.vision_model(images(model)).last_hidden_state)


def packed(**extra: Any) -> Callable[[nn.Module], Any]:
    def encode(model: nn.Module) -> Any:
        patches = torch.empty(PATCHES, vision_dims(model).patch_inputs, device="meta")
        return model.get_image_features(patches, image_grid_thw=torch.tensor(GRIDS), **extra)

    return encode


def plain(model: nn.Module) -> Any:
    return model.get_image_features(images(model))


FAMILIES = {
    "llava": Family(
        lambda: tf.LlavaConfig(text_config=LLAMA, vision_config=CLIP),
        plain,
        lengths=577,
        num_patches=576,
        projected=2 * 576,
    ),
    "llava_next": Family(
        lambda: tf.LlavaNextConfig(text_config=LLAMA, vision_config=CLIP),
        tiled(3, 336),
        lengths=577,
        sequences=6,
        num_patches=576,
        projected=6 * 576,
    ),
    "llava_next_video": Family(
        lambda: tf.LlavaNextVideoConfig(text_config=LLAMA, vision_config=CLIP),
        tiled(3, 336),
        lengths=577,
        sequences=6,
        num_patches=576,
        projected=6 * 576,
    ),
    "llava_onevision": Family(
        lambda: tf.LlavaOnevisionConfig(text_config=QWEN2, vision_config=SIGLIP),
        tiled(2, 384),
        lengths=729,
        sequences=4,
        projected=4 * 729,
    ),
    "video_llava": Family(
        lambda: tf.VideoLlavaConfig(text_config=LLAMA, vision_config={**CLIP, "image_size": 224}),
        plain,
        lengths=257,
        num_patches=256,
        projected=2 * 256,
    ),
    "qwen2_vl": Family(
        lambda: tf.Qwen2VLConfig(
            text_config=mrope([8, 12, 12]),
            vision_config={**QWEN_VIT, "embed_dim": 1280, "hidden_size": 896},
        ),
        packed(),
        projected=PATCHES,
        packed=True,
    ),
    "qwen2_5_vl": Family(
        lambda: tf.Qwen2_5_VLConfig(
            text_config=mrope([8, 12, 12]),
            vision_config={
                **QWEN_VIT,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "out_hidden_size": 896,
                "fullatt_block_indexes": [2],
            },
        ),
        packed(),
        projected=PATCHES,
        packed=True,
    ),
    "qwen3_vl": Family(
        lambda: tf.Qwen3VLConfig(
            text_config={**mrope([24, 20, 20]), "head_dim": 128},
            vision_config={
                **QWEN_VIT,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "out_hidden_size": 896,
                "deepstack_visual_indexes": [0, 2],
            },
        ),
        packed(),
        projected=PATCHES,
        packed=True,
    ),
    "internvl": Family(
        lambda: tf.InternVLConfig(text_config=QWEN2, vision_config={"num_hidden_layers": 3}),
        plain,
        lengths=1025,
        num_patches=1024,
        projected=2 * 1024,
    ),
    "smolvlm": Family(
        lambda: tf.SmolVLMConfig(
            text_config=SMOLLM,
            vision_config={
                "hidden_size": 768,
                "num_hidden_layers": 3,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            scale_factor=4,
        ),
        connector,
        lengths=1024,
        projected=2 * 1024,
    ),
    "idefics3": Family(
        lambda: tf.Idefics3Config(
            text_config=LLAMA,
            vision_config={
                "num_hidden_layers": 3,
                "intermediate_size": 4304,
                "image_size": 364,
                "patch_size": 14,
            },
            scale_factor=2,
        ),
        connector,
        lengths=676,
        projected=2 * 676,
    ),
    "video_llama_3": Family(
        lambda: tf.VideoLlama3Config(
            text_config=QWEN2,
            vision_config={
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 3,
                "num_attention_heads": 16,
                "patch_size": 14,
            },
        ),
        packed(image_merge_sizes=torch.tensor([1, 2])),
        # Its encoder shrinks what it returns, so that the projector sees merged tokens.
        projected=32 * 44 + 3 * 14 * 14,
        packed=True,
        heads_all_tokens=True,
    ),
}


class _MetaWins(TorchFunctionMode):
    """Lets towers that compute positions from a grid on the CPU run on meta activations."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            if func is torch.Tensor.__bool__:
                return True  # the only question asked is whether a mask, full here, is full
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _to_meta(leaf: Any) -> Any:
    # Numbers stay: they are sizes, which have to have a value.
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _MetaWins():
        yield counter


def build(family: str) -> nn.Module:
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(FAMILIES[family].config())
    return model.eval()


def layers_of(model: nn.Module) -> nn.ModuleList:
    text = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    return text.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_and_projector(family: str) -> None:
    model, case = build(family), FAMILIES[family]
    names = ("multi_modal_projector", "connector", "projector", "merger")
    projectors = [
        module
        for path, module in model.named_modules()
        if path.endswith(names) or path.rpartition(".")[0].endswith("deepstack_merger_list")
    ]
    spent: list[int] = []
    with counting() as counter:
        for module in projectors:
            module.register_forward_pre_hook(lambda *_: spent.append(-counter.get_total_flops()))
            module.register_forward_hook(lambda *_: spent.append(counter.get_total_flops()))
        case.encode(model)
    dims = vision_dims(model)
    lengths: PerBlock = encoder_segments(dims, GRIDS) if case.packed else case.lengths
    sequences = 1 if case.packed else case.sequences
    encoder = encoder_flops(dims, lengths, sequences, num_patches=case.num_patches)
    assert encoder == pytest.approx(counter.get_total_flops() - sum(spent), rel=0.01)
    projector = projector_flops(projector_dims(model), case.projected)
    assert projector == pytest.approx(sum(spent), rel=0.01)
    assert projector > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode(family: str) -> None:
    model, length = build(family), 700
    dims = text_dims(model)
    embeds_BND = torch.empty(1, length, dims.hidden, device="meta")
    with counting() as counter:
        out = model(inputs_embeds=embeds_BND, use_cache=True, logits_to_keep=1)
    logits_for = length if FAMILIES[family].heads_all_tokens else 1
    ours = prefill_flops(dims, length, logits_for=logits_for)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
    with counting() as counter:
        for step in range(2):
            model(
                inputs_embeds=embeds_BND[:, :1],
                past_key_values=out.past_key_values,
                position_ids=torch.tensor([[length + step]], device="meta"),
                use_cache=True,
            )
    assert decode_flops(dims, length, 2) == pytest.approx(counter.get_total_flops(), rel=0.01)


ENCODERS = {
    "vit": (tf.ViTModel, lambda: tf.ViTConfig(num_hidden_layers=4), 1),
    "deit": (tf.DeiTModel, lambda: tf.DeiTConfig(num_hidden_layers=4), 2),
    "dinov2": (
        tf.Dinov2Model,
        lambda: tf.Dinov2Config(
            hidden_size=384, num_attention_heads=6, num_hidden_layers=4, image_size=518
        ),
        1,
    ),
    "dinov2_giant": (
        tf.Dinov2Model,
        lambda: tf.Dinov2Config(
            hidden_size=1536, num_attention_heads=24, num_hidden_layers=2, use_swiglu_ffn=True
        ),
        1,
    ),
    "clip": (tf.CLIPVisionModel, lambda: tf.CLIPVisionConfig(**without_type(CLIP)), 1),
    # One block only, so that the pooling head weighs enough to be tested.
    "siglip": (
        tf.SiglipVisionModel,
        lambda: tf.SiglipVisionConfig(
            **{**without_type(SIGLIP), "vision_use_head": True, "num_hidden_layers": 1}
        ),
        0,
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_alone(name: str) -> None:
    model_class, make_config, specials = ENCODERS[name]
    with torch.device("meta"):
        model = model_class(make_config()).eval()
    config = model.config
    patches = (config.image_size // config.patch_size) ** 2
    with counting() as counter:
        model(torch.empty(2, 3, config.image_size, config.image_size, device="meta"))
    ours = encoder_flops(vision_dims(model), patches + specials, 2, num_patches=patches)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert projector_dims(model) == ProjectorDims(())


def test_llava_onevision_at_full_depth() -> None:
    # LLaVA-OneVision-0.5B: 8 frames through SigLIP-so400m and Qwen2-0.5B, stage by stage.
    config = tf.LlavaOnevisionConfig(
        text_config={**QWEN2, "num_hidden_layers": 24},
        vision_config={**SIGLIP, "num_hidden_layers": 26},
    )
    with torch.device("meta"):
        model = tf.LlavaOnevisionForConditionalGeneration(config).eval()
    with counting() as counter:
        model.get_video_features(torch.empty(1, 8, 3, 384, 384, device="meta"))
        features = counter.get_total_flops()
        model(
            inputs_embeds=torch.empty(1, 8 * 196 + 20, 896, device="meta"),
            use_cache=True,
            logits_to_keep=1,
        )
    ours = encoder_flops(vision_dims(model), 729, 8)
    ours += projector_flops(projector_dims(model), 8 * 729)
    assert ours == pytest.approx(features, rel=0.01)
    prefill = prefill_flops(text_dims(model), 8 * 196 + 20)
    assert prefill == pytest.approx(counter.get_total_flops() - features, rel=0.01)


def shorten(model: nn.Module, lengths: Sequence[int]) -> None:
    """Hooks that hand every layer its own number of tokens, as a reducing attachment does."""

    def cut(length: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos[:, :length], sin[:, :length]
            kwargs["position_ids"] = None
            return (args[0][:, :length], *args[1:]), kwargs

        return hook

    for layer, length in zip(layers_of(model), lengths, strict=True):
        layer.register_forward_pre_hook(cut(length), with_kwargs=True)


def test_every_decoder_layer_at_its_own_length() -> None:
    config = tf.Qwen2Config(**without_type(QWEN2))
    with torch.device("meta"):
        model = tf.Qwen2ForCausalLM(config).eval()
    dims, lengths = text_dims(model), [1500, 1500, 700, 120]
    shorten(model, lengths)
    with counting() as counter:
        out = model(
            inputs_embeds=torch.empty(1, 1500, 896, device="meta"), use_cache=True, logits_to_keep=1
        )
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == lengths
    reduced = counter.get_total_flops()
    assert prefill_flops(dims, lengths) == pytest.approx(reduced, rel=0.01)
    # The check would notice: the untouched prefill is far away.
    assert prefill_flops(dims, 1500) > 1.3 * reduced
    with counting() as counter:
        model(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"),
            position_ids=torch.tensor([[1500]], device="meta"),
            past_key_values=out.past_key_values,
        )
    assert decode_flops(dims, lengths, 1) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_every_encoder_block_at_its_own_length() -> None:
    with torch.device("meta"):
        model = tf.ViTModel(tf.ViTConfig(num_hidden_layers=4)).eval()
    lengths = [197, 150, 100, 50]
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block, length in zip(blocks, lengths, strict=True):
        block.register_forward_pre_hook(lambda _, args, n=length: (args[0][:, :n], *args[1:]))
    with counting() as counter:
        model(torch.empty(2, 3, 224, 224, device="meta"))
    ours = encoder_flops(vision_dims(model), lengths, 2, num_patches=196)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


class TestReading:
    def test_a_model_and_its_config_give_the_same(self) -> None:
        model = build("qwen2_5_vl")
        assert text_dims(model) == text_dims(model.config)
        assert vision_dims(model) == vision_dims(model.config)
        assert vision_dims(model) == vision_dims(model.config.vision_config)

    def test_windows_of_qwen2_5_vl(self) -> None:
        dims = vision_dims(tf.Qwen2_5_VLConfig())
        assert (dims.window, dims.full_blocks, dims.gated) == (8, (7, 15, 23, 31), True)

    def test_several_encoder_layers_joined_are_no_merge(self) -> None:
        config = tf.LlavaConfig(
            text_config=LLAMA, vision_config=CLIP, vision_feature_layer=[-2, -3, -1]
        )
        with torch.device("meta"):
            model = tf.LlavaForConditionalGeneration(config)
        assert projector_dims(model) == ProjectorDims(((3072, 4096), (4096, 4096)))

    def test_plain_text_mlp(self) -> None:
        assert not text_dims(tf.OPTConfig()).gated

    def test_no_vision_tower(self) -> None:
        with pytest.raises(ValueError, match="qwen2 has no patch_size"):
            vision_dims(tf.Qwen2Config())

    def test_no_language_model(self) -> None:
        with pytest.raises(ValueError, match="vit has no vocab_size"):
            text_dims(tf.ViTConfig())

    def test_mixture_of_experts_is_refused(self) -> None:
        with pytest.raises(ValueError, match="qwen3_moe is a mixture of experts"):
            text_dims(tf.Qwen3MoeConfig())

    def test_unknown_projector_is_refused(self) -> None:
        model = build("llava")
        model.model.renamed = model.model.multi_modal_projector
        del model.model.multi_modal_projector
        with pytest.raises(ValueError, match="LlavaForConditionalGeneration has no projector"):
            projector_dims(model)
