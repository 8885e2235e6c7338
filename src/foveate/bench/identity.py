"""What tells one run from another: model, weights, questions and what they are about."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foveate import __version__
from foveate.bench.inputs import Prompts
from foveate.bench.model import fingerprint
from foveate.bench.suite import WorldSuite
from foveate.core.hardware import hardware
from foveate.models.scorer import Scorer

#: Bytes at each end of a clip that tell it from another one of the same length.
_ENDS = 64 << 10


def scorer_name(scorer: Scorer) -> str:
    """What tells a scorer from another one: its class, and the weights of its model if it has any.

    Example:
        >>> class Redness:
        ...     size, probabilities = (8, 8), True
        ...     def relevance(self, pixels_T3hw, question):
        ...         return pixels_T3hw[:, 0].float().mean((1, 2)) / 255
        >>> scorer_name(Redness())
        'Redness'
    """
    name, model = type(scorer).__name__, getattr(scorer, "model", None)
    return f"{name}, weights {fingerprint(model)}" if isinstance(model, nn.Module) else name


def run_identity(model: nn.Module, name: str, prompts: Prompts) -> dict[str, Any]:
    """What was run, on what."""
    import transformers

    suite = prompts.suite
    tasks: dict[str, int] = {}
    for prompt in prompts.prompts:
        tasks[prompt.item.task] = tasks.get(prompt.item.task, 0) + 1
    return {
        "model": name,
        "model_id": f"{type(model).__name__}, weights {fingerprint(model)}",
        "suite": suite.name,
        "suite_args": suite.args,
        "items": len(prompts.prompts),
        "clips": len({prompt.item.clip_id for prompt in prompts.prompts}),
        "questions": _digest(prompts),
        "lettered": prompts.lettered,
        "tasks": tasks,
        "skipped": list(suite.errors),
        "damaged": list(prompts.damaged),
        "device": prompts.device.type,
        "dtype": str(prompts.dtype).removeprefix("torch."),
        "hardware": hardware(prompts.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _digest(prompts: Prompts) -> str:
    """A name for the questions and what they are about, not for where files lie or their dates."""
    generated = isinstance(prompts.suite, WorldSuite)  # its arguments say what the clips show
    digest, clips = hashlib.sha256(), {}
    for prompt in prompts.prompts:
        item = prompt.item
        if item.clip_id not in clips:
            clips[item.clip_id] = _content(item.video, generated)
        fields = [item.id, item.clip_id, item.question, item.options, item.answer, item.task]
        digest.update(json.dumps([*fields, *clips[item.clip_id]]).encode())
    return digest.hexdigest()[:16]


def _content(video: Path | np.ndarray, generated: bool) -> list[Any]:
    """Bytes of a clip and a hash of its first and last 64 kB; the middle is taken on trust."""
    if generated and not isinstance(video, Path):
        return [video.nbytes]
    if isinstance(video, Path):
        size = video.stat().st_size
        with video.open("rb") as file:
            first = file.read(_ENDS)
            file.seek(max(size - _ENDS, 0))
            last = file.read(_ENDS)
    else:
        data = np.ascontiguousarray(video).reshape(-1).view(np.uint8)
        size, first, last = data.nbytes, data[:_ENDS].tobytes(), data[-_ENDS:].tobytes()
    return [size, hashlib.sha256(first + last).hexdigest()]
