"""Names of methods, resolved at first use; other packages add theirs by entry point."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
from collections.abc import Mapping
from types import MappingProxyType

from foveate.core.card import Kind, Stage
from foveate.core.method import Method
from foveate.errors import UnknownMethodError

ENTRY_POINT_GROUP = "foveate.methods"

_BUILTIN: dict[str, str] = {
    "aim": "foveate.methods.aim:AIM",
    "divprune": "foveate.methods.divprune:DivPrune",
    "fastervlm": "foveate.methods.fastervlm:FasterVLM",
    "fastv": "foveate.methods.fastv:FastV",
    "holitom": "foveate.methods.holitom:HoliTom",
    "pool": "foveate.methods.pool:Pool",
    "quickvideo": "foveate.methods.quickvideo:QuickVideo",
    "random": "foveate.methods.random:Random",
    "tome": "foveate.methods.tome:ToMe",
    "uniform": "foveate.methods.uniform:Uniform",
}
_methods: dict[str, str | type[Method]] = dict(_BUILTIN)
_outside_loaded = False

#: Read-only view of all registered methods: name -> "module:Class" or the class.
METHODS: Mapping[str, str | type[Method]] = MappingProxyType(_methods)


def register_method(name: str, target: str | type[Method], clobber: bool = False) -> None:
    """Register a method under `name`.

    Args:
        name: lower case letters, digits and underscores.
        target: the class, or "module:Class" to import at first use.
        clobber: replace a method that has this name already.

    Raises:
        ValueError: the name is malformed or taken.
    """
    if not name.replace("_", "").isalnum() or name != name.lower():
        raise ValueError(f"A method name is lower case letters, digits and _, got {name!r}.")
    if name in _methods and not clobber and _methods[name] != target:
        raise ValueError(f"Method {name!r} is registered already; pass clobber=True to replace it.")
    _methods[name] = target


def get_method(name: str) -> type[Method]:
    """The class registered under `name`, imported now if need be.

    Raises:
        UnknownMethodError: nothing has that name.

    Example:
        >>> get_method("divprune").card.arxiv
        '2503.02175'
    """
    _load_outside()
    target = _methods.get(name)
    if target is None:
        near = difflib.get_close_matches(name, _methods, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UnknownMethodError(
            f"No method is named {name!r}.{hint} Known: {', '.join(sorted(_methods))}."
        )
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
        _methods[name] = target
    assert isinstance(target, type)
    return target


def list_methods(
    pattern: str = "*", *, stage: Stage | None = None, kind: Kind | None = None
) -> list[str]:
    """Names of the registered methods, sorted.

    Args:
        pattern: shell-style pattern on the name.
        stage: only methods that act at this stage.
        kind: only "training-free", "trained" or "baseline".
    """
    _load_outside()
    names = sorted(name for name in _methods if fnmatch.fnmatch(name, pattern))
    if stage is not None:
        names = [name for name in names if stage in get_method(name).card.stages]
    if kind is not None:
        names = [name for name in names if get_method(name).card.kind == kind]
    return names


def _load_outside() -> None:
    global _outside_loaded
    if _outside_loaded:
        return
    _outside_loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        # A broken or clashing plug-in must not take the library down with it.
        if entry.name not in _methods:
            _methods[entry.name] = entry.value
