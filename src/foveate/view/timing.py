"""What an answer takes, stage by stage, while it happens: spans, and words for a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from foveate.core.timeline import Timeline

#: Called with a stage of `TIMED_STAGES`, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


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
