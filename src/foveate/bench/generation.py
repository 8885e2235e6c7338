"""Greedy answers to padded batches, and what the attachment's reports say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from foveate.attach import Attachment, reduce
from foveate.bench.inputs import Prompt, Prompts
from foveate.bench.model import language_adapter
from foveate.bench.sharing import SharedEncoder
from foveate.core import FramePlan, Report
from foveate.core.flops import prefill_flops
from foveate.errors import FoveateError
from foveate.models.dims import text_dims

#: A budget that removes nothing from any prompt, yet makes the attachment count.
_EVERYTHING = 1 << 31


class Generator:
    """Greedy generation of short answers by one model.

    Args:
        model: the model, with or without an attachment at the time of a call.
        prompts: the questions.
        max_new_tokens: longest answer, in tokens.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, max_new_tokens: int) -> None:
        self.model: Any = model
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.shared = SharedEncoder(model)
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def generate(self, inputs: Mapping[str, torch.Tensor], tokens: int, **options: Any) -> Any:
        """Token ids of prompts and answers, greedily."""
        with torch.inference_mode():
            return self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.prompts.pad,
                **options,
            )

    def answer(self, batch: Sequence[Prompt], run: Attachment | None, tally: Tally) -> list[str]:
        """Replies to a batch; it is halved until it fits into the memory of a GPU."""
        inputs = self.prompts.collate(batch)
        if run is not None:
            run.plans = plans_of(batch)
        try:
            with self.shared.over([prompt.visual_key for prompt in batch]):
                ids = self.generate(inputs, self.max_new_tokens)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            ids = None
        if ids is None:
            del inputs
            torch.cuda.empty_cache()
            middle = len(batch) // 2
            halves = batch[:middle], batch[middle:]
            return [text for half in halves for text in self.answer(half, run, tally)]
        tally.add(batch, None if run is None else run.report)
        start = inputs["input_ids"].shape[1]
        return [self._text(row) for row in ids[:, start:].tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        decode = self.prompts.processor.tokenizer.decode
        return decode(ids[:end], skip_special_tokens=True).strip()


def plans_of(batch: Sequence[Prompt]) -> list[FramePlan | None]:
    """Why these frames were chosen, one entry per question; empty where nobody chose."""
    plans = [prompt.plan for prompt in batch]
    return plans if any(plan is not None for plan in plans) else []


class UntouchedCosts:
    """FLOPs of the untouched model, by the same rule as the reports of reduced calls.

    An attachment that removes nothing makes no report, so encoder and projector are read off one
    call per input shape whose budget is larger than any prompt; prefill follows from the length.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._parts: dict[Any, float | None] = {}
        self.num_layers = len(language_adapter(generator.model).layers(generator.model))
        try:
            self._text = text_dims(generator.model)
        except ValueError:  # the dimensions of an unusual configuration cannot be read
            self._text = None

    def flops(self, prompt: Prompt) -> float | None:
        """FLOPs up to the first token; None where they cannot be counted."""
        if prompt.visual_shapes not in self._parts:
            self._parts[prompt.visual_shapes] = self._measure(prompt)
        part = self._parts[prompt.visual_shapes]
        if part is None or self._text is None:
            return None
        return part + prefill_flops(self._text, prompt.length)

    def _measure(self, prompt: Prompt) -> float | None:
        generator = self._generator
        try:
            with reduce(generator.model, "uniform", tokens=_EVERYTHING) as run:
                generator.generate(generator.prompts.collate([prompt]), 1)
        except FoveateError:
            return None
        parts = run.report.flops.get("untouched")
        return None if parts is None else parts["encoder"] + parts["projector"]


@dataclass
class _StageSum:
    before: int = 0
    after: int = 0
    items: int = 0


@dataclass
class Tally:
    """Means per question over the reports of a cell's calls.

    Stages are averaged over the questions of the calls in which they removed something.
    """

    costs: UntouchedCosts
    items: int = 0
    before: int = 0
    after: int = 0
    stages: dict[tuple[str, str, int | None], _StageSum] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    untouched: float | None = 0.0
    reduced: float | None = 0.0

    def add(self, batch: Sequence[Prompt], report: Report | None) -> None:
        """Count one call; a report without items is that of an untouched call."""
        self.items += len(batch)
        if report is None or not report.items:
            self._add_untouched(batch)
            return
        self.before += report.visual_before
        self.after += report.visual_after
        for stage in report.stages:
            key = (stage.stage, stage.method, stage.layer)
            entry = self.stages.setdefault(key, _StageSum())
            entry.before += sum(stage.before)
            entry.after += sum(stage.after)
            entry.items += len(batch)
        self._add_layers(report.layer_lengths)
        totals = {name: parts.get("total") for name, parts in report.flops.items()}
        self.untouched = _plus(self.untouched, totals.get("untouched"))
        self.reduced = _plus(self.reduced, totals.get("reduced"))

    def _add_untouched(self, batch: Sequence[Prompt]) -> None:
        visual = sum(prompt.visual_tokens for prompt in batch)
        self.before += visual
        self.after += visual
        self._add_layers([[prompt.length] * self.costs.num_layers for prompt in batch])
        for prompt in batch:
            flops = self.costs.flops(prompt)
            self.untouched = _plus(self.untouched, flops)
            self.reduced = _plus(self.reduced, flops)

    def _add_layers(self, lengths: Sequence[Sequence[int]]) -> None:
        sums = [sum(column) for column in zip(*lengths, strict=True)]
        self.layers = [a + b for a, b in zip(self.layers or [0] * len(sums), sums, strict=True)]

    def means(self) -> dict[str, Any]:
        """The figures of a cell's line."""
        n = self.items
        return {
            "visual_before": self.before / n,
            "visual_after": self.after / n,
            "stages": [
                {
                    "stage": stage,
                    "method": method,
                    "layer": layer,
                    "before": entry.before / entry.items,
                    "after": entry.after / entry.items,
                }
                for (stage, method, layer), entry in self.stages.items()
            ],
            "layer_tokens": [total / n for total in self.layers],
            "flops": {
                "untouched": None if self.untouched is None else self.untouched / n,
                "reduced": None if self.reduced is None else self.reduced / n,
            },
        }


def _plus(total: float | None, more: float | None) -> float | None:
    """A sum that is unknown as soon as one part is."""
    return None if total is None or more is None else total + more
