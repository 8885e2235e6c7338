"""Block-wise causal attention: which keys a block of a long prompt sees, and in which runs it runs.

Tokens either belong to a block, numbered in order, or to none (-1: text between the blocks, which
everybody sees and which sees everything). A token of block i sees, of the tokens before it, those
of the blocks i - previous to i and those that belong to none.

Legend of shape suffixes: L tokens, R runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockRun:
    """Consecutive tokens of one block (or of none); among themselves they are plain causal.

    Attributes:
        start, stop: the tokens [start, stop).
        seen: numbers of the earlier runs that they see, ascending.
        num_past: tokens of those runs.
    """

    start: int
    stop: int
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

    O(L + R^2) for R runs; reads `block_L` back to the host once.

    Args:
        block_L: block of every token, -1 for none, int64 [L].
        previous: blocks before its own that a token sees.

    Raises:
        ValueError: `block_L` is not one row, or `previous` is negative.

    Example:
        >>> runs = block_runs(torch.tensor([-1, 0, 0, 1, 2, -1]), previous=1)
        >>> [(run.start, run.stop, run.num_past) for run in runs]
        [(0, 1, 0), (1, 3, 1), (3, 4, 3), (4, 5, 2), (5, 6, 5)]
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
    borders = borders_R1.tolist()
    return [
        BlockRun(borders[r], borders[r + 1], tuple(near_R.nonzero()[:, 0].tolist()), num_past[r])
        for r, near_R in enumerate(near_RR)
    ]


def _near(block_L: Tensor, previous: int) -> Tensor:
    row_L1, column_1L = block_L[:, None], block_L[None]
    return (row_L1 < 0) | (column_1L < 0) | (row_L1 - column_1L <= previous)


def _check(block_L: Tensor, previous: int) -> None:
    if block_L.dim() != 1:
        raise ValueError(f"block_L must be one row [L], got {tuple(block_L.shape)}.")
    if previous < 0:
        raise ValueError(f"previous must be 0 or more blocks, got {previous}.")
