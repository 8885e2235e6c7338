"""Companions by name: a CLIP-like checkpoint beside the model that answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from foveate.checkpoints.processors import read_first
from foveate.checkpoints.sources import check_checkpoint
from foveate.errors import UnknownModelError
from foveate.models.companion import Companion

_SETTINGS = ("preprocessor_config.json", "processor_config.json")


def load_companion(
    name: str | Path,
    decode: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Companion:
    """Load a CLIP, SigLIP or like checkpoint as a `foveate.Companion`.

    Args:
        name: folder or hub id.
        decode: processor or tokenizer of the language model; see `foveate.Companion`.
        device: where to put it.
        dtype: of its weights; None: float32 on CPU, bfloat16 elsewhere.

    Raises:
        UnknownModelError: it cannot be loaded.
        UnsupportedModelError: it is no model of text and pictures.
    """
    from transformers import AutoModel, AutoTokenizer

    check_checkpoint(name)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    try:
        model = AutoModel.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModelError(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    settings = read_first(name, _SETTINGS)
    settings = settings.get("image_processor", settings)
    pixels = {key: settings.get(key) for key in ("image_mean", "image_std")}
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=SimpleNamespace(**pixels))
    return Companion(model.eval().to(device), processor, decode)
