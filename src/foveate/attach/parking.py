"""Tokens that skip some decoder layers and come back: parked, not dropped.

A parked token keeps the hidden state it had when it left. The layers in between neither compute nor
cache it; from the layer before which it returns on, it is part of the sequence again.

Legend: B batch, L padded length, S tokens of a sample, R parked tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from foveate.attach.layer_attention import take_rows
from foveate.attach.plan import StepPlan
from foveate.attach.sequence import Sequence, VisualRows, right_aligned
from foveate.core import StageReport

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall


@dataclass(eq=False)
class Parked:
    """Tokens of one sample that wait.

    Attributes:
        ids_R: their stable numbers, ascending.
        hidden_RD: their hidden states.
        embeddings: their (cos, sin), each [.., 1, R, d].
        position_PR: their position ids.
        visual: what they are; its rows are the columns they had when they left.
    """

    ids_R: torch.Tensor
    hidden_RD: torch.Tensor
    embeddings: tuple[torch.Tensor, torch.Tensor]
    position_PR: torch.Tensor
    visual: VisualRows


def park(call: DecoderCall, sample: int, kept_M: torch.Tensor, hidden_BLD: torch.Tensor) -> Parked:
    """What the visual tokens of a sample that are not in `kept_M` need to come back."""
    visual = call.sequence.visual[sample]
    gone_N = torch.ones(visual.num, dtype=torch.bool, device=hidden_BLD.device)
    gone_N[kept_M] = False
    index_R = gone_N.nonzero()[:, 0]
    rows_R = visual.rows_N[index_R]
    rows_S = call.sequence.rows(sample, hidden_BLD.device)
    assert call.position_embeddings is not None and call.position_PBL is not None
    cos, sin = (take_rows(part, sample, rows_R) for part in call.position_embeddings)
    return Parked(
        call.sequence.ids[sample][torch.searchsorted(rows_S, rows_R)],
        hidden_BLD[sample, rows_R],
        (cos, sin),
        call.position_PBL[:, sample, rows_R],
        visual.take(index_R, rows_R),
    )


def bring_back(
    call: DecoderCall, step: StepPlan, layer: int, hidden_BLD: torch.Tensor
) -> torch.Tensor:
    """Put the parked tokens of a step back into their places, O(B S log S)."""
    waiting = call.parked.pop(step.number)
    before = [visual.num for visual in call.sequence.visual]
    back = _unmask if call.mask_only else _splice
    hidden_BLD = back(call, waiting, hidden_BLD)
    after = [visual.num for visual in call.sequence.visual]
    for sample in waiting:
        visual = call.sequence.visual[sample]
        for number, item in enumerate(call.items[sample]):
            item.report.alive[layer] = visual.target_N[visual.item_N == number]
    call.report.stages.append(
        StageReport("decoder", step.method.name, tuple(before), tuple(after), layer)
    )
    return hidden_BLD


def _unmask(
    call: DecoderCall, waiting: dict[int, Parked], hidden_BLD: torch.Tensor
) -> torch.Tensor:
    """Mask-only mode: the columns are still there, with states that moved on; set them back."""
    old = call.sequence
    assert old.valid_BL is not None
    hidden_BLD, valid_BL = hidden_BLD.clone(), old.valid_BL.clone()
    visual, ids = list(old.visual), list(old.ids)
    for sample, parked in waiting.items():
        hidden_BLD[sample, parked.visual.rows_N] = parked.hidden_RD
        valid_BL[sample, parked.visual.rows_N] = True
        ids[sample] = torch.cat([old.ids[sample], parked.ids_R]).sort().values
        rows_N = torch.cat([old.visual[sample].rows_N, parked.visual.rows_N])
        visual[sample] = _join(old.visual[sample], parked.visual, *rows_N.sort())
    call.sequence = Sequence(old.length, valid_BL, visual, ids)
    return hidden_BLD


def _splice(
    call: DecoderCall, waiting: dict[int, Parked], hidden_BLD: torch.Tensor
) -> torch.Tensor:
    old, device = call.sequence, hidden_BLD.device
    assert call.position_embeddings is not None and call.position_PBL is not None
    columns: list[list[torch.Tensor]] = []
    visual, ids = [], []
    for sample in range(len(old.visual)):
        rows_S = old.rows(sample, device)
        cos, sin = (take_rows(part, sample, rows_S) for part in call.position_embeddings)
        parts = [hidden_BLD[sample, rows_S], cos, sin, call.position_PBL[:, sample, rows_S]]
        parked = waiting.get(sample)
        if parked is None:
            columns.append(parts)
            ids.append(old.ids[sample])
            mine = old.visual[sample]
            visual.append(mine.at(torch.searchsorted(rows_S, mine.rows_N)))
            continue
        new_S, order = torch.cat([old.ids[sample], parked.ids_R]).sort()
        extra = [parked.hidden_RD, *parked.embeddings, parked.position_PR]
        dims = [0, cos.dim() - 2, sin.dim() - 2, 1]
        columns.append(
            [
                torch.cat([part, more], dim=dim).index_select(dim, order)
                for part, more, dim in zip(parts, extra, dims, strict=True)
            ]
        )
        mine = old.visual[sample]
        own_N = old.ids[sample][torch.searchsorted(rows_S, mine.rows_N)]
        ids_N, order_N = torch.cat([own_N, parked.ids_R]).sort()
        visual.append(_join(mine, parked.visual, torch.searchsorted(new_S, ids_N), order_N))
        ids.append(new_S)
    counts = [part[0].shape[0] for part in columns]
    length = max(counts)
    hidden = torch.stack(
        [pad(p[0], (0, 0, length - n, 0)) for p, n in zip(columns, counts, strict=True)]
    )
    cos, sin = (
        torch.cat(
            [pad(p[i], (0, 0, length - n, 0)) for p, n in zip(columns, counts, strict=True)], dim=-3
        )
        for i in (1, 2)
    )
    call.position_embeddings, call.embeddings_by_extra = (cos, sin), {}
    call.position_PBL = torch.stack(
        [pad(p[3], (length - n, 0)) for p, n in zip(columns, counts, strict=True)], dim=1
    )
    visual = [v.at(v.rows_N + length - n) for v, n in zip(visual, counts, strict=True)]
    call.sequence = Sequence(length, right_aligned(counts, length, device), visual, ids)
    return hidden


def _join(
    mine: VisualRows, parked: VisualRows, rows_N: torch.Tensor, order_N: torch.Tensor
) -> VisualRows:
    """Both sets of tokens in the order `order_N`, at the rows `rows_N`."""
    return VisualRows(
        rows_N,
        torch.cat([mine.item_N, parked.item_N])[order_N],
        torch.cat([mine.target_N, parked.target_N])[order_N],
        torch.cat([mine.position_N3, parked.position_N3])[order_N],
        torch.cat([mine.kind_N, parked.kind_N])[order_N],
    )
