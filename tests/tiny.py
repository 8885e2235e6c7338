"""Tiny models of every family with random weights; `tiny_prompts` has the inputs for them.

Weights are drawn so that attention and logits are far from uniform; special ids are never the most
likely next token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tiny_prompts import (
    BOS,
    EOS,
    FIRST_SPECIAL,
    FIRST_TEXT,
    FRAMES_AS_IMAGES,
    IMAGE,
    PACKED,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Sample,
    tiny_inputs,
    tiny_modalities,
)

__all__ = [
    "BOS",
    "EOS",
    "FIRST_SPECIAL",
    "FIRST_TEXT",
    "FRAMES_AS_IMAGES",
    "IMAGE",
    "PACKED",
    "PAD",
    "TINY_ENCODERS",
    "TINY_FAMILIES",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "VOCAB",
    "Sample",
    "randomize",
    "tiny_encoder",
    "tiny_inputs",
    "tiny_modalities",
    "tiny_model",
]

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 48,
    "patch_size": 8,
}
CLIP, SIGLIP = ("clip_vision_model", "siglip_vision_model")


def _llava_like(vision: str, text: str = "llama", **config: Any) -> dict[str, Any]:
    small = {"image_size": config.pop("image_size", 48)}
    return {
        "vision_config": {"model_type": vision, **VISION, **small, "projection_dim": 16},
        "text_config": {"model_type": text, **TEXT},
        "image_token_index": IMAGE,
        **config,
    }


def _qwen_like(vision: dict[str, Any], text: dict[str, Any], **config: Any) -> dict[str, Any]:
    shared = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
    return {
        "vision_config": {**shared, **vision},
        "text_config": {**TEXT, "rope_parameters": rope, **text},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "pad_token_id": PAD,
        "eos_token_id": None,
        **config,
    }


def _smolvlm_like(family: str) -> dict[str, Any]:
    return {
        "vision_config": {
            "model_type": f"{family}_vision",
            **VISION,
            "image_size": 32,
            "patch_size": 4,
        },
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": PAD,
    }


PINPOINTS = [[48, 96], [96, 48], [96, 96]]
SMALL_PINPOINTS = [[32, 64], [64, 32], [64, 64]]

_CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "llava": lambda: _llava_like(CLIP),
    "llava_next": lambda: _llava_like(CLIP, image_size=32, image_grid_pinpoints=SMALL_PINPOINTS),
    "llava_next_video": lambda: _llava_like(
        CLIP, video_token_index=VIDEO, image_size=48, image_grid_pinpoints=PINPOINTS
    ),
    "llava_onevision": lambda: _llava_like(
        SIGLIP,
        "qwen2",
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_1",
    ),
    "video_llava": lambda: _llava_like(CLIP, video_token_index=VIDEO, image_size=32),
    "qwen2_vl": lambda: _qwen_like(
        {"depth": 3, "embed_dim": 24, "hidden_size": 32, "num_heads": 3, "mlp_ratio": 2}, {}
    ),
    "qwen2_5_vl": lambda: _qwen_like(
        {
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 3,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        {},
    ),
    "qwen3_vl": lambda: _qwen_like(
        {
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 3,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        },
        {"head_dim": 8},
    ),
    "internvl": lambda: {
        "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [4, 4]},
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_token_id": IMAGE,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
    },
    "smolvlm": lambda: _smolvlm_like("smolvlm"),
    "idefics3": lambda: _smolvlm_like("idefics3"),
    "video_llama_3": lambda: {
        "vision_config": {
            "model_type": "video_llama_3_vision",
            **{k: v for k, v in VISION.items() if k != "image_size"},
            "patch_size": 4,
        },
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "pad_token_id": PAD,
    },
}

TINY_FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
TINY_ENCODERS: tuple[str, ...] = (
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "clip",
    "siglip",
)


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    **overrides: Any,
) -> nn.Module:
    """A random ...ForConditionalGeneration in eval mode; `overrides` replace config fields."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(family, **{**_CONFIGS[family](), **overrides})
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    randomize(model, seed)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head *= 3  # a clear winner among the next tokens
        head[:FIRST_TEXT] = 0
        head[FIRST_SPECIAL:] = 0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def tiny_encoder(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "sdpa"
) -> nn.Module:
    """A random encoder of 36 patches in eval mode; it takes images [B, 3, 48, 48]."""
    from transformers import AutoConfig, AutoModel

    model_type = {"clip": CLIP, "siglip": SIGLIP}.get(family, family)
    config = AutoConfig.for_model(model_type, **VISION)
    if hasattr(config, "mlp_ratio"):
        config.mlp_ratio = 2
    with torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(config, attn_implementation=attn)
    return randomize(model, seed).to(dtype).eval()


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Draw all parameters anew, with gains at which a random transformer is not degenerate."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if id(parameter) in embeddings or leaf not in ("weight", "bias"):
                scale = "lambda" in leaf  # layer scales multiply, all else of this kind is added
                parameter.copy_(0.7 + 0.1 * noise if scale else 0.7 * noise)
            elif parameter.dim() >= 2:
                # Sharper queries and keys: attention of a random model is flat otherwise.
                gain = 1.6 if any(p in name for p in ("q_proj", "k_proj", "qkv")) else 1.0
                parameter.copy_(noise * gain * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if leaf == "weight" else 0.0))
    return model
