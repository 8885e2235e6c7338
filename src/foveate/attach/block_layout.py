"""Where a prompt that is read in blocks has its context, its runs and the text behind them.

Legend: B batch, L padded length, K samples of equal layout, C context tokens of a sample (all up to
its last visual token), S tokens behind them, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Samples
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from foveate.attach.sequence import Sequence, right_aligned
from foveate.core.blocks import Blocks
from foveate.ops.blocks import BlockRun, block_mask, block_runs


@dataclass(eq=False)
class Group:
    """Samples that can be read together: the same runs, maybe at other columns.

    Attributes:
        samples: their numbers in the batch.
        sample_K1: the same as a tensor, ready to index with `rows_KC`.
        rows_KC: columns of their contexts.
        block_C: block of every context token, -1 for text.
        previous: blocks before its own that a token sees.
        runs: the context, cut where what is seen changes.
    """

    samples: list[int]
    sample_K1: torch.Tensor
    rows_KC: torch.Tensor
    block_C: torch.Tensor
    previous: int
    runs: list[BlockRun]

    def dense_mask(self) -> torch.Tensor:
        """What the runs add up to, bool [C, C]."""
        return block_mask(self.block_C, self.previous)


class BlockLayout:
    """Columns of every part of a prompt.

    Attributes:
        rows: per sample, the valid columns.
        num_context: per sample, C; 0 for a sample that is left alone.
        visual: per sample, places of the visual tokens among its valid columns, int64 [N].
        tails: per sample, the columns behind the context.
        tail_BS: the same, padded on the left; at least one column, so that there is something to
            call an attention module with.
        tail_valid_BS: which of them are real, None when all are.
        groups: the samples that have blocks.
    """

    def __init__(self, sequence: Sequence, blocks: Samples[Blocks | None]) -> None:
        self.device = sequence.visual[0].rows_N.device
        self.rows: list[torch.Tensor] = []
        self.visual: list[torch.Tensor] = []
        self.num_context: list[int] = []
        alike: dict[tuple[int, ...], list[int]] = {}
        for sample, (visual, said) in enumerate(zip(sequence.visual, blocks, strict=True)):
            rows_S = sequence.rows(sample, self.device)
            visual_N = torch.searchsorted(rows_S, visual.rows_N)
            count = 0 if said is None else int(visual_N[-1]) + 1
            self.rows.append(rows_S)
            self.visual.append(visual_N)
            self.num_context.append(count)
            if said is not None:
                block_C = torch.full((count,), -1, device=self.device)
                block_C[visual_N] = said.block_N.to(self.device)
                alike.setdefault((said.previous, *block_C.tolist()), []).append(sample)
        self.groups = [self._group(samples, *key) for key, samples in alike.items()]
        self.tails = [rows[n:] for rows, n in zip(self.rows, self.num_context, strict=True)]
        counts = [len(tail) for tail in self.tails]
        self.num_tail = max(1, *counts)
        self.tail_BS = torch.stack([pad(t, (self.num_tail - len(t), 0)) for t in self.tails])
        self.tail_valid_BS = right_aligned(counts, self.num_tail, self.device)

    def _group(self, samples: list[int], previous: int, *blocks: int) -> Group:
        block_C = torch.tensor(blocks, device=self.device)
        return Group(
            samples,
            torch.tensor(samples, device=self.device)[:, None],
            torch.stack([self.rows[sample][: len(blocks)] for sample in samples]),
            block_C,
            previous,
            block_runs(block_C, previous),
        )


def rows_of(part: torch.Tensor, sample_K1: torch.Tensor, rows_KC: torch.Tensor) -> torch.Tensor:
    """(cos or sin) [B or 1, L, R] of some samples' columns, [K, C, R]."""
    return part[sample_K1 if part.shape[0] > 1 else torch.zeros_like(sample_K1), rows_KC]
