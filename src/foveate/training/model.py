"""The embedded video LLM: a standard `LlavaOnevisionForConditionalGeneration`, only small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.training.sizes import Size
from foveate.world.tokenizer import ANSWER, END, IMAGE, PAD, USER, VIDEO, VOCABULARY, make_tokenizer

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

#: Ids of special tokens.
IDS = {word: VOCABULARY.index(word) for word in (PAD, END, USER, ANSWER, IMAGE, VIDEO)}
#: Rows of the embedding: the vocabulary, rounded up with room for new words.
VOCABULARY_ROWS = 256


def build_model(size: Size, seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """An untrained model of this size.

    Args:
        size: which.
        seed: of its random weights; the global generator stays as it was.

    Example:
        >>> from foveate.training.sizes import SIZES
        >>> type(build_model(SIZES["tiny"])).__name__
        'LlavaOnevisionForConditionalGeneration'
    """
    from transformers import LlavaOnevisionForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaOnevisionForConditionalGeneration(_config(size))


def _config(size: Size) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    width, layers, heads, mlp = size.vision
    vision = SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=size.image,
        patch_size=size.patch,
        vision_use_head=False,
    )
    width, layers, heads, key_value_heads, mlp = size.text
    text = Qwen2Config(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=mlp,
        max_position_embeddings=4096,
        # Prompts are short: wavelengths of the rotation from 6 tokens to a few thousand.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IDS[END],
        pad_token_id=IDS[PAD],
        initializer_range=width**-0.5 / 2,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS[IMAGE],
        video_token_index=IDS[VIDEO],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[size.image, size.image]],
        vision_aspect_ratio="anyres_max_1",
        tie_word_embeddings=True,
    )


def save_pretrained(
    model: LlavaOnevisionForConditionalGeneration, size: Size, folder: Path
) -> None:
    """Write weights, tokenizer and preprocessing: a folder that any transformers user can load."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = IDS[END]
    model.generation_config.pad_token_id = IDS[PAD]
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    pixels = {
        "do_resize": True,
        "size": {"height": size.image, "width": size.image},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    pinpoints = [[size.image, size.image]]
    documents = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": pinpoints,
            **pixels,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            **pixels,
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (size.image // size.patch) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_1",
        },
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def normalise(frames_THWC: torch.Tensor) -> torch.Tensor:
    """Pixels as the processor gives them: uint8 [..., T, H, W, C] to float [..., T, C, H, W]."""
    return frames_THWC.movedim(-1, -3).float().div_(127.5).sub_(1.0)
