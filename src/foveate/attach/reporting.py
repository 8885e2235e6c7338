"""Turns what hooks have seen into the figures of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from foveate.attach.encoder import EncoderRun
from foveate.attach.features import FeatureRecord
from foveate.core import Budget, Recipe, Report, Stage, StageReport
from foveate.core.flops import (
    EncoderDims,
    FlopsBreakdown,
    encoder_flops,
    encoder_segments,
    prefill_flops,
    projector_flops,
)
from foveate.models.dims import projector_dims, text_dims, vision_dims


def describe_budget(budget: Budget) -> str:
    """The budget as a person writes it."""
    if budget.retain is not None:
        return f"retain={_plain(budget.retain)}"
    if budget.tokens is not None:
        return f"tokens={_plain(budget.tokens)}"
    return "default budget"


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def note_encoder(report: Report, recipe: Recipe, runs: Iterable[EncoderRun]) -> None:
    """Add the patches and encoder stages: tokens entering the first block, leaving the last."""
    runs = list(runs)
    for run in runs:
        before, after = run.counts_before(), run.counts()
        if sum(after) < sum(before):
            report.stages.insert(
                0, StageReport("encoder", _names(recipe, "encoder"), before, after)
            )
            report.spend("encoder", run.seconds)
        if run.dense is not None:
            cost = f"{run.dense.flops / 1e9:.3g} GFLOPs"
            report.notes.append(f"The heads of {run.dense.method} cost {cost} beside the encoder.")
    for run in runs:
        if run.entered is not None:
            before, after = (run.num_tokens,) * run.num_images, run.entered.counts_B.tolist()
            entry = StageReport("patches", _names(recipe, "patches"), before, tuple(after))
            report.stages.insert(0, entry)
            report.spend("patches", run.seconds)


def _names(recipe: Recipe, stage: Stage) -> str:
    return " + ".join(recipe.steps[i].method.name for i in recipe.at(stage))


class CostModel:
    """FLOPs of one model; its dimensions are read once.

    A model whose dimensions cannot be read gets a note instead of figures.
    """

    def __init__(
        self,
        model: nn.Module,
        has_text: bool,
        vision: Callable[[nn.Module], EncoderDims] = vision_dims,
    ) -> None:
        self.reason = ""
        try:
            self.vision = vision(model)
            self.text = text_dims(model) if has_text else None
            self.projector = projector_dims(model) if has_text else None
        except ValueError as error:
            self.reason = str(error)

    def encoder_alone(self, report: Report, run: EncoderRun) -> None:
        """FLOPs of a bare encoder's call."""
        if self._unknown(report):
            return
        full = encoder_flops(self.vision, run.num_tokens, run.num_images)
        report.flops = {
            "untouched": FlopsBreakdown(encoder=full).as_dict(),
            "reduced": FlopsBreakdown(encoder=self._run(run)).as_dict(),
        }

    def language_model(
        self, report: Report, records: Iterable[FeatureRecord], runs: list[EncoderRun]
    ) -> None:
        """FLOPs of encoder, projector and prefill, untouched and reduced."""
        if self._unknown(report):
            return
        assert self.text is not None and self.projector is not None
        encoder = encoder_reduced = projector = 0
        try:
            for record in records:
                encoder += self._tower(record)
                projector += projector_flops(self.projector, _projected(record))
        except ValueError as error:
            report.notes.append(f"FLOPs not counted: {error}")
            return
        encoder_reduced = sum(map(self._run, runs)) if runs else encoder
        layers = self.text.num_layers
        before = _samples_before(report)
        untouched = sum(prefill_flops(self.text, length) for length in before)
        blocks = report.attention_pairs or [None] * len(report.layer_lengths)
        reduced = sum(
            prefill_flops(self.text, lengths, attention_pairs=pairs)
            for lengths, pairs in zip(report.layer_lengths, blocks, strict=True)
            if len(lengths) == layers
        )
        report.flops = {
            "untouched": FlopsBreakdown(encoder, projector, untouched).as_dict(),
            "reduced": FlopsBreakdown(encoder_reduced, projector, reduced).as_dict(),
        }

    def _run(self, run: EncoderRun) -> int:
        return run.flops(self.vision)

    def _tower(self, record: FeatureRecord) -> int:
        if record.grid_thw:
            return encoder_flops(self.vision, encoder_segments(self.vision, record.grid_thw))
        return sum(encoder_flops(self.vision, tokens, n) for n, tokens in record.tower_inputs)

    def _unknown(self, report: Report) -> bool:
        if self.reason:
            report.notes.append(f"FLOPs not counted: {self.reason}")
        return bool(self.reason)


def _projected(record: FeatureRecord) -> int:
    """Tokens that enter the projector, before it merges neighbours."""
    if record.shrinks_itself:
        return sum(grid.num_patches for grid in record.grids)
    return sum(images * (tokens - record.num_prefix) for images, tokens in record.tower_inputs)


def _samples_before(report: Report) -> list[int]:
    """Tokens of every sample before any reduction."""
    dropped = [0] * len(report.layer_lengths)
    for item in report.items:
        dropped[item.sample] += item.before - item.after
    entered = [report.prompt_lengths[s] for s in range(len(dropped))]
    return [length + gone for length, gone in zip(entered, dropped, strict=True)]
