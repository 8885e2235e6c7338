"""When the vision side of a model is at work, as spans of a timeline."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from foveate.core.timeline import Timeline
from foveate.models.registry import adapter_for


def settle(device: torch.device) -> None:
    """Wait until a GPU has done what it was handed, so that a span ends with its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def encode_spans(
    model: nn.Module, timeline: Timeline, done: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Note every call of the model's feature methods as a span of the stage "encode".

    Put around an attachment, whose own wrappers then lie outside.

    Args:
        model: a video LLM.
        timeline: gets the spans.
        done: called behind each.

    Raises:
        UnknownModelError: no adapter serves the model.
    """
    adapter: Any = adapter_for(model)
    base, busy = adapter.base(model), threading.local()
    replaced: dict[str, Any] = {}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)  # generate() reads the signature
        def run(*args: Any, **kwargs: Any) -> Any:
            # Some video methods call the image method of the same instance: the outer one counts.
            if getattr(busy, "inside", False):
                return original(*args, **kwargs)
            busy.inside = True
            try:
                with timeline.span("encode"):
                    output = original(*args, **kwargs)
                    settle(next(base.parameters()).device)
            finally:
                busy.inside = False
            done()
            return output

        return run

    for name in set(adapter.feature_methods.values()):
        if hasattr(base, name):
            replaced[name] = base.__dict__.get(name)
            base.__dict__[name] = timed(getattr(base, name))
    try:
        yield
    finally:
        for name, previous in replaced.items():
            if previous is None:
                base.__dict__.pop(name, None)
            else:
                base.__dict__[name] = previous
