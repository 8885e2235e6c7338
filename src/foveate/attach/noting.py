"""Brings what methods note from the tokens that a stage sees back to those of each visual item.

Legend: B images, N tokens that a stage sees, P patches of the encoder, V visual tokens of a sample
as they entered the language model, S all tokens of it then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from foveate.attach.sequence import VisualItem
from foveate.core import Evidence, ItemReport, Notebook, Reduction, Stage

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall

#: Carries values of all patches of the encoder to the tokens of each item, float [P] -> [N_i] each.
TokenMaps = Callable[[torch.Tensor], Sequence[torch.Tensor]]


# -- encoder --------------------------------------------------------------------------------------


def encoder_notebook(
    notes: list[Evidence],
    present: Reduction | None,
    shape: tuple[int, int],
    layer: int,
    joined: int,
    num_tokens: int,
    prefix: int,
) -> Notebook:
    """Of a block whose rows have `shape` tokens; takes values over all patches, [B, P].

    Args:
        notes: where they go.
        present: from all tokens of an image to the present ones; None: all of them.
        shape: (rows, tokens of a row).
        layer: the block.
        joined: images that a row holds.
        num_tokens: tokens of an image before any reduction.
        prefix: tokens in front of its patches.
    """
    group_BN = None if present is None else present.groups_BN.cpu()

    def take(noted: Evidence) -> None:
        full = noted if group_BN is None else noted.take(group_BN)
        if joined > 1:
            value = full.value
            if noted.kind == "label":  # groups span frames, so rows must not share numbers
                first_R1 = int(value.max()) + 1
                first_R1 = first_R1 * torch.arange(len(value))[:, None]
                value = (value + first_R1).where(value >= 0, -1).to(value.dtype)
            full = replace(full, value=value.reshape(-1, num_tokens))
        notes.append(replace(full, value=full.value[:, prefix:]))

    return Notebook("encoder", shape, take, layer)


def patches_notebook(notes: list[Evidence], shape: tuple[int, int]) -> Notebook:
    """Of the patches stage; takes values of all patches of all images, [B, P]."""
    return Notebook("patches", shape, notes.append)


def encoder_evidence(
    runs: Sequence[Any], token_maps: TokenMaps, num_items: int
) -> list[list[Evidence]]:
    """What encoder-stage methods noted in the calls of an encoder, for the tokens of each item.

    A number is carried as the features are, a label as that of the nearest patch, a mark to every
    token that has a part in it.

    Args:
        runs: the `EncoderRun` of every call, in order.
        token_maps: see `TokenMaps`.
        num_items: items of all calls together.
    """
    joined: dict[tuple, tuple[Evidence, dict[int, torch.Tensor]]] = {}
    for number, run in enumerate(runs):
        for noted in run.notes:
            key = (noted.method, noted.layer, noted.name, noted.kind)
            joined.setdefault(key, (noted, {}))[1][number] = noted.value.flatten()
    found: list[list[Evidence]] = [[] for _ in range(num_items)]
    for noted, parts in joined.values():
        # A call in which nothing was noted has nothing to draw.
        parts = [parts.get(i, _blank(noted, run)) for i, run in enumerate(runs)]
        whole = replace(noted, value=torch.cat(parts))
        for item, value in enumerate(_carried(whole, token_maps)):
            entry = replace(noted, value=value)
            if not entry.is_blank:
                found[item].append(entry)
    return found


def _blank(noted: Evidence, run: Any) -> torch.Tensor:
    num = run.num_images * (run.num_tokens - run.num_prefix)
    return replace(noted, value=noted.value.flatten()[:0]).take(torch.full((num,), -1)).value


def _carried(noted: Evidence, token_maps: TokenMaps) -> list[torch.Tensor]:
    if noted.kind == "heat":
        return [value.float().cpu().flatten() for value in token_maps(noted.value)]
    if noted.kind == "mark":
        return [value.cpu().flatten() > 0 for value in token_maps(noted.value.float())]
    # Numbers of labels have no mean: each is carried alone, and where several meet the largest
    # share wins.
    blank = token_maps(torch.zeros(noted.value.shape))
    most = [torch.zeros(x.numel()) for x in blank]
    carried = [torch.full((x.numel(),), -1, dtype=torch.int32) for x in blank]
    for label in noted.value[noted.value >= 0].unique().tolist():
        for item, share in enumerate(token_maps((noted.value == label).float())):
            wins = share.float().cpu().flatten() > most[item]
            most[item][wins] = share.float().cpu().flatten()[wins]
            carried[item][wins] = label
    return carried


# -- projector ------------------------------------------------------------------------------------


def projector_notebook(report: ItemReport, present: Reduction | None, num_tokens: int) -> Notebook:
    """Of one item, whose tokens `present` has made; None: those of its grid."""
    group_N = None if present is None else present.groups_BN[0].cpu()

    def take(noted: Evidence) -> None:
        entry = noted if group_N is None else noted.take(group_N)
        if not entry.is_blank:
            report.add_evidence(entry)

    whole = present is None
    return Notebook("projector", (num_tokens,), take, grid=report.grid, patches=whole)


# -- decoder and cache ----------------------------------------------------------------------------


@dataclass(eq=False)
class Trails:
    """Which present token stands for each one that entered the language model, per sample.

    Attributes:
        id_V: stable numbers of the visual tokens that entered, int64 [V] per sample.
        item_V: the item each belongs to.
        target_V: index among the tokens of its item that entered.
        holder_S: the token that each was averaged into, itself until then, int64 [S].
    """

    id_V: list[torch.Tensor] = field(default_factory=list)
    item_V: list[torch.Tensor] = field(default_factory=list)
    target_V: list[torch.Tensor] = field(default_factory=list)
    holder_S: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, call: DecoderCall) -> Trails:
        """Of a call before its first layer."""
        trails = cls()
        for sample, visual in enumerate(call.sequence.visual):
            trails.id_V.append(_visual_ids(call, sample))
            trails.item_V.append(visual.item_N.cpu())
            trails.target_V.append(visual.target_N.cpu())
            trails.holder_S.append(torch.arange(call.sequence.ids[sample].shape[0]))
        return trails

    def merge(self, call: DecoderCall, sample: int, reduction: Reduction) -> None:
        """Follow a reduction of the present visual tokens of a sample.

        Tokens that are dropped stay their own holders, and so come back where they were parked.
        """
        id_N = _visual_ids(call, sample)
        group_N = reduction.groups_BN[0].cpu()
        kept_N = group_N >= 0
        moved_S = torch.arange(self.holder_S[sample].shape[0])
        moved_S[id_N[kept_N]] = id_N[reduction.anchor_BM[0].cpu()][group_N[kept_N]]
        self.holder_S[sample] = moved_S[self.holder_S[sample]]

    def spread(
        self, noted: Evidence, sample: int, id_N: torch.Tensor, items: list[VisualItem]
    ) -> None:
        """Put values of the tokens `id_N` into the reports of the sample's items."""
        place_S = torch.full_like(self.holder_S[sample], -1)
        place_S[id_N] = torch.arange(id_N.shape[0])
        place_V = place_S[self.holder_S[sample]][self.id_V[sample]]
        for number, item in enumerate(items):
            mine_V = self.item_V[sample] == number
            place_M = torch.full((item.report.after,), -1)
            place_M[self.target_V[sample][mine_V]] = place_V[mine_V]
            entry = noted.take(place_M)
            if item.report.reduction is not None:
                entry = entry.take(item.report.reduction.groups_BN[0])
            if not entry.is_blank:
                item.report.add_evidence(entry)


def sample_notebook(call: DecoderCall, stage: Stage, layer: int | None, sample: int) -> Any:
    """Of the present visual tokens of a sample, a `Notebook`; None where nobody draws."""
    trails = call.trails
    if trails is None:
        return None
    id_N = _visual_ids(call, sample)

    def take(noted: Evidence) -> None:
        trails.spread(noted, sample, id_N, call.items[sample])

    return Notebook(stage, (id_N.shape[0],), take, layer)


def _visual_ids(call: DecoderCall, sample: int) -> torch.Tensor:
    rows_N = call.sequence.visual[sample].rows_N
    rows_S = call.sequence.rows(sample, rows_N.device)
    return call.sequence.ids[sample][torch.searchsorted(rows_S, rows_N)].cpu()
