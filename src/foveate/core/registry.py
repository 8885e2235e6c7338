"""Names of methods, resolved at first use; other packages add theirs by entry point."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import get_args

from foveate.core.card import STAGES, Card, Kind, Stage, check_name
from foveate.core.method import Method
from foveate.core.presets import PRESETS
from foveate.errors import FoveateError, UnknownMethodError

ENTRY_POINT_GROUP = "foveate.methods"

_BUILTIN: dict[str, str] = {
    "aim": "foveate.methods.aim:AIM",
    "b_vllm": "foveate.methods.b_vllm:BVLLM",
    "catp": "foveate.methods.catp:CATP",
    "centerclip": "foveate.methods.centerclip:CenterCLIP",
    "divprune": "foveate.methods.divprune:DivPrune",
    "dtop": "foveate.methods.dtop:DToP",
    "dycoke": "foveate.methods.dycoke:DyCoke",
    "evs": "foveate.methods.evs:EVS",
    "f2c": "foveate.methods.f2c:F2C",
    "fastervlm": "foveate.methods.fastervlm:FasterVLM",
    "fastv": "foveate.methods.fastv:FastV",
    "flowcut": "foveate.methods.flowcut:FlowCut",
    "fopru": "foveate.methods.fopru:FoPru",
    "free_video_llm": "foveate.methods.free_video_llm:FreeVideoLLM",
    "grt": "foveate.methods.grt:GRT",
    "gtp_vit": "foveate.methods.gtp_vit:GTPViT",
    "hiprune": "foveate.methods.hiprune:HiPrune",
    "holitom": "foveate.methods.holitom:HoliTom",
    "hot": "foveate.methods.hot:HoT",
    "intp": "foveate.methods.intp:INTP",
    "kffocus": "foveate.methods.kffocus:KFFocus",
    "lvlm_csp": "foveate.methods.lvlm_csp:LVLMCSP",
    "m3": "foveate.methods.m3:M3",
    "norm": "foveate.methods.norm:Norm",
    "pool": "foveate.methods.pool:Pool",
    "pyramiddrop": "foveate.methods.pyramiddrop:PyramidDrop",
    "qtsplus": "foveate.methods.qtsplus:QTSplus",
    "quickvideo": "foveate.methods.quickvideo:QuickVideo",
    "quota": "foveate.methods.quota:QuoTA",
    "random": "foveate.methods.random:Random",
    "recoverable": "foveate.methods.recoverable:Recoverable",
    "s5": "foveate.methods.s5:S5",
    "safewatch": "foveate.methods.safewatch:SafeWatch",
    "stvit": "foveate.methods.stvit:STViT",
    "tdc": "foveate.methods.tdc:TDC",
    "tempme": "foveate.methods.tempme:TempMe",
    "todre": "foveate.methods.todre:ToDRE",
    "token_transforming": "foveate.methods.token_transforming:TokenTransforming",
    "tome": "foveate.methods.tome:ToMe",
    "tovim": "foveate.methods.tovim:ToPViM",
    "transprune": "foveate.methods.transprune:TransPrune",
    "ts_llava": "foveate.methods.ts_llava:TSLLaVA",
    "uniform": "foveate.methods.uniform:Uniform",
    "vflowopt": "foveate.methods.vflowopt:VFlowOpt",
    "vidcom2": "foveate.methods.vidcom2:VidCom2",
    "video_streaming": "foveate.methods.video_streaming:VideoStreaming",
    "video_xl2": "foveate.methods.video_xl2:VideoXL2",
    "videoscan": "foveate.methods.videoscan:VideoScan",
    "visionzip": "foveate.methods.visionzip:VisionZip",
    "vista_llama": "foveate.methods.vista_llama:VistaLLaMA",
    "zero_tprune": "foveate.methods.zero_tprune:ZeroTPrune",
}
_methods: dict[str, str | type[Method]] = dict(_BUILTIN)
_outside_loaded = False

#: Read-only view of all registered methods: name -> "module:Class" or the class. Methods of other
#: packages join it with the first look-up.
METHODS: Mapping[str, str | type[Method]] = MappingProxyType(_methods)


def register_method(name: str, target: str | type[Method], clobber: bool = False) -> None:
    """Register a method under `name`.

    Args:
        name: lower case letters, digits and underscores.
        target: the class, or "module:Class" to import at first use.
        clobber: replace a method that has this name already. Not needed to register the class of
            the same module and name anew, as running a notebook cell twice does.

    Raises:
        ValueError: the name is malformed or taken, or the target is no complete method.
    """
    check_name(name)
    if name in PRESETS:
        raise ValueError(f"{name!r} is the name of a recipe ({PRESETS[name].text}).")
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        if not module or not attribute:
            raise ValueError(
                f'A method is registered as a class or "module:Class", got {target!r}.'
            )
    else:
        _check_method(name, target)
    if name in _methods and not clobber and _path(_methods[name]) != _path(target):
        raise ValueError(
            f"Method {name!r} is registered already as {_path(_methods[name])}; pass clobber=True "
            "to replace it."
        )
    _methods[name] = target


def get_method(name: str) -> type[Method]:
    """The class registered under `name`, imported now if need be.

    Raises:
        UnknownMethodError: nothing has that name.
        ImportError: its module or class cannot be imported.
        ValueError: what was imported is no complete method.

    Example:
        >>> get_method("divprune").card.arxiv
        '2503.02175'
    """
    _load_outside()
    target = _methods.get(name)
    if target is None:
        near = difflib.get_close_matches(name.lower(), _methods, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UnknownMethodError(
            f"No method is named {name!r}.{hint} Known: {', '.join(sorted(_methods))}."
        )
    if isinstance(target, str):
        _methods[name] = target = _import_method(name, target)
    return target


def list_methods(
    pattern: str = "*", *, stage: Stage | None = None, kind: Kind | None = None
) -> list[str]:
    """Names of the registered methods, sorted.

    Args:
        pattern: shell-style pattern on the name.
        stage: only methods that act at this stage.
        kind: only "training-free", "trained" or "baseline".

    Raises:
        ValueError: there is no such stage or kind.

    Example:
        >>> "divprune" in list_methods("div*", stage="projector", kind="training-free")
        True
    """
    _load_outside()
    for what, value, known in (("stage", stage, STAGES), ("kind", kind, get_args(Kind))):
        if value is not None and value not in known:
            raise ValueError(f"There is no {what} {value!r}; choose from {', '.join(known)}.")
    names = sorted(name for name in _methods if fnmatch.fnmatch(name, pattern))
    if stage is None and kind is None:
        return names
    found = []
    for name in names:
        try:
            card = get_method(name).card
        except Exception as error:  # a broken plug-in must not take the listing down with it
            warnings.warn(f"{name} is left out: {type(error).__name__}: {error}", stacklevel=2)
            continue
        if (stage is None or stage in card.stages) and kind in (None, card.kind):
            found.append(name)
    return found


def _import_method(name: str, target: str) -> type[Method]:
    module, _, attribute = target.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except FoveateError:
        raise
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"Method {name!r} is registered as {target}, which cannot be imported: {error}."
        ) from error
    return _check_method(name, found)


def _check_method(name: str, target: object) -> type[Method]:
    """A class can be used when its card speaks of it."""
    if not isinstance(target, type) or not issubclass(target, Method):
        raise ValueError(f"Method {name!r} must be a subclass of foveate.Method, got {target!r}.")
    card = getattr(target, "card", None)
    if not isinstance(card, Card):
        raise ValueError(f"{target.__name__} needs a class attribute card = Card(...).")
    if card.name != name:
        # Recipes are written down with the card's name and must find the class again.
        raise ValueError(
            f"{target.__name__} is registered as {name!r}, its card says {card.name!r}."
        )
    if set(card.stages) != set(target.stages()):
        raise ValueError(
            f"{target.__name__} overrides the stages {', '.join(target.stages()) or '(none)'}, "
            f"its card says {', '.join(card.stages)}."
        )
    return target


def _path(target: str | type[Method]) -> str:
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def _load_outside() -> None:
    global _outside_loaded
    if _outside_loaded:
        return
    _outside_loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        target = entry.value.partition("[")[0].strip()
        # A clashing plug-in must not take the library down with it, nor change what a name means.
        try:
            register_method(entry.name, target)
        except ValueError as error:
            warnings.warn(f"The plug-in {entry.name} = {target} is ignored: {error}", stacklevel=3)
