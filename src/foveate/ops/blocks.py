"""Block-wise causal attention: which keys a block of a long prompt sees, and in which runs it runs.

Tokens either belong to a block, numbered in order, or to none (-1: text between the blocks, which
everybody sees and which sees everything). A token of block i sees, of the tokens before it, those
of the blocks i - previous to i and those that belong to none.

Legend of shape suffixes: L tokens, R stretches of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockRun:
    """Consecutive tokens that are plain causal among themselves and see the same before.

    Attributes:
        start, stop: the tokens [start, stop).
        parts: lengths of the stretches of one block (or of none) that the run consists of.
        seen: numbers of the earlier stretches that they see, counted over all runs, ascending.
        num_past: tokens of those stretches.
    """

    start: int
    stop: int
    parts: tuple[int, ...]
    seen: tuple[int, ...]
    num_past: int

    @property
    def length(self) -> int:
        """Tokens of the run."""
        return self.stop - self.start

    @property
    def pairs(self) -> int:
        """Products of a query and a key that the run computes, masked ones included."""
        return self.length * (self.num_past + self.length)


def block_mask(block_L: Tensor, previous: int) -> Tensor:
    """The specification as one dense mask, bool [L, L]: may row attend to column?

    O(L^2); `block_runs` is the form that saves the work.

    Args:
        block_L: block of every token, -1 for none, int64 [L].
        previous: blocks before its own that a token sees.

    Raises:
        ValueError: `block_L` is not one row, or `previous` is negative.

    Example:
        >>> block_mask(torch.tensor([-1, 0, 1, 2, -1]), previous=1).int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]

    Source: the mask of Video-XL-2's chunked prefill (arXiv 2506.19225).
    """
    _check(block_L, previous)
    return _near(block_L, previous).tril()


def block_runs(block_L: Tensor, previous: int) -> list[BlockRun]:
    """Cut a prompt into runs; run by run, attention equals that under `block_mask`.

    As long as all that came before is seen, one run goes on: causal kernels then need no mask.

    O(L + R^2) for R stretches; reads `block_L` back to the host once.

    Args:
        block_L: block of every token, -1 for none, int64 [L].
        previous: blocks before its own that a token sees.

    Raises:
        ValueError: `block_L` is not one row, or `previous` is negative.

    Example:
        >>> runs = block_runs(torch.tensor([-1, 0, 0, 1, 2, -1]), previous=1)
        >>> [(run.start, run.stop, run.num_past) for run in runs]
        [(0, 4, 0), (4, 5, 2), (5, 6, 5)]
    """
    _check(block_L, previous)
    if block_L.shape[0] == 0:
        return []
    block_L = block_L.cpu()
    first_R = torch.cat([torch.zeros(1).bool(), block_L[1:] != block_L[:-1]]).nonzero()[:, 0]
    borders_R1 = torch.nn.functional.pad(first_R, (1, 1))
    borders_R1[-1] = block_L.shape[0]
    block_R, length_R = block_L[borders_R1[:-1]], borders_R1.diff()
    near_RR = _near(block_R, previous).tril(-1)
    num_past = (near_RR * length_R).sum(dim=1).tolist()
    borders, lengths = borders_R1.tolist(), length_R.tolist()
    sees_all_R = near_RR.sum(dim=1) == torch.arange(len(lengths))
    lead = int(sees_all_R.cumprod(dim=0).sum())
    runs = [BlockRun(0, borders[lead], tuple(lengths[:lead]), (), 0)]
    for r in range(lead, len(lengths)):
        seen = tuple(near_RR[r].nonzero()[:, 0].tolist())
        runs.append(BlockRun(borders[r], borders[r + 1], (lengths[r],), seen, num_past[r]))
    return runs


def _near(block_L: Tensor, previous: int) -> Tensor:
    row_L1, column_1L = block_L[:, None], block_L[None]
    return (row_L1 < 0) | (column_1L < 0) | (row_L1 - column_1L <= previous)


def _check(block_L: Tensor, previous: int) -> None:
    if block_L.dim() != 1:
        raise ValueError(f"block_L must be one row [L], got {tuple(block_L.shape)}.")
    if previous < 0:
        raise ValueError(f"previous must be 0 or more blocks, got {previous}.")
