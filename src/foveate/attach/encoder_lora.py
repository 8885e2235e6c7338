"""Low-rank updates of an encoder's queries, keys and values while a method is attached.

Legend: D channels, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foveate.core import Method
from foveate.core.method import overrides
from foveate.errors import AttachmentError
from foveate.models.tower import VisionTower


def lora_handles(
    tower: VisionTower, index: int, method: Method, active: Callable[[], bool]
) -> list[Any]:
    """Hooks that add a method's update to what the projections of a block give.

    They run before whoever reads the projections.

    Args:
        tower: the encoder.
        index: the block.
        method: the method.
        active: whether the method acts in the running call.

    Raises:
        AttachmentError: the projections are no plain linear layers, or of another width.
    """
    if index > tower.feature_block or not overrides(method, "encoder_lora"):
        return []
    found = method.encoder_lora(index, tower.feature_block + 1)
    if found is None:
        return []
    a_rD, b_3Dr = found
    taps = tower.taps[index]
    names = ["qkv"] if "qkv" in taps else ["q", "k", "v"]
    parts = [b_3Dr] if names == ["qkv"] else list(b_3Dr.chunk(3))
    handles = []
    for name, b_Dr in zip(names, parts, strict=True):
        module = taps[name]
        shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if not isinstance(module, nn.Linear) or shape != (b_Dr.shape[0], a_rD.shape[1]):
            raise AttachmentError(
                f"{method.name}: the low-rank update of block {index} is for a projection "
                f"{(b_Dr.shape[0], a_rD.shape[1])}, this encoder has {type(module).__name__} "
                f"{shape}. Use weights that were trained for it."
            )
        handles.append(module.register_forward_hook(_adds(a_rD, b_Dr, active), prepend=True))
    return handles


def _adds(a_rD: torch.Tensor, b_Dr: torch.Tensor, active: Callable[[], bool]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not active():
            return None
        x = args[0]
        return output + x @ a_rD.to(x).t() @ b_Dr.to(x).t()

    return hook
