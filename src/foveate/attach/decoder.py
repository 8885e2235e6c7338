"""Visual tokens leave the language model: at its entry, before a layer, or from a layer's cache.

One forward call of the language model is a `DecoderCall`. It lives for that call only; what later
calls need (validity of slots, tokens read, position shift) is stored in the cache layers.

Legend: B batch, L padded length, N visual tokens of a sample, S all tokens of a sample, D channels,
P rows of position ids (1, or 3-4 with M-RoPE).
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from foveate.attach.cache import ReducedLayer, move_positions
from foveate.attach.cache_stage import reduce_cache
from foveate.attach.evidence import context_of, tokens_of
from foveate.attach.layer_attention import LayerAttention, past_of
from foveate.attach.masks import MaskMaker
from foveate.attach.noting import Trails
from foveate.attach.parking import Parked, bring_back, park
from foveate.attach.plan import StepPlan, placed
from foveate.attach.quantised import note_storage
from foveate.attach.rules import CallRules, rule_of_rows
from foveate.attach.sequence import (
    Layout,
    Sequence,
    VisualItem,
    gather_columns,
)
from foveate.core import LayerModule, Reduction, Report, StageReport


@dataclass(frozen=True, eq=False)
class LayerModules:
    """Parts of a decoder layer that evidence is taken from.

    Attributes:
        norm: what its attention's input passes first.
        attention: its self-attention.
        mlp: its MLP.
    """

    norm: nn.Module
    attention: nn.Module
    mlp: nn.Module


if TYPE_CHECKING:
    from foveate.attach.blockwise import BlockwisePrefill
    from foveate.attach.rotary import Rotary


@dataclass(eq=False)
class DecoderCall:
    """One managed forward call of the language model.

    Attributes:
        sequence: columns of the hidden states at the present layer.
        items: visual items of the call, per sample.
        num_tokens: tokens of the call before any reduction, [B] padded length.
        masks: makes and shares attention masks.
        cache: the cache, or None when nothing is cached.
        position_embeddings: (cos, sin) of the present columns once layer 0 has been entered.
        position_PBL: position ids of the present columns.
        rotary: makes (cos, sin) from hidden states and position ids, stretched if need be.
        parked: per step and sample, tokens that come back before a later layer.
        decoder_steps, cache_steps: methods that act in this call (none while decoding).
        modules: parts of every decoder layer; none when no method acts at the decoder.
        attention_layers: layers whose attention must be kept.
        spans: per sample, places of the first and last token of every item, int64 [I, 2].
        observed: by step number, layer, module and sample: numbers of the tokens that a method
            observed, and what it noted of each.
        deepstack: per level, per sample features [N, D] that are added behind that layer.
        mask_only: keep all columns and only mask dropped keys.
        blockwise: the attention of a prompt that is read in blocks, or None.
        rules: what methods changed about attention, None when nothing.
        columns: per sample, places of its tokens in the prompt before any reduction, int64 [S].
        num_columns: per sample, tokens of that prompt.
        repeats: rows per sample, as beam search expands them.
        sequences: the sequence that every layer so far saw.
        trails: follows tokens for what methods note; None: nobody is going to draw it.
    """

    sequence: Sequence
    items: list[list[VisualItem]]
    num_tokens: int
    masks: MaskMaker
    cache: Cache | None
    report: Report
    seed: int = 0
    num_layers: int = 1
    modules: tuple[LayerModules, ...] = ()
    decoder_steps: list[StepPlan] = field(default_factory=list)
    cache_steps: list[StepPlan] = field(default_factory=list)
    attention_layers: frozenset[int] = frozenset()
    deepstack: list[list[torch.Tensor]] = field(default_factory=list)
    mask_only: bool = False
    blockwise: BlockwisePrefill | None = None
    rules: CallRules | None = None
    columns: list[torch.Tensor] = field(default_factory=list)
    num_columns: list[int] = field(default_factory=list)
    repeats: int = 1
    sequences: list[Sequence] = field(default_factory=list)
    trails: Trails | None = None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    position_PBL: torch.Tensor | None = None
    rotary: Rotary | None = None
    parked: dict[int, dict[int, Parked]] = field(default_factory=lambda: defaultdict(dict))
    captured: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    attentions: dict[int, LayerAttention] = field(default_factory=dict)
    spans: list[torch.Tensor] = field(default_factory=list)
    observed: dict[tuple[int, int, LayerModule, int], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )
    states: dict[tuple[int, int], dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        self.num_visual = [visual.num for visual in self.sequence.visual]
        # Earlier turns may have renumbered deeper layers further; this call's own renumbering is in
        # its position embeddings already.
        layers: Any = () if self.cache is None else self.cache.layers
        self.extra = {i: x.extra_B for i, x in enumerate(layers) if x.extra_B is not None}
        self.embeddings_by_extra: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # -- before a layer -------------------------------------------------------------------------

    def enter_layer(
        self, layer: int, hidden_BLD: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Reduce what must be reduced here and give the layer its own mask and positions."""
        if self.position_embeddings is None:
            self.position_embeddings = kwargs["position_embeddings"]
            if self.rotary is not None and self.rotary.scale is not None:
                assert self.position_PBL is not None
                self.position_embeddings = self.rotary.of_rows(hidden_BLD, self.position_PBL)
        for step in self.decoder_steps:
            if layer in step.returns and step.number in self.parked:
                hidden_BLD = bring_back(self, step, layer, hidden_BLD)
            if layer in step.layers:
                hidden_BLD = self._reduce(step, layer, hidden_BLD)
        if self.items:
            for sample, ids in enumerate(self.sequence.ids):
                self.report.layer_lengths[sample].append(ids.shape[0])
        kwargs = dict(kwargs)
        kwargs["position_embeddings"] = self.embeddings_of(layer, hidden_BLD)
        # Only flash attention reads it, to guess packed sequences: gaps would look like packing.
        kwargs["position_ids"] = None
        kwargs["attention_mask"] = self.mask_of_layer(layer, hidden_BLD.shape[1])
        past = self.layer_cache(layer)
        if past is not None:
            unrotated_BL = None if self.rules is None else self.rules.unrotated_BL(self.sequence)
            past.expect(self.sequence.valid_BL, self.num_tokens, unrotated_BL)
        if self.items:
            self.sequences.append(self.sequence)
        if layer in self.attention_layers:
            self.captured[layer] = {}
        return hidden_BLD, kwargs

    def embeddings_of(
        self, layer: int, hidden_BLD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of the present columns in one layer's own numbering."""
        assert self.position_embeddings is not None
        extra_B = self.extra.get(layer)
        if extra_B is None:
            return self.position_embeddings
        assert self.rotary is not None and self.position_PBL is not None
        known = self.embeddings_by_extra
        if id(extra_B) not in known:
            shifted_PBL = (self.position_PBL - extra_B[None, :, None]).clamp(min=0)
            known[id(extra_B)] = self.rotary(hidden_BLD, shifted_PBL[0])
        return known[id(extra_B)]

    def mask_of_layer(self, layer: int, num_new: int) -> torch.Tensor | None:
        """The attention mask of `num_new` columns on what this layer has cached."""
        if self.blockwise is not None:
            return self.blockwise.placeholder
        past = self.layer_cache(layer)
        return self.masks.make(
            0 if past is None else past.length,
            None if past is None else past.valid_BT,
            num_new,
            self.sequence.valid_BL,
            None if self.rules is None else self.rules.visible_BLL(self.sequence),
        )

    def layer_cache(self, layer: int) -> ReducedLayer | None:
        """The cache of a layer, None when nothing is cached."""
        if self.cache is None:
            return None
        found = self.cache.layers[layer]
        assert isinstance(found, ReducedLayer)
        return found

    def _reduce(self, step: StepPlan, layer: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        device = hidden_BLD.device
        columns, anchors, touched, reductions = [], [], False, {}
        before = [visual.num for visual in self.sequence.visual]
        for sample, visual in enumerate(self.sequence.visual):
            rows_S = self.sequence.rows(sample, device)
            reduction = self._ask(step, layer, sample, hidden_BLD)
            if reduction is None:
                columns.append(rows_S)
                anchors.append(torch.arange(visual.num, device=device))
                continue
            touched = True
            if self.trails is not None:
                self.trails.merge(self, sample, reduction)
            anchor_M, order_M = reduction.anchor_BM[0].to(device).sort()
            keep_L = torch.zeros(self.sequence.length, dtype=torch.bool, device=device)
            keep_L[rows_S] = True
            keep_L[visual.rows_N] = False
            keep_L[visual.rows_N[anchor_M]] = True
            columns.append(keep_L.nonzero()[:, 0])
            anchors.append(anchor_M)
            if reduction.kind != "select":
                reductions[sample] = (visual.rows_N[anchor_M], order_M, reduction)
            for number, item in enumerate(self.items[sample]):
                mine = visual.item_N[anchor_M] == number
                item.report.alive[layer] = visual.target_N[anchor_M][mine]
            if any(back > layer for back in step.returns):
                self.parked[step.number][sample] = park(self, sample, anchor_M, hidden_BLD)
            self._carry_deepstack(layer, sample, reduction, order_M)
        if touched:
            hidden_BLD = self._write_merged(hidden_BLD, reductions)
            hidden_BLD = self._relayout(hidden_BLD, columns, anchors)
            if step.renumbers:
                self._renumber(layer, columns, hidden_BLD)
            after = [visual.num for visual in self.sequence.visual]
            self.report.stages.append(
                StageReport("decoder", step.method.name, tuple(before), tuple(after), layer)
            )
        self.report.spend("decoder", time.perf_counter() - begin)
        return hidden_BLD

    def _ask(
        self, step: StepPlan, layer: int, sample: int, hidden_BLD: torch.Tensor
    ) -> Reduction | None:
        visual = self.sequence.visual[sample]
        if visual.num == 0 or step.budget(sample).is_full:
            return None
        context = context_of(self, step, layer, sample, hidden_BLD)
        tokens = tokens_of(self, sample, hidden_BLD)
        with torch.no_grad():
            reduction = step.method.decoder(tokens, context)
        return placed(reduction, step.method, hidden_BLD.device)

    def _write_merged(
        self,
        hidden_BLD: torch.Tensor,
        reductions: dict[int, tuple[torch.Tensor, torch.Tensor, Reduction]],
    ) -> torch.Tensor:
        if not reductions:
            return hidden_BLD
        merged_BLD = hidden_BLD.clone()
        for sample, (rows_M, order_M, reduction) in reductions.items():
            rows_N = self.sequence.visual[sample].rows_N
            values_BMD = reduction.apply(hidden_BLD[sample : sample + 1, rows_N])
            merged_BLD[sample, rows_M] = values_BMD[0, order_M]
        return merged_BLD

    def _relayout(
        self, hidden_BLD: torch.Tensor, columns: list[torch.Tensor], anchors: list[torch.Tensor]
    ) -> torch.Tensor:
        """Keep `columns` of every sample, right-aligned; in mask-only mode just note them."""
        device = hidden_BLD.device
        old = self.sequence
        layout = Layout(columns)
        length = old.length if self.mask_only else layout.length
        visual, ids = [], []
        for sample, columns_S in enumerate(columns):
            old_rows_S = old.rows(sample, device)
            ids.append(old.ids[sample][torch.searchsorted(old_rows_S, columns_S)])
            kept = old.visual[sample]
            rows_M = kept.rows_N[anchors[sample]]
            if not self.mask_only:
                offset = length - columns_S.shape[0]
                rows_M = torch.searchsorted(columns_S, rows_M) + offset
            visual.append(kept.take(anchors[sample], rows_M))
        if self.mask_only:
            valid_BL = torch.zeros(len(columns), length, dtype=torch.bool, device=device)
            for sample, columns_S in enumerate(columns):
                valid_BL[sample, columns_S] = True
            self.sequence = Sequence(length, valid_BL, visual, ids)
            return hidden_BLD
        index_BL = layout.index_BL()
        assert self.position_embeddings is not None
        self.embeddings_by_extra = {}
        cos, sin = self.position_embeddings
        self.position_embeddings = (
            gather_columns(cos, index_BL, cos.dim() - 2),
            gather_columns(sin, index_BL, sin.dim() - 2),
        )
        if self.position_PBL is not None:
            self.position_PBL = gather_columns(self.position_PBL, index_BL, 2)
        self.sequence = Sequence(length, layout.valid_BL(), visual, ids)
        return gather_columns(hidden_BLD, index_BL, 1)

    def _renumber(self, layer: int, columns: list[torch.Tensor], hidden_BLD: torch.Tensor) -> None:
        """Number the remaining tokens contiguously, here and in all deeper layers."""
        assert self.position_PBL is not None and self.rotary is not None
        new_PBL, shifts = self.position_PBL.clone(), []
        for sample in range(len(columns)):
            rows_S = self.sequence.rows(sample, hidden_BLD.device)
            old_S = self.position_PBL[0, sample, rows_S]
            new_S = old_S[0] + torch.arange(rows_S.shape[0], device=hidden_BLD.device)
            new_PBL[:, sample, rows_S] = new_S
            shifts.append(old_S[-1] - new_S[-1])
        moved_B = torch.stack(shifts)
        self.position_PBL, self.embeddings_by_extra = new_PBL, {}
        self.position_embeddings = self.rotary(hidden_BLD, new_PBL[0])
        if self.cache is not None:
            move_positions(self.cache, moved_B, "extra_B", layer)

    # -- attention signals ----------------------------------------------------------------------

    def note_projection(self, layer: int, name: str, output: torch.Tensor) -> None:
        """Keep the output of a query, key or value projection of a declared layer."""
        if layer in self.captured:
            self.captured[layer][name] = output

    def leave_attention(self, layer: int, module: nn.Module) -> None:
        """A declared layer's attention has run: freeze what its rows need."""
        captured = self.captured.pop(layer, None)
        if captured is None:
            return
        cached, device = self.layer_cache(layer), captured["q"].device
        num_past = 0 if cached is None else cached.length - self.sequence.length
        samples = range(len(self.sequence.visual))
        self.attentions[layer] = LayerAttention(
            module,
            captured,
            self.embeddings_of(layer, captured["q"]),
            [past_of(cached, sample, num_past) for sample in samples],
            [self.sequence.rows(sample, device) for sample in samples],
            list(self.sequence.ids),
            [visual.rows_N for visual in self.sequence.visual],
            [
                rule_of_rows(self, layer, sample, self.sequence.rows(sample, device), num_past)
                for sample in samples
            ],
        )
        # Projections of a long prompt are large; adjacent layers are all that methods compare.
        for old in sorted(self.attentions)[:-2]:
            del self.attentions[old]

    # -- after a layer --------------------------------------------------------------------------

    def leave_layer(self, layer: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Add deepstack features and let cache-stage methods thin out this layer's cache."""
        for step in self.cache_steps:
            if layer in step.layers:
                reduce_cache(self, step, layer)
        self.settle(layer)
        if layer == self.num_layers - 1 and self.items:
            self._note_cache()
        if layer < len(self.deepstack):
            hidden_BLD = self._add_deepstack(layer, hidden_BLD)
        return hidden_BLD

    def settle(self, layer: int) -> None:
        """Let the cache of a layer be stored, once no method of this call reads or changes it."""
        if self.cache is None:
            return
        waits = any(step.method.one_cache_choice for step in self.cache_steps)
        if waits and layer < self.num_layers - 1:
            return
        for number in range(self.num_layers) if waits else (layer,):
            cached = self.layer_cache(number)
            assert cached is not None
            cached.settle()

    def _note_cache(self) -> None:
        """What every layer has cached once all cache stages are done."""
        for layer in range(self.num_layers):
            cached = self.layer_cache(layer)
            if cached is None:
                return
            for sample, lengths in enumerate(self.report.cache_lengths):
                valid_BT = cached.valid_BT
                lengths.append(cached.length if valid_BT is None else int(valid_BT[sample].sum()))
        if self.cache is not None:
            note_storage(self.cache, self.report)

    def _add_deepstack(self, level: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        batch, rows, parts = [], [], []
        for sample, visual in enumerate(self.sequence.visual):
            batch.append(torch.full_like(visual.rows_N, sample))
            rows.append(visual.rows_N)
            parts.append(self.deepstack[level][sample])
        index = (torch.cat(batch), torch.cat(rows))
        out_BLD = hidden_BLD.clone()
        out_BLD[index] = hidden_BLD[index] + torch.cat(parts).to(hidden_BLD)
        return out_BLD

    def _carry_deepstack(
        self, layer: int, sample: int, reduction: Reduction, order_M: torch.Tensor
    ) -> None:
        # Levels behind earlier layers are spent; tokens that were parked then are not in them.
        for level in self.deepstack[layer:]:
            level[sample] = reduction.apply(level[sample][None])[0, order_M]
