"""The prompt inside the language model while visual tokens leave it: pure bookkeeping on tensors.

Rows are columns of the padded batch [B, L]; padding sits on the left after every reduction, so the
last row is always the last token.

Legend: B batch, L padded length, N visual tokens of a sample or item, M tokens left of them,
D channels, P rows of position ids (1, or 3-4 with M-RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from foveate.attach.tower_tap import ItemEncoder
from foveate.core import Grid, ItemReport, Modality, Reduction, Tokens


@dataclass(eq=False)
class VisualItem:
    """One image or video of a sample.

    Attributes:
        sample: row of the batch.
        modality: "image" or "video".
        grid: layout of its tokens.
        rows_N: rows of its tokens in the incoming prompt, int64 [N], ascending.
        signals: signal name -> float32 [N].
        report: the entry of the call's report.
        carried: by step number and name: what a method noted of every token that entered the
            language model, [M, ...], for its decoder stage.
        encoder: what may be read of the encoder's blocks; None: nothing.
        from_encoder: by step number and name: what a method carried here from its encoder stage,
            float32 [N].
    """

    sample: int
    modality: Modality
    grid: Grid
    rows_N: torch.Tensor
    signals: dict[str, torch.Tensor]
    report: ItemReport
    carried: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    encoder: ItemEncoder | None = None
    from_encoder: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class VisualRows:
    """The visual tokens of one sample at the current layer.

    Attributes:
        rows_N: their rows in the padded sequence, int64 [N], ascending.
        item_N: which item of the sample each belongs to, int64 [N].
        target_N: index among the tokens of that item that entered the language model, int64 [N].
        position_N3: (time, row, column), [N, 3].
        kind_N: `TokenKind` values, int64 [N].
    """

    rows_N: torch.Tensor
    item_N: torch.Tensor
    target_N: torch.Tensor
    position_N3: torch.Tensor
    kind_N: torch.Tensor

    @property
    def num(self) -> int:
        return self.rows_N.shape[0]

    def at(self, rows_N: torch.Tensor) -> VisualRows:
        """The same tokens at other rows."""
        return replace(self, rows_N=rows_N)

    def take(self, index_M: torch.Tensor, rows_M: torch.Tensor) -> VisualRows:
        """The tokens `index_M`, now at `rows_M`."""
        return VisualRows(
            rows_M,
            self.item_N[index_M],
            self.target_N[index_M],
            self.position_N3[index_M],
            self.kind_N[index_M],
        )


@dataclass(eq=False)
class Sequence:
    """The hidden states' columns of one forward call.

    Attributes:
        length: L.
        valid_BL: bool [B, L], None when no column is padding.
        visual: one entry per sample.
        ids: per sample, int64 [n]: stable numbers of its valid columns, as the prompt entered the
            language model; they tell which tokens of an earlier layer are still here.
    """

    length: int
    valid_BL: torch.Tensor | None
    visual: list[VisualRows]
    ids: list[torch.Tensor] = field(default_factory=list)

    def rows(self, sample: int, device: torch.device) -> torch.Tensor:
        """Valid columns of a sample, int64 [n], ascending."""
        if self.valid_BL is None:
            return torch.arange(self.length, device=device)
        return self.valid_BL[sample].nonzero()[:, 0]


@dataclass(eq=False)
class Layout:
    """How to lay out a new padded batch: per sample a list of source columns and new features."""

    sources: list[torch.Tensor]
    length: int = 0

    def __post_init__(self) -> None:
        self.length = max(source.shape[0] for source in self.sources)

    def index_BL(self) -> torch.Tensor:
        """Source column of every new column, int64 [B, L']; padding reads column 0."""
        padded = [
            torch.nn.functional.pad(source, (self.length - source.shape[0], 0))
            for source in self.sources
        ]
        return torch.stack(padded)

    def valid_BL(self) -> torch.Tensor | None:
        """bool [B, L'], None without padding."""
        counts = [source.shape[0] for source in self.sources]
        return right_aligned(counts, self.length, self.sources[0].device)


def right_aligned(counts: list[int], length: int, device: torch.device) -> torch.Tensor | None:
    """Validity bool [B, L] of rows that end at the last column; None when none is padded."""
    if all(count == length for count in counts):
        return None
    first_B = torch.tensor([length - count for count in counts], device=device)
    return torch.arange(length, device=device)[None] >= first_B[:, None]


def gather_columns(x: torch.Tensor, index_BL: torch.Tensor, dim: int) -> torch.Tensor:
    """Read columns `index_BL` of `x` along `dim`, whose batch dimension is the one before it.

    A batch dimension of size one (shared positions) is expanded first.
    """
    batch = index_BL.shape[0]
    if x.shape[dim - 1] == 1 and batch > 1:
        sizes = [-1] * x.dim()
        sizes[dim - 1] = batch
        x = x.expand(*sizes)
    shape = [1] * x.dim()
    shape[dim - 1], shape[dim] = index_BL.shape
    target = list(x.shape)
    target[dim] = index_BL.shape[1]
    return x.gather(dim, index_BL.reshape(shape).expand(target))


def run_starts(rows_N: torch.Tensor) -> torch.Tensor:
    """First row of the contiguous run that each row belongs to, int64 [N].

    A video whose frames are separated by text has one run per frame.
    """
    order_N = torch.arange(rows_N.shape[0], device=rows_N.device)
    starts_N = torch.ones_like(rows_N, dtype=torch.bool)
    starts_N[1:] = rows_N[1:] != rows_N[:-1] + 1
    first_N = order_N.where(starts_N, 0).cummax(0).values
    return rows_N[first_N]


def spread_anchors(reduction: Reduction) -> torch.Tensor:
    """Anchors [M] of one sample; targets without provenance are spread evenly over the sources."""
    anchor_M = reduction.anchor_BM[0]
    num = anchor_M.shape[0]
    even_M = torch.arange(num, device=anchor_M.device) * reduction.num_in // max(num, 1)
    return anchor_M.where(anchor_M >= 0, even_M)


def reduce_item_rows(
    rows_N: torch.Tensor, reduction: Reduction
) -> tuple[torch.Tensor, torch.Tensor]:
    """(anchor row, sort key) of every output of a reduced item, int64 [M] each.

    Outputs keep the method's order within a run of rows; across runs they follow their anchors.
    """
    anchor_M = spread_anchors(reduction)
    return rows_N[anchor_M], run_starts(rows_N)[anchor_M]


def compact_positions(
    position_PBL: torch.Tensor, old_valid_BL: torch.Tensor | None, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Renumber positions contiguously from each sample's first one.

    Returns:
        New positions [P, B, L'] (0 in padding) and the shift int64 [B] of everything that follows.
    """
    length = position_PBL.shape[-1]
    if old_valid_BL is None:
        first_B = torch.zeros(position_PBL.shape[1], dtype=torch.long, device=position_PBL.device)
    else:
        first_B = old_valid_BL.long().argmax(dim=1)
    first = position_PBL.gather(2, first_B[None, :, None].expand(position_PBL.shape[0], -1, 1))
    counts_B = torch.tensor([s.shape[0] for s in layout.sources], device=position_PBL.device)
    columns_L = torch.arange(layout.length, device=position_PBL.device)
    rank_BL = columns_L[None] - (layout.length - counts_B)[:, None]
    new = (first + rank_BL[None]).where(rank_BL[None] >= 0, 0)
    if old_valid_BL is None:
        old_counts_B = torch.full_like(counts_B, length)
    else:
        old_counts_B = old_valid_BL.sum(dim=1)
    return new, old_counts_B - counts_B


def visual_rows(rows: list[torch.Tensor], outs: list[Tokens], device: torch.device) -> VisualRows:
    """One sample's visual tokens: what every item became (B = 1), and the rows it stands at."""
    if not rows:
        empty = torch.empty(0, dtype=torch.long, device=device)
        return VisualRows(empty, empty, empty, empty.new_empty(0, 3), empty)
    rows_N, order = torch.cat(rows).sort()
    positions, kinds = [], []
    for tokens in outs:
        assert tokens.position_BN3 is not None and tokens.kind_BN is not None
        positions.append(tokens.position_BN3[0])
        kinds.append(tokens.kind_BN[0])
    return VisualRows(
        rows_N,
        torch.cat([torch.full_like(r, i) for i, r in enumerate(rows)])[order],
        torch.cat([torch.arange(r.shape[0], device=device) for r in rows])[order],
        torch.cat(positions)[order],
        torch.cat(kinds)[order],
    )


def split_deepstack(
    mask_BL: torch.Tensor | None, levels: list[torch.Tensor] | None
) -> list[list[torch.Tensor]]:
    """Deepstack features per level and sample, [N, D] each, in the order of the rows."""
    if mask_BL is None or not levels:
        return []
    counts = mask_BL.sum(dim=1).tolist()
    return [list(level.split(counts)) for level in levels]


def valid_columns(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Which of the last `length` columns are real, bool [B, L]; None when all are."""
    valid_BL = None if mask is None else mask[:, -length:].bool()
    return None if valid_BL is None or bool(valid_BL.all()) else valid_BL


def position_rows(
    position_ids: torch.Tensor | None, embeds: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Position ids as int64 [P, B, L], P = 1 for text and 3 or 4 with M-RoPE, moved down by what
    earlier turns were renumbered by."""
    batch, length = embeds.shape[:2]
    if position_ids is None:
        seen = 0 if cache is None else cache.get_seq_length()
        position_ids = torch.arange(seen, seen + length, device=embeds.device)[None]
    if position_ids.dim() == 2:
        position_ids = position_ids[None]
    position_ids = position_ids.expand(-1, batch, -1)
    shift_B = None if cache is None else cache.layers[0].shift_B
    if shift_B is None:
        return position_ids
    return (position_ids - shift_B[None, :, None]).clamp(min=0)
