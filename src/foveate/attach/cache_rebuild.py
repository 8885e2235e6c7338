"""Rebuilds the cache of a layer under the question, for all samples of a call.

Legend: B batch, L padded length, C context tokens of a sample, S tokens behind them, M entries of
a rebuilt cache, G key heads, d head channels, P rows of position ids.
"""

from __future__ import annotations

from collections.abc import Sequence as Samples
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from foveate.attach.block_layout import BlockLayout, rows_of
from foveate.attach.cache import join_valid, move_positions
from foveate.attach.noting import sample_notebook
from foveate.attach.plan import StepPlan, placed
from foveate.attach.unrotated import Rebuilt, Rotation, unrotate
from foveate.core import CacheContext, Reduction

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall

KeysValues = tuple[torch.Tensor, torch.Tensor]


def context_fields(
    call: DecoderCall, step: StepPlan, sample: int, layer: int | None = None
) -> dict[str, Any]:
    """What every cache-stage context says of a sample."""
    visual = call.sequence.visual[sample]
    return {
        "budget": step.budget(sample),
        "method": step.method.name,
        "seed": call.seed,
        "state": call.states[step.number, sample],
        "num_layers": call.num_layers,
        "position_N3": visual.position_N3,
        "item_N": visual.item_N,
        "notebook": sample_notebook(call, "cache", layer, sample),
    }


@dataclass(eq=False)
class Geometry:
    """Lengths, positions and validity, shared by layers of equal reductions.

    Attributes:
        rebuilt: per sample, where its entries come from; None for a sample that is left alone.
        sizes: per sample, entries.
        slots: per sample, slots they lie in; in mask-only mode the context keeps its length.
        rotation: per sample, (cos, sin) of its entries.
        tail_rotation: (cos, sin) of the text behind, None where it keeps its positions.
        valid_BM: bool, real slots; None when all are.
        valid_BT: the same for slots and text together.
    """

    rebuilt: list[Rebuilt | None]
    sizes: list[int]
    slots: list[int]
    rotation: list[Rotation | None]
    tail_rotation: Rotation | None
    valid_BM: torch.Tensor | None
    valid_BT: torch.Tensor | None
    # Geometries are found by the addresses of these, which therefore must live on.
    made_for: tuple[Any, ...] = field(default=(), repr=False)


class CacheRebuilder:
    """Asks the method what stays of every layer's context and puts it in its new place."""

    def __init__(
        self, call: DecoderCall, step: StepPlan, layout: BlockLayout, compact: bool, mrope: bool
    ) -> None:
        self.call, self.step, self.layout = call, step, layout
        self.compact, self.mrope = compact, mrope
        self.shared: dict[tuple[int, ...], Geometry] = {}
        self.numbered: list[int] | None = None

    def rebuild(
        self,
        layer: int,
        context: Samples[KeysValues | None],
        hidden_BLD: torch.Tensor,
        rotation: Rotation,
    ) -> tuple[Geometry, torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, M, d] that the text attends to, padded on the left.

        Args:
            layer: the layer.
            context: per sample, rotated keys and values [1, G, C, d] of its context, or None.
            hidden_BLD: only its dtype and device are read, by the model's rotary embedding.
            rotation: (cos, sin) of all columns.
        """
        bare: list[torch.Tensor | None] = [None] * len(context)
        reductions: list[Reduction | None] = [None] * len(context)
        for sample, known in enumerate(context):
            if known is not None:
                bare_1GCd = unrotate(known[0], self._context_rotation(sample, rotation))
                bare[sample] = bare_1GCd
                reductions[sample] = self._ask(layer, sample, bare_1GCd, known[1])
        geometry = self._geometry(layer, reductions, hidden_BLD)
        longest, parts = max(geometry.slots), []
        known = next(known for known in context if known is not None)
        nothing = known[0].new_zeros(1, known[0].shape[1], 0, known[0].shape[3])
        for sample in range(len(context)):
            made = self._entries(sample, context[sample], bare[sample], geometry)
            made = made or (nothing, nothing.to(known[1]))
            parts.append([pad(x, (0, 0, longest - x.shape[2], 0)) for x in made])
        return geometry, torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

    def _context_rotation(self, sample: int, rotation: Rotation) -> Rotation:
        rows_1C = self.layout.rows[sample][None, : self.layout.num_context[sample]]
        sample_11 = torch.tensor([[sample]], device=rows_1C.device)
        cos, sin = (rows_of(part, sample_11, rows_1C) for part in rotation)
        return cos, sin

    def _ask(
        self, layer: int, sample: int, bare_1GCd: torch.Tensor, values_1GCd: torch.Tensor
    ) -> Reduction | None:
        method, visual_N = self.step.method, self.layout.visual[sample]
        context = CacheContext(**context_fields(self.call, self.step, sample, layer), layer=layer)
        with torch.no_grad():
            reduction = method.cache(
                bare_1GCd[:, :, visual_N], values_1GCd[:, :, visual_N], context
            )
        return placed(reduction, method, self.layout.device)

    def _entries(
        self,
        sample: int,
        known: KeysValues | None,
        bare_1GCd: torch.Tensor | None,
        geometry: Geometry,
    ) -> KeysValues | None:
        """One sample's entries; in mask-only mode at the places they have in the context."""
        rebuilt, rotation = geometry.rebuilt[sample], geometry.rotation[sample]
        if known is None or bare_1GCd is None or rebuilt is None or rotation is None:
            return None
        keys, values = rebuilt.keys(known[0], bare_1GCd, rotation), rebuilt.take(known[1])
        if not self.call.mask_only:
            return keys, values
        slot_M = rebuilt.slot_M
        return known[0].index_copy(2, slot_M, keys), known[1].index_copy(2, slot_M, values)

    # -- what layers share ----------------------------------------------------------------------

    def _geometry(
        self, layer: int, reductions: list[Reduction | None], hidden_BLD: torch.Tensor
    ) -> Geometry:
        # Earlier turns may have renumbered deeper layers further.
        extra_B = self.call.extra.get(layer)
        made_for = (*reductions, extra_B)
        key = tuple(map(id, made_for))
        if key not in self.shared:
            assert self.call.position_PBL is not None
            position_PBL = self.call.position_PBL
            if extra_B is not None:
                position_PBL = (position_PBL - extra_B[None, :, None]).clamp(min=0)
            self.shared[key] = self._make(reductions, position_PBL, hidden_BLD)
            self.shared[key].made_for = made_for
        return self.shared[key]

    def _make(
        self,
        reductions: list[Reduction | None],
        position_PBL: torch.Tensor,
        hidden_BLD: torch.Tensor,
    ) -> Geometry:
        layout = self.layout
        rebuilt: list[Rebuilt | None] = [None] * len(reductions)
        rotation: list[Rotation | None] = [None] * len(reductions)
        for sample, count in enumerate(layout.num_context):
            if count:
                position_PC = position_PBL[:, sample, layout.rows[sample][:count]]
                first = position_PC[0, 0] if self.compact else None
                made = Rebuilt(layout.visual[sample], count, reductions[sample], position_PC, first)
                rebuilt[sample] = made
                rotation[sample] = self._rotation(hidden_BLD, made.position_PM[:, None], sample)
        sizes = [0 if made is None else made.length for made in rebuilt]
        slots = list(layout.num_context) if self.call.mask_only else sizes
        valid_BM = self._valid(rebuilt, slots)
        valid_BT = join_valid(
            valid_BM,
            max(slots),
            layout.tail_valid_BS,
            layout.num_tail,
            len(slots),
            layout.device,
        )
        tail = self._renumber(position_PBL, sizes, hidden_BLD) if self.compact else None
        return Geometry(rebuilt, sizes, slots, rotation, tail, valid_BM, valid_BT)

    def _valid(self, rebuilt: list[Rebuilt | None], slots: Samples[int]) -> torch.Tensor | None:
        longest = max(slots)
        valid_BM = torch.zeros(len(slots), longest, dtype=torch.bool, device=self.layout.device)
        for sample, (made, count) in enumerate(zip(rebuilt, slots, strict=True)):
            if made is not None:
                index = made.slot_M if self.call.mask_only else slice(None)
                valid_BM[sample, longest - count :][index] = True
        return None if bool(valid_BM.all()) else valid_BM

    def _renumber(
        self, position_PBL: torch.Tensor, sizes: list[int], hidden_BLD: torch.Tensor
    ) -> Rotation:
        """(cos, sin) of the text behind the context, numbered on from it."""
        layout, new, shifts = self.layout, [], []
        column_S = torch.arange(layout.num_tail, device=layout.device)
        for sample, size in enumerate(sizes):
            old_S = position_PBL[0, sample, layout.rows[sample]]
            if layout.num_context[sample] == 0:
                new.append(position_PBL[0, sample, layout.tail_BS[sample]])
                shifts.append(torch.zeros_like(position_PBL[0, sample, 0]))
                continue
            length = len(layout.tails[sample])
            new.append((old_S[0] + size + column_S - (layout.num_tail - length)).clamp(min=0))
            shifts.append(old_S[-1] - (old_S[0] + size + length - 1))
        if self.numbered is None and self.call.cache is not None:
            move_positions(self.call.cache, torch.stack(shifts))
        if self.numbered not in (None, sizes):
            raise ValueError(
                f"{self.step.method.name} kept {sizes} cache entries in one layer and "
                f"{self.numbered} in another; renumbered positions need one number in all layers. "
                'Use positions="original".'
            )
        self.numbered = sizes
        return self._rotation(hidden_BLD, torch.stack(new)[None])

    def _rotation(
        self, hidden_BLD: torch.Tensor, position_PBM: torch.Tensor, sample: int | None = None
    ) -> Rotation:
        assert self.call.rotary is not None
        return self.call.rotary.of_rows(hidden_BLD, position_PBM, sample)
