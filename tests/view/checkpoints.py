"""Checkpoints on disk: tiny models with tokenizers and preprocessing, as a user would name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import FIRST_SPECIAL, IMAGE, VIDEO, VISION_END, VISION_START, VOCAB, tiny_model

WORDS = [
    "what",
    "is",
    "in",
    "the",
    "video",
    "picture",
    "a",
    "bike",
    "rides",
    "past",
    "red",
    "white",
    "house",
    "USER:",
    "ASSISTANT:",
]
_PLAIN = {
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
}


def square(side: int) -> dict[str, Any]:
    return {**_PLAIN, "size": {"height": side, "width": side}, "do_center_crop": False}


PACKED_SETTINGS = {
    **_PLAIN,
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 1024},
}
_SPECIAL = {"image": "<image>", "video": "<video>"}
_QWEN = {"image": "<|image_pad|>", "video": "<|video_pad|>"}

#: family -> names of its placeholders, image processor, video processor, processor settings.
FAMILIES: dict[
    str, tuple[dict[str, str], dict[str, Any], dict[str, Any] | None, dict[str, Any]]
] = {
    "llava": (
        _SPECIAL,
        {"image_processor_type": "CLIPImageProcessor", **square(48)},
        None,
        {
            "processor_class": "LlavaProcessor",
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": (
        _SPECIAL,
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            **square(48),
            "image_grid_pinpoints": [[48, 96], [96, 48], [96, 96]],
        },
        {"video_processor_type": "LlavaOnevisionVideoProcessor", **square(48)},
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 36,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_1",
        },
    ),
    "llava_next_video": (
        _SPECIAL,
        {
            "image_processor_type": "LlavaNextImageProcessor",
            **_PLAIN,
            "size": {"shortest_edge": 48},
            "crop_size": {"height": 48, "width": 48},
            "image_grid_pinpoints": [[48, 96], [96, 48], [96, 96]],
        },
        {"video_processor_type": "LlavaNextVideoVideoProcessor", **square(48)},
        {
            "processor_class": "LlavaNextVideoProcessor",
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "video_llava": (
        _SPECIAL,
        {"image_processor_type": "VideoLlavaImageProcessor", **square(32)},
        {"video_processor_type": "VideoLlavaVideoProcessor", **square(32)},
        {
            "processor_class": "VideoLlavaProcessor",
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "qwen2_vl": (
        _QWEN,
        {"image_processor_type": "Qwen2VLImageProcessor", **PACKED_SETTINGS},
        None,
        {"processor_class": "Qwen2VLProcessor"},
    ),
    "qwen2_5_vl": (
        _QWEN,
        {"image_processor_type": "Qwen2VLImageProcessor", **PACKED_SETTINGS},
        {"video_processor_type": "Qwen2VLVideoProcessor", **PACKED_SETTINGS},
        {"processor_class": "Qwen2_5_VLProcessor"},
    ),
    "qwen3_vl": (
        _QWEN,
        {"image_processor_type": "Qwen2VLImageProcessor", **PACKED_SETTINGS},
        {
            "video_processor_type": "Qwen3VLVideoProcessor",
            **PACKED_SETTINGS,
            "size": {"shortest_edge": 256, "longest_edge": 4096},
        },
        {"processor_class": "Qwen3VLProcessor"},
    ),
}


def save_checkpoint(family: str, folder: Path, chat_template: str | None = None) -> Path:
    """A tiny random model of a family with everything `from_pretrained` looks for."""
    names, image, video, settings = FAMILIES[family]
    tiny_model(family).save_pretrained(folder)
    _tokenizer(names).save_pretrained(folder)
    documents = {"preprocessor_config.json": image, "processor_config.json": settings}
    if video is not None:
        documents["video_preprocessor_config.json"] = video
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def _tokenizer(names: dict[str, str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        names["image"]: IMAGE,
        names["video"]: VIDEO,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    taken = set(special.values())
    free = [index for index in range(3, FIRST_SPECIAL) if index not in taken]
    vocabulary = special | {"<unk>": free.pop()}
    vocabulary |= dict(zip(WORDS, free, strict=False))
    known = set(vocabulary.values())
    vocabulary |= {f"w{index}": index for index in range(VOCAB) if index not in known}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[name for name in special if name[1] != "p" and len(name) > 4],
    )
