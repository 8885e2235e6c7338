"""The model that a run is about: loaded by name, and told apart from others."""

from __future__ import annotations

import hashlib

from torch import nn

from foveate.errors import UnknownModelError
from foveate.models.adapter import Adapter
from foveate.models.registry import adapter_for

_SAMPLES = 64


def language_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model that answers questions.

    Raises:
        UnknownModelError: no adapter knows it, or it is a vision encoder alone.
    """
    adapter = adapter_for(model)
    if not isinstance(adapter, Adapter):
        raise UnknownModelError(f"{type(model).__name__} is an encoder, which cannot answer.")
    return adapter


def fingerprint(model: nn.Module) -> str:
    """A name for a model's weights: equal weights give equal names, on every device.

    Reads up to 64 numbers of every tensor, so that large models cost no time.

    Example:
        >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
        False
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        step = max(1, -(-flat.numel() // _SAMPLES))
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[::step].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
