"""Checkpoints for benchmarks, by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: What loads a folder or hub id, "module:function"; resolved when used, because `foveate.view`
#: stands beside this package and neither imports the other.
LOADER = "foveate.view.answer:load_model"


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """A model of a known family and its processor.

    Args:
        name: folder or hub id.
        device: where to put it.
        dtype: of its weights; None: float32 on CPU, bfloat16 elsewhere.

    Raises:
        UnknownModelError: it cannot be loaded, or no adapter knows the family.

    Example:
        >>> model, processor = load_model("llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
        ... # doctest: +SKIP
    """
    module, _, attribute = LOADER.partition(":")
    return getattr(importlib.import_module(module), attribute)(name, device=device, dtype=dtype)
