"""Encoder blocks whose attention a method computes itself.

The block's own kernel runs as ever; the output projection behind it is handed what the method made
of the same queries, keys and values instead.

Legend: B images of a call, H heads, N tokens present, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foveate.attach.encoder_run import EncoderRun
from foveate.core import EncoderContext, Method
from foveate.core.method import overrides
from foveate.models.tower import VisionTower


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
