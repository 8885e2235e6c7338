"""What foveate uses of lmms-eval, for machines without it.

Recorded by hand from lmms-eval 0.7.3: names, signatures and defaults of `api.model.lmms`,
`api.instance`, `models.registry_v2.ModelManifest`, `models.model_utils.gen_metrics.log_metrics` and
the parsing of `utils.simple_parse_args_string`. Where the package is installed,
`test_the_recording_is_true_to_the_package` compares the two and the other tests use the package.
"""

from __future__ import annotations

import abc
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest


class CacheHook:
    def __init__(self, cachinglm: Any = None) -> None:
        pass

    def add_partial(self, attr: Any, req: Any, res: Any) -> None:
        pass


class lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.cache_hook = CacheHook(None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
        config = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**simple_parse_args_string(arg_string), **config)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        del self.task_dict


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


HISTORY: list[dict[str, Any]] = []


def log_metrics(
    total_elapsed_time: float,
    total_gen_tokens: int,
    avg_speed: float,
    additional_metrics: dict[str, Any] | None = None,
) -> None:
    figures = {"total_elapsed_time": total_elapsed_time, "total_gen_tokens": total_gen_tokens}
    HISTORY.append({**figures, "avg_speed": avg_speed, **(additional_metrics or {})})


def get_logged_metrics_history() -> list[dict[str, Any]]:
    return list(HISTORY)


def simple_parse_args_string(args_string: str) -> dict[str, Any]:
    """Cut at commas outside of quotes, braces and square brackets; not of parentheses."""
    parts, current, depth, quote = [], "", 0, ""
    for character in args_string.strip():
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        current += character
    pairs = (part.split("=", 1) for part in [*parts, current.strip()] if part)
    return {name: _value(text) for name, text in pairs}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text) if text.isnumeric() else float(text)
    except ValueError:
        return text


MODULES = {
    "api.model": (lmms, CacheHook),
    "api.instance": (Instance, GenerationResult, TokenCounts),
    "models.registry_v2": (ModelManifest,),
    "models.model_utils.gen_metrics": (log_metrics, get_logged_metrics_history),
    "utils": (simple_parse_args_string,),
}


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the recording where the package would be."""
    for name, members in MODULES.items():
        full = f"lmms_eval.{name}"
        for index in range(1, full.count(".") + 1):
            parent = ".".join(full.split(".")[:index])
            if parent not in sys.modules:
                patch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(full)
        for member in members:
            setattr(module, member.__name__, member)
        patch.setitem(sys.modules, full, module)
