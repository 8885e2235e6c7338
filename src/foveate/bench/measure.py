"""Time and memory of one recipe, apart from accuracy: few questions, batch 1, measured in turns."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate.attach import Attachment
from foveate.bench.generation import Generator
from foveate.core import FramePlan

#: Tokens that a timed call is made to write.
NEW_TOKENS = 16
Attach = Callable[[], AbstractContextManager[Attachment | None]]


class Stopwatch:
    """Times a generation token by token, by the hook that streams text to a user."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token once it has reached the host."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    def measure(self, inputs: Mapping[str, torch.Tensor], tokens: int) -> tuple[float, float]:
        """Seconds to the first token (encoder included) and tokens per second after it."""
        self.moments = []
        device = inputs["input_ids"].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        self.generator.generate(inputs, tokens, min_new_tokens=tokens, streamer=self)
        first, last = self.moments[1], self.moments[-1]
        spent, decoded = last - first, len(self.moments) - 2
        return first - begin, decoded / spent if decoded and spent > 0 else 0.0


def measure_times(
    generator: Generator,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    attach: Attach | None,
    untouched: Attach,
    repeats: int,
    chosen: Sequence[tuple[Mapping[str, torch.Tensor], FramePlan | None]] | None = None,
) -> dict[str, Any]:
    """Times of one cell: after a warm-up, `repeats` turns over all questions.

    Every turn measures the untouched model, too, so that `first_token_untouched` saw the same
    machine in the same minutes: their ratio stands even where the clock drifts.

    Args:
        generator: the model.
        inputs: one question each.
        attach: puts the recipe on the model; None for the untouched model itself.
        untouched: a context that puts nothing on it.
        repeats: turns; 0 measures nothing.
        chosen: the same questions with the frames that the recipe chose, and why; None: the same
            inputs. Choosing is not part of these times, see `foveate.bench.stage_times`.

    Returns:
        "first_token" and "first_token_untouched" {"median", "low", "high", "repeats"}: seconds, a
        turn being the mean of its questions, low and high the fastest and slowest turn;
        "decode_tokens_per_second": median; "overhead": stage -> median seconds of our modules in
        one call. Without repeats: None, None and {}.
    """
    result: dict[str, Any] = {
        "first_token": None,
        "first_token_untouched": None,
        "decode_tokens_per_second": None,
        "overhead": {},
    }
    if repeats < 1:
        return result
    watch, variants = Stopwatch(generator), [untouched, *([attach] if attach else [])]
    same = [(one, None) for one in inputs]
    shown = [same, same if chosen is None else chosen]
    turns: list[list[float]] = [[] for _ in variants]
    speeds: list[list[float]] = [[] for _ in variants]
    overhead: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for variant, enter in enumerate(variants):
            firsts = []
            for one, plan in shown[variant]:
                with enter() as run:
                    if run is not None and plan is not None:
                        run.plans = [plan]
                    first, speed = watch.measure(one, NEW_TOKENS)
                firsts.append(first)
                if turn == 0:  # the first turn warms caches up
                    continue
                speeds[variant].append(speed)
                for stage, seconds in (run.report.seconds if run else {}).items():
                    overhead.setdefault(stage, []).append(seconds)
            if turn:
                turns[variant].append(statistics.fmean(firsts))
    result["first_token"] = _spread(turns[-1])
    result["first_token_untouched"] = _spread(turns[0])
    result["decode_tokens_per_second"] = statistics.median(speeds[-1])
    result["overhead"] = {stage: statistics.median(s) for stage, s in overhead.items()}
    return result


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "repeats": len(seconds),
    }


def peak_memory(model: nn.Module, call: Callable[[], Any]) -> int | None:
    """Most bytes of tensors alive at once during a call, weights included.

    On CUDA the allocator's own count. On CPU no system figure speaks of one call (resident memory
    only ever grows), so the tensors that operators return are counted while they live; scratch
    memory inside an operator is not seen. Elsewhere None.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    with LiveTensors(model) as live:
        call()
    return live.peak


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are alive.

    Args:
        model: its weights count from the beginning.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at once.

    Example:
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> with LiveTensors(layer) as live:
        ...     x = torch.ones(100) + torch.ones(100)
        >>> live.now, live.peak
        (416, 1216)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}
        self.now = self.peak = 0
        for tensor in [*model.parameters(), *model.buffers()]:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                sparse = leaf.layout == torch.sparse_coo
                for part in (leaf._indices(), leaf._values()) if sparse else (leaf,):
                    self._count(part)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        # torch keeps the Python object of a storage as long as the storage itself.
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self.now -= size
