"""What an answer takes, stage by stage, while it happens: spans, and words for a progress bar.

Legend: B batch, L tokens.
"""

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

#: Called with a stage of `TIMED_STAGES`, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def settle(device: torch.device) -> None:
    """Wait until a GPU has done what it was handed, so that a span ends with its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed_features(
    model: nn.Module, timeline: Timeline, progress: Progress, frames: int
) -> Iterator[None]:
    """Note every call of the model's feature methods as a span of the stage "encode".

    Put around an attachment, whose own wrappers then lie outside.
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
            progress("encode", frames, frames)
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


def make_clock(
    tokenizer: Any,
    timeline: Timeline,
    on_text: Callable[[str], None] | None,
    on_token: Callable[[int], None],
) -> Any:
    """A streamer of `generate` that hands text on as it comes and notes when tokens did.

    Its attributes: `first`, the timeline's seconds at the first new token; `num_new`, tokens so
    far.
    """
    from transformers import TextStreamer

    class Clock(TextStreamer):
        first: float | None = None
        num_new = 0

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.num_new += 1
                if self.first is None:
                    self.first = timeline.now()
                on_token(self.num_new)
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text and on_text is not None:
                on_text(text)

    return Clock(tokenizer, skip_prompt=True, skip_special_tokens=True)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use so far: of the GPU since its last reset; on CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
