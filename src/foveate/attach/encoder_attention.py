"""Attention inside encoder blocks: sizes added to its logits, and what methods compute themselves.

A method that computes attention gets the queries, keys and values of the block's own kernel, which
runs as ever; the output projection behind it is handed what the method made of them instead.

Legend: B images of a call, H heads, N tokens present, d channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foveate.attach.encoder_run import EncoderRun
from foveate.core import EncoderContext, Method
from foveate.core.method import overrides
from foveate.errors import AttachmentError
from foveate.models.tower import VisionTower

#: What attention modules call the mask that is added to their logits: in transformers, in timm.
MASKS = ("attention_mask", "attn_mask")


def rewriting(steps: list[tuple[int, Method]]) -> list[tuple[int, Method]]:
    """The steps that compute attention themselves."""
    return [(number, m) for number, m in steps if overrides(m, "encoder_attention")]


def outside_reader(
    run: EncoderRun, tower: VisionTower, block: int
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """Gives the keys and values of tokens outside the sequence, and counts what they cost.

    None where the encoder does not say where it makes them.
    """
    if tower.packed or not tower.attention_inputs:
        return None

    def read(x_BNC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, tokens = x_BNC.shape[:2]
        run.outside.append((images, run.attention_lengths[-1], tokens))
        return tower.keys_values(block, x_BNC)

    return read


def rewrite_hook(
    asked: Callable[[], list[tuple[Method, EncoderContext]]],
) -> Callable[[nn.Module, tuple], Any]:
    """A pre-hook for the output projection of a block's attention.

    Args:
        asked: the methods to ask in the running call, with what each may read.
    """

    def hook(module: nn.Module, args: tuple) -> Any:
        (own_BNC, *rest), changed = args, False
        for method, context in asked():
            with torch.no_grad():
                out_BHNd = method.encoder_attention(context)
            if out_BHNd is None:
                continue
            out_BNC = out_BHNd.transpose(1, 2).flatten(2)
            if out_BNC.shape != own_BNC.shape:
                raise ValueError(
                    f"{method.name}: encoder_attention() returns [B, H, N, d] for "
                    f"{tuple(own_BNC.shape)} (heads joined), got {tuple(out_BHNd.shape)}."
                )
            own_BNC, changed = out_BNC.to(own_BNC.dtype), True
        return (own_BNC, *rest) if changed else None

    return hook


def size_hook(
    attention: nn.Module, bias: Callable[[torch.dtype], torch.Tensor | None], flash: str
) -> Callable[[nn.Module, tuple, dict[str, Any]], Any]:
    """A pre-hook that adds the sizes of tokens to the logits of a block's attention.

    Args:
        attention: the module, for the names of its arguments.
        bias: gives what to add in the running block, None for nothing.
        flash: name of a kernel that takes no mask, empty for others.
    """
    accepted = list(inspect.signature(attention.forward).parameters)
    mask = next((name for name in MASKS if name in accepted), "")
    position = accepted.index(mask) if mask else None

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x_BND = args[0] if args else kwargs["hidden_states"]
        added = bias(x_BND.dtype)
        if added is None:
            return None
        if position is None:
            raise AttachmentError(
                f"{type(module).__name__} takes no attention mask in this release of its "
                "library, so merged tokens cannot weigh more in attention and images "
                "cannot differ in length: upgrade it, or pass prop_attn=False (tome) "
                "or batch_max=True (flowcut)."
            )
        if flash:
            raise AttachmentError(
                f"{flash} takes no padding mask, and the images of this call differ in "
                "length inside the encoder: pass batch_max=True (flowcut), or load the encoder "
                'with attn_implementation="sdpa".'
            )
        if position < len(args):
            _refuse_mask(args[position])
            return (*args[:position], added, *args[position + 1 :]), kwargs
        _refuse_mask(kwargs.get(mask))
        return args, {**kwargs, mask: added}

    return hook


def _refuse_mask(mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise AttachmentError(
            "These images carry a padding mask inside the encoder; encoder-stage methods need "
            "images without padding. Resize them to one shape, or use a projector-stage method."
        )
