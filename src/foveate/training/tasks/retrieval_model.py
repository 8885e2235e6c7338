"""A small CLIP that embeds clips and captions, and what TempMe trains beside it.

Legend: B clips, F frames of each, R rows of joined frames, M tokens of one, D channels, L words,
E embedding size, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from foveate.core import EncoderContext, Reduction, Tokens
from foveate.methods.tempme import TempMe
from foveate.training.tasks.retrieval_data import END, MAX_WORDS, PAD, SIDE, START, VOCABULARY

#: Side of a patch in pixels; a frame has 5 x 5.
PATCH = 12


def make_clip(vision: tuple[int, int, int], text: tuple[int, int, int]) -> CLIPModel:
    """An untrained CLIP; width, layers and heads of its two encoders.

    Example:
        >>> make_clip((32, 4, 2), (32, 1, 2)).vision_model.config.num_hidden_layers
        4
    """

    def encoder(width: int, layers: int, heads: int) -> dict[str, int | str]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": "gelu",
        }

    words = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    words |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": MAX_WORDS}
    config = CLIPConfig(
        vision_config=encoder(*vision) | {"image_size": SIDE, "patch_size": PATCH},
        text_config=encoder(*text) | words,
        projection_dim=vision[0],
    )
    return CLIPModel(config)


def cls_of_clips(clip: CLIPModel, pixels_BF3HW: Tensor, cls_rows: int = 1) -> Tensor:
    """The normalised [CLS] tokens that stand for every clip, [B, f, D].

    Args:
        clip: the model, with or without a method attached.
        pixels_BF3HW: uint8.
        cls_rows: [CLS] tokens in front of a row: as many as the frames that a method has joined and
            of which it keeps them.
    """
    x_I3HW = (pixels_BF3HW.flatten(0, 1).float() / 255 - 0.4) / 0.25
    vision = clip.vision_model
    x_RMD = vision(pixel_values=x_I3HW).last_hidden_state
    cls_RcD = vision.post_layernorm(x_RMD[:, :cls_rows])
    return cls_RcD.reshape(len(pixels_BF3HW), -1, cls_RcD.shape[-1])


def project(clip: CLIPModel, cls_BfD: Tensor) -> Tensor:
    """The mean of the projected [CLS] tokens of every clip, of length 1, float32 [B, E]."""
    each_BfE = normalize(clip.visual_projection(cls_BfD).float(), dim=-1)
    return normalize(each_BfE.mean(1), dim=-1)


def embed_clips(clip: CLIPModel, pixels_BF3HW: Tensor, cls_rows: int = 1) -> Tensor:
    """What captions are compared with, float32 [B, E]; arguments as `cls_of_clips`."""
    return project(clip, cls_of_clips(clip, pixels_BF3HW, cls_rows))


def embed_captions(clip: CLIPModel, words_BL: Tensor) -> Tensor:
    """Captions of length 1, float32 [B, E]."""
    pooled_BD = clip.text_model(input_ids=words_BL).pooler_output
    return normalize(clip.text_projection(pooled_BD).float(), dim=-1)


class _Attention(nn.Module):
    """The low-rank update of a block's queries, keys and values, under its released names."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.TVPt_LoRA_a = nn.Parameter(torch.empty(rank, width))
        self.TVPt_LoRA_b = nn.Parameter(torch.zeros(3 * width, rank))
        nn.init.kaiming_uniform_(self.TVPt_LoRA_a, a=5**0.5)


class _Block(nn.Module):
    def __init__(self, width: int, rank: int, clips: int) -> None:
        super().__init__()
        self.attn = _Attention(width, rank)
        if clips:
            shape = (1, clips, 1, width)
            self.TVPt_Video_Positional_embedding = nn.Parameter(torch.zeros(shape))


class Updates(nn.Module):
    """What TempMe trains: low-rank updates of both encoders, and embeddings of clips.

    `TempMe(weights=...)` reads the half of the vision encoder from a file of it
    (`save_updates`). Without `method` there are no embeddings.

    Args:
        clip: the model that it is for.
        method: says in which blocks how many clips are joined.
        frames: of a clip.
        rank: of the updates.

    Example:
        >>> clip = make_clip((32, 4, 2), (32, 1, 2))
        >>> updates = Updates(clip, TempMe(), frames=12, rank=2)
        >>> [tuple(x.shape) for name, x in updates.named_parameters() if "visual.2" in name]
        [(1, 12, 1, 32), (2, 32), (96, 2)]
    """

    def __init__(
        self, clip: CLIPModel, method: TempMe | None = None, frames: int = 12, rank: int = 8
    ) -> None:
        super().__init__()
        vision, text = clip.vision_model.config, clip.text_model.config
        joined = {} if method is None else method.joining(frames, vision.num_hidden_layers)
        visual, clips = [], frames
        for layer in range(vision.num_hidden_layers):
            visual.append(_Block(vision.hidden_size, rank, clips if layer in joined else 0))
            clips //= joined.get(layer, 1)
        self.visual = nn.ModuleList(visual)
        self.text = nn.ModuleList(
            _Block(text.hidden_size, rank, 0) for _ in range(text.num_hidden_layers)
        )


def save_updates(updates: Updates, path: str | Path) -> None:
    """Write what TempMe has trained as a file for `TempMe(weights=...)`.

    Example:
        >>> from foveate.training import load_task
        >>> task, modules = load_task("runs/retrieval")  # doctest: +SKIP
        >>> save_updates(modules["tempme"], "tempme.safetensors")  # doctest: +SKIP
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in updates.state_dict().items()}
    save_file(tensors, path)


@contextmanager
def updated(encoder: nn.Module, blocks: nn.ModuleList) -> Iterator[None]:
    """Add low-rank updates to the queries, keys and values of a text or vision encoder inside."""
    handles = []
    layers = cast(nn.ModuleList, encoder.get_submodule("encoder.layers"))
    for layer, block in zip(layers, blocks, strict=True):
        low = cast(_Block, block).attn
        for name, b_Dr in zip("qkv", low.TVPt_LoRA_b.chunk(3), strict=True):

            def add(
                _module: nn.Module,
                args: tuple[Tensor, ...],
                output: Tensor,
                a_rD: Tensor = low.TVPt_LoRA_a,
                b_Dr: Tensor = b_Dr,
            ) -> Tensor:
                return output + args[0] @ a_rD.t() @ b_Dr.t()

            projection = layer.get_submodule(f"self_attn.{name}_proj")
            handles.append(projection.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class TempMeInTraining(TempMe):
    """TempMe with updates that are being trained, in place of a file.

    Args:
        updates: of the encoder.
    """

    updates: Updates | None = None

    def encoder_lora(self, layer: int, num_layers: int) -> tuple[Tensor, Tensor] | None:
        """The update of a block as it is now."""
        low = self._block(layer).attn
        return low.TVPt_LoRA_a, low.TVPt_LoRA_b

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """As `TempMe`; tokens that get an embedding are made with a gradient."""
        with torch.set_grad_enabled(context.point == "block_start" and tokens.x_BND.requires_grad):
            return super().encoder(tokens, context)

    def _embedding(self, context: EncoderContext) -> Tensor | None:
        return self._block(context.layer).TVPt_Video_Positional_embedding.flatten(0, -2)

    def _block(self, layer: int) -> _Block:
        if self.updates is None:
            raise ValueError("TempMe in training needs the updates that are trained.")
        return cast(_Block, self.updates.visual[layer])
