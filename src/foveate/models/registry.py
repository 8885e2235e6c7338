"""Families by name: which adapter serves a model, resolved at first use."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from foveate.errors import UnknownModelError

if TYPE_CHECKING:
    from foveate.models.adapter import Adapter
    from foveate.models.encoders import EncoderAdapter

ENTRY_POINT_GROUP = "foveate.adapters"


class AdapterEntry(NamedTuple):
    """Where the adapter of a family is, and the `config.model_type`s it serves."""

    target: str | type
    model_types: tuple[str, ...]


def _entry(target: str, *model_types: str) -> AdapterEntry:
    return AdapterEntry(f"foveate.models.{target}", model_types)


_ADAPTERS: dict[str, AdapterEntry] = {
    "llava": _entry("llava:LlavaAdapter", "llava"),
    "llava_next": _entry("llava_anyres:LlavaNextAdapter", "llava_next"),
    "llava_next_video": _entry("llava_anyres:LlavaNextVideoAdapter", "llava_next_video"),
    "llava_onevision": _entry("llava_anyres:LlavaOnevisionAdapter", "llava_onevision"),
    "video_llava": _entry("video_llava:VideoLlavaAdapter", "video_llava"),
    "qwen2_vl": _entry("qwen_vl:Qwen2VLAdapter", "qwen2_vl"),
    "qwen2_5_vl": _entry("qwen_vl:Qwen25VLAdapter", "qwen2_5_vl"),
    "qwen3_vl": _entry("qwen_vl:Qwen3VLAdapter", "qwen3_vl"),
    "internvl": _entry("internvl:InternVLAdapter", "internvl"),
    "smolvlm": _entry("smolvlm:SmolVLMAdapter", "smolvlm"),
    "idefics3": _entry("smolvlm:Idefics3Adapter", "idefics3"),
    "video_llama_3": _entry("video_llama_3:VideoLlama3Adapter", "video_llama_3"),
    "vit": _entry("encoders:ViTAdapter", "vit"),
    "deit": _entry("encoders:DeiTAdapter", "deit"),
    "dinov2": _entry("encoders:Dinov2Adapter", "dinov2", "dinov2_with_registers"),
    "clip": _entry("encoders:CLIPAdapter", "clip", "clip_vision_model"),
    "timm": _entry("timm_encoders:TimmAdapter", "timm_wrapper"),
    "swin": _entry("swin:SwinAdapter", "swin"),
    "mixste": _entry("backbone_adapters:MixSTEAdapter", "mixste"),
    "vision_mamba": _entry("backbone_adapters:VisionMambaAdapter", "vision_mamba"),
    "vis4mer": _entry("backbone_adapters:ViS4merAdapter", "vis4mer"),
    "siglip": _entry("encoders:SiglipAdapter", "siglip", "siglip_vision_model"),
}

ADAPTERS: Mapping[str, AdapterEntry] = MappingProxyType(_ADAPTERS)


def register_adapter(
    family: str,
    target: str | type,
    model_types: Iterable[str],
    *,
    clobber: bool = False,
) -> None:
    """Make a family known, from inside or outside of foveate.

    Packages do the same without a call through the entry-point group "foveate.adapters", whose
    entries name an adapter class; its `model_types` are read from the class.

    Args:
        family: short name.
        target: the adapter class, or "package.module:Class" to import it at first use.
        model_types: values of `config.model_type` that it serves.
        clobber: replace a family, or take a `model_type` over from another one.

    Raises:
        ValueError: the family or a model type is taken and `clobber` is False, or the target is
            not of the form "package.module:Class".

    Example:
        >>> register_adapter("my_vlm", "my_package.adapters:MyAdapter", ["my_vlm"])
        >>> "my_vlm" in list_families()
        True
        >>> unregister_adapter("my_vlm")
    """
    model_types = tuple(model_types)
    if isinstance(target, str) and target.count(":") != 1:
        raise ValueError(f'An adapter is named "package.module:Class", got {target!r}.')
    if not clobber:
        taken = {t: name for name, entry in _ADAPTERS.items() for t in entry.model_types}
        if family in _ADAPTERS:
            raise ValueError(
                f"The family {family!r} has an adapter; pass clobber=True to replace it."
            )
        for model_type in model_types:
            if model_type in taken:
                raise ValueError(
                    f"model_type {model_type!r} is served by the family {taken[model_type]!r}; "
                    "pass clobber=True to take it over."
                )
    _ADAPTERS.pop(family, None)
    _ADAPTERS[family] = AdapterEntry(target, model_types)


def unregister_adapter(family: str) -> None:
    """Forget a family.

    Raises:
        KeyError: no such family.
    """
    del _ADAPTERS[family]


def list_families() -> tuple[str, ...]:
    """Names of all families with an adapter, those of installed packages included, sorted."""
    _load_entry_points()
    return tuple(sorted(_ADAPTERS))


def adapter_for(model: Any) -> Adapter | EncoderAdapter:
    """The adapter that serves a model, chosen by `model.config.model_type`, or as timm's.

    Raises:
        UnknownModelError: no adapter serves it.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None and _is_timm(model):
        model_type = "timm_wrapper"
    entry = _find(model_type)
    if entry is None:
        _load_entry_points()
        entry = _find(model_type)
    if entry is None:
        raise UnknownModelError(
            f"foveate has no adapter for {type(model).__name__} (model_type {model_type!r}). "
            f"Families with one: {', '.join(sorted(_ADAPTERS))}. To add a family, see "
            'docs/adapters.md, "Write an adapter in ten lines".'
        )
    return _resolve(entry.target)()


def _is_timm(model: Any) -> bool:
    """Whether a model is timm's, or has what a VisionTransformer there has."""
    classes = type(model).__mro__
    if any(cls.__module__.split(".")[0] == "timm" for cls in classes):
        return True
    parts = ("patch_embed", "blocks", "num_prefix_tokens", "forward_features", "forward_head")
    is_vit = any(cls.__name__ == "VisionTransformer" for cls in classes)
    return is_vit and all(hasattr(model, name) for name in parts)


def _find(model_type: str | None) -> AdapterEntry | None:
    # The latest registration wins, so that clobber can take a model type over.
    for entry in reversed(_ADAPTERS.values()):
        if model_type in entry.model_types:
            return entry
    return None


def _resolve(target: str | type) -> Any:
    if not isinstance(target, str):
        return target
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _ADAPTERS:
            continue
        try:
            adapter = point.load()
            register_adapter(point.name, adapter, adapter.model_types)
        except Exception as error:  # one broken package must not hide all other families
            warnings.warn(f"The adapter {point.name!r} ({point.value}): {error}", stacklevel=3)
