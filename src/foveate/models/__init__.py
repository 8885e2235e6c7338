"""Adapters: what foveate has to know of each family of models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from foveate.models.registry import (
    ADAPTERS,
    AdapterEntry,
    adapter_for,
    list_families,
    register_adapter,
    unregister_adapter,
)

if TYPE_CHECKING:
    from foveate.models.windows import FixedWindow, fixed_window, windowed

#: Imported when first asked for, since they need torch and the registry does not.
_LAZY = ("FixedWindow", "fixed_window", "windowed")

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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("foveate.models.windows"), name)
