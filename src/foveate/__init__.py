"""Remove redundant visual tokens from vision transformers and multimodal LLMs.

Example:
    >>> import foveate
    >>> with foveate.reduce(model, "holitom", retain=0.15) as run:      # doctest: +SKIP
    ...     out = model.generate(**inputs)
    >>> print(run.report)                                               # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.attach import Attachment, choose_frames, reduce
    from foveate.checkpoints import AnsweringScorer, AskingScorer, embedded
    from foveate.core import (
        Budget,
        Card,
        Grid,
        Method,
        Recipe,
        Reduction,
        Report,
        Tokens,
        get_method,
        list_methods,
        register_method,
    )
    from foveate.errors import FoveateError
    from foveate.models.companion import Companion
    from foveate.models.registry import list_families, register_adapter
    from foveate.models.scorer import Scorer
    from foveate.video import Clip, Live
    from foveate.view.answer import ask
    from foveate.view.overlap import prefill
    from foveate.view.streaming import Stream
    from foveate.view.thinking import think

__version__ = "0.1.0"

# Resolved at first use: `import foveate` loads neither torch nor transformers.
_LAZY = {
    "AnsweringScorer": "foveate.checkpoints",
    "AskingScorer": "foveate.checkpoints",
    "Attachment": "foveate.attach",
    "Budget": "foveate.core",
    "Card": "foveate.core",
    "Clip": "foveate.video",
    "Companion": "foveate.models.companion",
    "FoveateError": "foveate.errors",
    "Grid": "foveate.core",
    "Live": "foveate.video",
    "Method": "foveate.core",
    "Recipe": "foveate.core",
    "Reduction": "foveate.core",
    "Report": "foveate.core",
    "Scorer": "foveate.models.scorer",
    "Stream": "foveate.view.streaming",
    "Tokens": "foveate.core",
    "ask": "foveate.view.answer",
    "choose_frames": "foveate.attach",
    "embedded": "foveate.checkpoints",
    "get_method": "foveate.core",
    "list_families": "foveate.models.registry",
    "list_methods": "foveate.core",
    "prefill": "foveate.view.overlap",
    "reduce": "foveate.attach",
    "register_adapter": "foveate.models.registry",
    "register_method": "foveate.core",
    "think": "foveate.view.thinking",
}

__all__ = [
    "AnsweringScorer",
    "AskingScorer",
    "Attachment",
    "Budget",
    "Card",
    "Clip",
    "Companion",
    "FoveateError",
    "Grid",
    "Live",
    "Method",
    "Recipe",
    "Reduction",
    "Report",
    "Scorer",
    "Stream",
    "Tokens",
    "__version__",
    "ask",
    "choose_frames",
    "embedded",
    "get_method",
    "list_families",
    "list_methods",
    "prefill",
    "reduce",
    "register_adapter",
    "register_method",
    "think",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return __all__
