"""One report of a prompt that was read chunk by chunk.

Legend: N tokens of a chunk's video, M tokens left of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from foveate.attach.overlap_prompt import ChunkedPrompt
from foveate.core import Evidence, Grid, ItemReport, Reduction, Report, StageReport
from foveate.core.flops import FlopsBreakdown, prefill_flops
from foveate.models.dims import text_dims


class ReportJoiner:
    """Takes the report of every chunk and makes one of them.

    Args:
        model: whose language model's FLOPs are counted.
        prompt: the prompt.
    """

    def __init__(self, model: nn.Module, prompt: ChunkedPrompt) -> None:
        self.model, self.prompt = model, prompt
        self.reports: list[Report] = []
        self.pairs: list[int] = []
        self._past: list[int] = []

    def add(self, part: int, report: Report, num_tokens: int) -> None:
        """Note one chunk; a report without items is that of a recipe that removes nothing."""
        if not report.items:
            return
        for item in report.items:
            item.pixels = None  # It would keep the chunk's pixels for as long as there is a report.
        lengths = report.layer_lengths[0]
        past = self._past or [0] * len(lengths)
        pairs = [n * (p + n) for n, p in zip(lengths, past, strict=True)]
        self.pairs = [a + b for a, b in zip(self.pairs or [0] * len(pairs), pairs, strict=True)]
        self._past = list(report.cache_lengths[0]) or past
        self.reports.append(report)

    def report(self, notes: Sequence[str]) -> Report:
        """The account of all chunks; empty where nothing acted."""
        first = self.reports[0] if self.reports else None
        if first is None:
            return Report(type(self.model).__name__, notes=list(notes))
        made = Report(first.model, first.recipe, first.budget)
        tail = self.prompt.ids_1L.shape[1] - self.prompt.columns[-1][1]
        made.stages = _stages([stage for report in self.reports for stage in report.stages])
        made.items = _items([item for report in self.reports for item in report.items])
        made.prompt_lengths = [sum(r.prompt_lengths[0] for r in self.reports) + tail]
        layers = zip(*(report.layer_lengths[0] for report in self.reports), strict=True)
        made.layer_lengths = [[sum(lengths) + tail for lengths in layers]]
        made.cache_lengths = [[length + tail for length in self._past]]
        self.pairs = [p + tail * (k + tail) for p, k in zip(self.pairs, self._past, strict=True)]
        made.attention_pairs = [self.pairs]
        for report in self.reports:
            for stage, seconds in report.seconds.items():
                made.spend(stage, seconds)
        seen = [note for report in self.reports for note in report.notes]
        made.notes = list(dict.fromkeys([*seen, *notes]))
        self._count_flops(made)
        return made

    def _count_flops(self, made: Report) -> None:
        if not all(report.flops for report in self.reports):
            return
        dims = text_dims(self.model)

        def total(name: str, part: str) -> int:
            return int(sum(report.flops[name][part] for report in self.reports))

        full = prefill_flops(dims, self.prompt.ids_1L.shape[1])
        short = prefill_flops(dims, made.layer_lengths[0], attention_pairs=self.pairs)
        for name, prefill in (("untouched", full), ("reduced", short)):
            parts = FlopsBreakdown(total(name, "encoder"), total(name, "projector"), prefill)
            made.flops[name] = parts.as_dict()


def _stages(stages: list[StageReport]) -> list[StageReport]:
    """Entries of one method, stage and layer as one, in the order of first appearance."""
    joined: dict[tuple, StageReport] = {}
    for stage in stages:
        key = (stage.stage, stage.method, stage.layer)
        old = joined.get(key)
        if old is None:
            joined[key] = stage
        elif stage.stage in ("patches", "encoder"):  # one entry per image
            before, after = (*old.before, *stage.before), (*old.after, *stage.after)
            joined[key] = dataclasses.replace(old, before=before, after=after)
        else:
            before, after = sum(old.before + stage.before), sum(old.after + stage.after)
            joined[key] = dataclasses.replace(old, before=(before,), after=(after,))
    return list(joined.values())


def _items(items: list[ItemReport]) -> list[ItemReport]:
    """The chunks of a video as one video, where their reductions can be put side by side."""
    reductions = [item.reduction for item in items]
    joined = None
    if any(reduction is not None for reduction in reductions):
        parts = [
            Reduction.identity(item.before) if item.reduction is None else item.reduction.to("cpu")
            for item in items
        ]
        joined = side_by_side(parts)
        if joined is None:
            return items
    grid = Grid(
        tuple(plane for item in items for plane in item.grid.planes),
        items[0].modality,
        items[-1].grid.newlines_at_end,
    )
    return [ItemReport(0, items[0].modality, grid, joined, evidence=_evidence(items))]


def side_by_side(parts: Sequence[Reduction]) -> Reduction | None:
    """Reductions of successive runs of tokens as one of all of them; None where that is no matrix
    of one kind.

    Example:
        >>> pick = Reduction.select(torch.tensor([1]), 3)
        >>> side_by_side([pick, Reduction.identity(2)]).anchor_BM.tolist()
        [[1, 3, 4]]
    """
    num_in = sum(part.num_in for part in parts)
    starts = [sum(part.num_in for part in parts[:i]) for i in range(len(parts))]
    if any(part.mask_BM is not None for part in parts):
        return None
    if all(part.kind == "select" for part in parts):
        index = [part.anchor_BM[0] + start for part, start in zip(parts, starts, strict=True)]
        return Reduction.select(torch.cat(index), num_in)
    if any(part.kind != "merge" for part in parts):
        return None
    outs = [sum(part.num_out for part in parts[:i]) for i in range(len(parts))]
    targets, anchors, weights = [], [], []
    for part, start, out in zip(parts, starts, outs, strict=True):
        assert part.assignment_BN is not None and part.weight_BN is not None
        target_N = part.assignment_BN[0]
        targets.append((target_N + out).where(target_N >= 0, -1))
        anchors.append(part.anchor_BM[0] + start)
        weights.append(part.weight_BN[0])
    return Reduction(
        "merge",
        num_in,
        torch.cat(anchors)[None],
        assignment_BN=torch.cat(targets)[None],
        weight_BN=torch.cat(weights)[None],
    )


def _evidence(items: list[ItemReport]) -> list[Evidence]:
    """What was noted of every chunk, for the tokens and planes of the whole video."""
    sizes = [item.before for item in items]
    joined: dict[tuple, Evidence] = {}
    first_token = first_plane = 0
    for item in items:
        for noted in item.evidence:
            if noted.is_per_token:
                index_N = torch.full((sum(sizes),), -1)
                index_N[first_token : first_token + item.before] = torch.arange(item.before)
                noted = noted.take(index_N)
            else:
                moved = 2 if noted.kind == "frames" else 1
                value = tuple(
                    (*(x + first_plane for x in row[:moved]), *row[moved:]) for row in noted.value
                )
                noted = dataclasses.replace(noted, value=value)
            old = joined.get(noted.key)
            joined[noted.key] = noted if old is None else noted.over(old)
        first_token += item.before
        first_plane += len(item.grid.planes)
    return list(joined.values())
