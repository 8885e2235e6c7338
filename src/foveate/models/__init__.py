"""Adapters: what foveate has to know of each family of models."""

from foveate.models.registry import (
    ADAPTERS,
    AdapterEntry,
    adapter_for,
    list_families,
    register_adapter,
    unregister_adapter,
)
from foveate.models.windows import FixedWindow, fixed_window, windowed

__all__ = [
    "ADAPTERS",
    "AdapterEntry",
    "FixedWindow",
    "adapter_for",
    "fixed_window",
    "list_families",
    "register_adapter",
    "unregister_adapter",
    "windowed",
]
