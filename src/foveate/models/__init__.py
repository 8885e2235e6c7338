"""Adapters: what foveate has to know of each family of models."""

from foveate.models.registry import (
    ADAPTERS,
    AdapterEntry,
    adapter_for,
    list_families,
    register_adapter,
    unregister_adapter,
)

__all__ = [
    "ADAPTERS",
    "AdapterEntry",
    "adapter_for",
    "list_families",
    "register_adapter",
    "unregister_adapter",
]
