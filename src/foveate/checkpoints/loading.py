"""Models by name: folders, hub ids and the one that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.checkpoints.processors import load_processor
from foveate.checkpoints.sources import check_checkpoint
from foveate.errors import UnknownModelError
from foveate.models import adapter_for
from foveate.models.encoders import EncoderAdapter

#: The name of the model that ships with the package, and where its files are.
EMBEDDED = "embedded"
_FOLDER = Path(__file__).parent / "weights"


def embedded_folder() -> Path:
    """The folder of the video LLM that ships with the package.

    Raises:
        UnknownModelError: this installation comes without it.

    Example:
        >>> (embedded_folder() / "card.json").is_file()
        True
    """
    if not (_FOLDER / "model.safetensors").is_file():
        raise UnknownModelError(
            "this installation comes without the embedded model: train one with `foveate train "
            "embedded` and name its folder, or name another checkpoint."
        )
    return _FOLDER


def embedded(
    *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """The small video LLM that ships with the package, and its processor; needs no network.

    A `LlavaOnevisionForConditionalGeneration` that was trained from nothing on the clips of
    `foveate.world`: it answers one-word questions about such clips and knows nothing else.

    Args:
        device: where to put it.
        dtype: of its weights; None: float32 on CPU, bfloat16 elsewhere.

    Raises:
        UnknownModelError: this installation comes without it.

    Example:
        >>> model, processor = embedded()
        >>> type(model).__name__
        'LlavaOnevisionForConditionalGeneration'
    """
    return load_model(EMBEDDED, device=device, dtype=dtype)


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """Load an image-text-to-text checkpoint of a known family, and its processor.

    Args:
        name: folder, hub id, or "embedded" for the model that ships with the package; a folder of
            that name is given as "./embedded" or as a `Path`.
        device: where to put it.
        dtype: of its weights; None: float32 on CPU, bfloat16 elsewhere.

    Raises:
        UnknownModelError: it cannot be loaded, or no adapter knows the family.
    """
    from transformers import AutoModelForImageTextToText

    if name == EMBEDDED:  # a path of this name is a folder
        name = embedded_folder()
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    _check_family(name)
    processor = load_processor(name)
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModelError(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    return model.eval().to(device), processor  # pyright: ignore[reportArgumentType]


def _check_family(name: str | Path) -> None:
    """Refuse what has no adapter before gigabytes of weights are read."""
    from transformers import AutoConfig

    check_checkpoint(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModelError(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    adapter = adapter_for(_Named(config))
    if isinstance(adapter, EncoderAdapter):
        raise UnknownModelError(
            f"{name} is a vision encoder ({config.model_type}), which cannot answer: use `foveate "
            "show` with it, or name a vision-language model."
        )


class _Named:
    """Stands in for a model whose configuration alone is known."""

    def __init__(self, config: Any) -> None:
        self.config = config
