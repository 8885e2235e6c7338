"""The language model's entry: find the visual tokens of a prompt, reduce them, lay out the rest.

Legend: B batch, L padded length, N tokens of a visual item, D channels, P rows of position ids.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.attach.features import FeatureRecord
from foveate.attach.noting import projector_notebook
from foveate.attach.pairing import PER_TOKEN
from foveate.attach.reading import encoder_layers, encoder_reader, text_reader
from foveate.attach.sequence import (
    Layout,
    Sequence,
    VisualItem,
    VisualRows,
    compact_positions,
    gather_columns,
    reduce_item_rows,
    visual_rows,
)
from foveate.core import (
    Budget,
    FramePlan,
    ItemReport,
    Method,
    ProjectorContext,
    Reduction,
    Report,
    Stage,
    StageReport,
    Tokens,
)
from foveate.errors import AttachmentError
from foveate.models.companion import Companion


def find_items(
    placeholders: Mapping[str, torch.Tensor], records: Mapping[str, FeatureRecord], report: Report
) -> list[list[VisualItem]]:
    """The visual items of every sample, in prompt order.

    Args:
        placeholders: modality -> bool [B, L], where its tokens are.
        records: what the feature methods reported, by modality. Beam search repeats each sample's
            items, so a record may describe 1/k of the batch.

    Raises:
        AttachmentError: placeholders and features do not match.
    """
    batch = next(iter(placeholders.values())).shape[0]
    samples: list[list[VisualItem]] = [[] for _ in range(batch)]
    for modality, mask_BL in placeholders.items():
        record = records.get(modality)
        rows_per_sample = [mask_BL[sample].nonzero()[:, 0] for sample in range(batch)]
        total = sum(rows.shape[0] for rows in rows_per_sample)
        if total == 0:
            continue
        if record is None:
            raise AttachmentError(
                f"The prompt has {total} {modality} tokens, but their features were not computed "
                "inside this attachment, so their layout is unknown. Call the model's feature "
                "method or generate() inside it instead of passing features made elsewhere, and "
                "prefill in one go (prefill_chunk_size=None)."
            )
        described = sum(grid.num_tokens for grid in record.grids)
        if described == 0 or total % described or batch % (total // described):
            raise AttachmentError(
                f"The prompt has {total} {modality} tokens, the features {described} "
                f"(items: {[grid.num_tokens for grid in record.grids]})."
            )
        _deal(rows_per_sample, record, total // described, samples)
    for items in samples:
        items.sort(key=lambda item: int(item.rows_N[0]))
        report.items.extend(item.report for item in items)
    return samples


def _deal(
    rows_per_sample: list[torch.Tensor],
    record: FeatureRecord,
    repeats: int,
    samples: list[list[VisualItem]],
) -> None:
    pixels, evidence = _shared_pixels(record.pixels), record.evidence()
    start = pointer = 0
    for sample, rows in enumerate(rows_per_sample):
        if sample % repeats == 0:
            start = pointer
        pointer, offset = start, 0
        while offset < rows.shape[0]:
            if pointer >= len(record.grids):
                raise AttachmentError(
                    f"Sample {sample} holds more {record.modality} tokens than its features."
                )
            grid = record.grids[pointer]
            mine = rows[offset : offset + grid.num_tokens]
            if mine.shape[0] != grid.num_tokens:
                raise AttachmentError(
                    f"Sample {sample} has room for {mine.shape[0]} of the {grid.num_tokens} tokens "
                    f"of {record.modality} {pointer}; a prompt must hold whole items (is it "
                    "prefilled in chunks? That is not supported yet)."
                )
            item_report = ItemReport(sample, record.modality, grid)
            item_report.evidence += evidence[pointer]
            if pixels is not None:
                item_report.pixels = lambda index=pointer: pixels()[index]
            signals = {name: parts[pointer] for name, parts in record.signals.items()}
            samples[sample].append(
                VisualItem(
                    sample,
                    record.modality,
                    grid,
                    mine,
                    signals,
                    item_report,
                    encoder=record.item(pointer),
                    from_encoder={key: parts[pointer] for key, parts in record.carried.items()},
                )
            )
            offset += grid.num_tokens
            pointer += 1


def _shared_pixels(
    make: Callable[[], list[torch.Tensor]] | None,
) -> Callable[[], list[torch.Tensor]] | None:
    # The report outlives the call, so it must not hold the record and what the encoder computed.
    return None if make is None else functools.cache(make)


@dataclass(eq=False)
class PromptReducer:
    """Runs the projector stage of a recipe on all items of a prompt.

    Attributes:
        steps: (step number, method) in order.
        budget: (step, sample) -> budget.
        compact: renumber positions contiguously.
        text_ids: int64 [B, L] or None, for methods that read the text.
        carriers: methods without a projector stage; the encoder signals that they declare are
            carried to their decoder stage.
        columns: after a call: per sample, places of the remaining tokens in the prompt before any
            reduction, padding not counted, int64 [S].
        num_columns: after a call: per sample, tokens of that prompt.
        evidence: whether what methods note is going to be drawn.
        stages: by step number, the stages at which the step acts.
        companion: scores text against pictures; None: the model's own embeddings do.
        plans: per sample and item, the frames that were chosen of it; empty: nobody chose.
        vocabulary: the language model's head; None: there is none.
    """

    steps: list[tuple[int, Method]]
    budget: Callable[[int, int], Budget]
    compact: bool
    seed: int
    report: Report
    text_ids: torch.Tensor | None
    carriers: list[tuple[int, Method]] = field(default_factory=list)
    columns: list[torch.Tensor] = field(default_factory=list)
    num_columns: list[int] = field(default_factory=list)
    evidence: bool = False
    stages: Mapping[int, tuple[Stage, ...]] = field(default_factory=dict)
    companion: Companion | None = None
    plans: list[list[FramePlan | None]] = field(default_factory=list)
    paired: dict[Hashable, Any] = field(default_factory=dict)
    vocabulary: Callable[[torch.Tensor], torch.Tensor] | None = None

    def reduce_item(
        self,
        items: list[VisualItem],
        number: int,
        x_1ND: torch.Tensor,
        text: Callable[[str], Any],
    ) -> Tokens:
        """One item after all steps; its `reduction` is None when nothing acted on it."""
        item, grids = items[number], tuple(other.grid for other in items)
        tokens = Tokens.from_grid(x_1ND, item.grid)
        for step, method in self.carriers:
            for need in method.needs:
                for name in (need,) if isinstance(need, str) else need:
                    if name in item.signals:
                        item.carried[step, name] = item.signals[name].to(x_1ND.device)
        for step, method in self.steps:
            budget = self.budget(step, item.sample)
            if budget.is_full:
                continue

            composed = tokens.reduction

            def read(name: str, composed: Reduction | None = composed) -> Any:
                if name == "encoder.pixels":
                    return None if item.report.pixels is None else item.report.pixels()
                value = item.signals.get(name)
                if value is None:
                    value = text(name)
                    if composed is None or name not in PER_TOKEN:
                        return value
                    return composed.gather(value, float("nan"))
                value = value.to(x_1ND.device)[None]
                return value if composed is None else composed.gather(value, float("nan"))

            def read_carried(
                name: str, step: int = step, composed: Reduction | None = composed
            ) -> torch.Tensor | None:
                value_N = item.from_encoder.get((step, name))
                if value_N is None:
                    return None
                value_N = value_N.to(x_1ND.device)
                return value_N if composed is None else composed.gather(value_N[None], math.nan)[0]

            context = ProjectorContext(
                budget=budget,
                method=method.name,
                seed=self.seed + number,
                grid=item.grid,
                item=number,
                grids=grids,
                read=read,
                encoder_layers=encoder_layers(item, method),
                read_encoder=encoder_reader(item, method, composed, x_1ND.device),
                read_carried=read_carried,
                stages=self.stages.get(step, ()),
                plan=self.plans[item.sample][number] if self.plans else None,
                vocabulary=self.vocabulary,
                notebook=projector_notebook(item.report, composed, tokens.num_tokens)
                if self.evidence
                else None,
            )
            with torch.no_grad():
                reduction = method.projector(tokens, context)
            for name, value_N in context.carried.items():
                item.carried[step, name] = checked_carry(method, name, value_N, tokens)
            if reduction is None or reduction.is_identity:
                continue
            if reduction.mask_BM is not None:
                reduction = reduction.sample(0)
            reduction = reduction.to(x_1ND.device)
            tokens = tokens.reduce(reduction)
            for key, value_N in item.carried.items():
                item.carried[key] = reduction.gather(value_N[None])[0]
        return tokens

    def __call__(
        self,
        embeds_BLD: torch.Tensor,
        valid_BL: torch.Tensor | None,
        position_PBL: torch.Tensor,
        items: list[list[VisualItem]],
        deepstack: list[list[torch.Tensor]],
    ) -> tuple[torch.Tensor, Sequence, torch.Tensor, torch.Tensor | None]:
        """Reduce all items and lay the prompt out anew.

        Returns:
            embeddings [B, L', D]; the new sequence; positions [P, B, L']; how far later positions
            move down per sample, int64 [B], or None.
        """
        begin = time.perf_counter()
        device = embeds_BLD.device
        batch, length = embeds_BLD.shape[:2]
        if valid_BL is None:
            all_rows = [torch.arange(length, device=device)] * batch
        else:
            all_rows = [valid_BL[sample].nonzero()[:, 0] for sample in range(batch)]
        plans = [self._plan(b, all_rows[b], items[b], embeds_BLD, deepstack) for b in range(batch)]
        self._note_stages(items)
        self.num_columns = [rows_S.shape[0] for rows_S in all_rows]
        self.columns = [
            torch.searchsorted(rows_S, plan.source_S)
            for rows_S, plan in zip(all_rows, plans, strict=True)
        ]
        if all(plan.unchanged for plan in plans):
            self.report.spend("projector", time.perf_counter() - begin)
            visual = [_in_place(plan.visual, items[b]) for b, plan in enumerate(plans)]
            ids = [torch.arange(rows.shape[0], device=device) for rows in all_rows]
            return embeds_BLD, Sequence(length, valid_BL, visual, ids), position_PBL, None
        layout = Layout([plan.source_S for plan in plans])
        index_BL, new_valid_BL = layout.index_BL(), layout.valid_BL()
        out_BLD = gather_columns(embeds_BLD, index_BL, 1)
        visual = []
        for sample, plan in enumerate(plans):
            offset = layout.length - plan.source_S.shape[0]
            if plan.new_features is not None:
                # A gather copies whole columns; merged and new features then replace them.
                out_BLD[sample, plan.new_columns + offset] = plan.new_features
            visual.append(plan.visual.at(plan.visual.rows_N + offset))
        shift_B = None
        if self.compact:
            position_PBL, shift_B = compact_positions(position_PBL, valid_BL, layout)
        else:
            position_PBL = gather_columns(position_PBL, index_BL, 2)
        if new_valid_BL is not None:
            out_BLD = out_BLD.masked_fill(~new_valid_BL[..., None], 0.0)
            position_PBL = position_PBL.where(new_valid_BL[None], 0)
        ids = [torch.arange(plan.source_S.shape[0], device=device) for plan in plans]
        self.report.spend("projector", time.perf_counter() - begin)
        return out_BLD, Sequence(layout.length, new_valid_BL, visual, ids), position_PBL, shift_B

    def _plan(
        self,
        sample: int,
        rows_S: torch.Tensor,
        items: list[VisualItem],
        embeds_BLD: torch.Tensor,
        deepstack: list[list[torch.Tensor]],
    ) -> _SamplePlan:
        device = embeds_BLD.device
        is_item_L = torch.zeros(embeds_BLD.shape[1], dtype=torch.bool, device=device)
        for item in items:
            is_item_L[item.rows_N] = True
        text_S = rows_S[~is_item_L[rows_S]]
        columns, keys = [text_S], [text_S]
        outs: list[Tokens] = []
        level_parts: list[list[torch.Tensor]] = [[] for _ in deepstack]
        unchanged, offset = True, 0
        for number, item in enumerate(items):
            x_1ND = embeds_BLD[sample : sample + 1, item.rows_N]
            text = text_reader(
                item, items, text_S, embeds_BLD, self.text_ids, self.companion, self.paired
            )
            tokens = self.reduce_item(items, number, x_1ND, text)
            outs.append(tokens)
            reduction, size = tokens.reduction, item.grid.num_tokens
            for level, parts in zip(deepstack, level_parts, strict=True):
                part = level[sample][offset : offset + size]
                parts.append(part if reduction is None else reduction.apply(part[None])[0])
            offset += size
            if reduction is None:
                columns.append(item.rows_N)
                keys.append(item.rows_N)
                continue
            unchanged = False
            item.report.reduction = reduction
            anchor_rows, sort_keys = reduce_item_rows(item.rows_N, reduction)
            columns.append(anchor_rows)
            keys.append(sort_keys)
        order = torch.cat(keys).argsort(stable=True)
        source_S = torch.cat(columns)[order]
        # Where each output of each item has landed among the sample's new columns.
        landed = torch.empty_like(order)
        landed[order] = torch.arange(order.shape[0], device=device)
        rows = list(landed[text_S.shape[0] :].split([tokens.num_tokens for tokens in outs]))
        for level, parts in zip(deepstack, level_parts, strict=True):
            if parts:
                # Deepstack features follow their tokens' order in the sequence.
                level[sample] = torch.cat(parts)[torch.cat(rows).argsort()]
        features = [tokens.x_BND[0].to(embeds_BLD.dtype) for tokens in outs]
        return _SamplePlan(
            source_S,
            visual_rows(rows, outs, device),
            torch.cat(rows) if rows else text_S[:0],
            torch.cat(features) if features else None,
            unchanged,
        )

    def _note_stages(self, items: list[list[VisualItem]]) -> None:
        if not self.steps:
            return
        before = tuple(sum(item.grid.num_tokens for item in sample) for sample in items)
        after = tuple(sum(item.report.after for item in sample) for sample in items)
        if before != after or any(item.report.reduction for s in items for item in s):
            names = " + ".join(method.name for _, method in self.steps)
            self.report.stages.append(StageReport("projector", names, before, after))


def checked_carry(method: Method, name: str, value_N: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """What a method carries to the decoder, if it has one entry per token."""
    if value_N.shape[:1] != (tokens.num_tokens,):
        raise ValueError(
            f"{method.name}: carry({name!r}, ...) takes one value per token of the item, [N, ...] "
            f"with N = {tokens.num_tokens}, got {tuple(value_N.shape)}."
        )
    return value_N.to(tokens.device)


@dataclass(eq=False)
class _SamplePlan:
    source_S: torch.Tensor
    visual: VisualRows
    new_columns: torch.Tensor
    new_features: torch.Tensor | None
    unchanged: bool


def _in_place(visual: VisualRows, items: list[VisualItem]) -> VisualRows:
    """The same tokens at the columns of the incoming prompt, padding included."""
    if not items:
        return visual
    return visual.at(torch.cat([item.rows_N for item in items]).sort().values)
