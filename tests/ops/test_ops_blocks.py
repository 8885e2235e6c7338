"""Runs of block-wise attention against the dense mask that specifies it."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.ops.blocks import block_mask, block_runs

blocks = st.lists(st.integers(-1, 4), max_size=24)


@given(blocks, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_runs_add_up_to_the_mask(numbers: list[int], previous: int) -> None:
    """In any order of blocks, text between them included."""
    block_L = torch.tensor(numbers, dtype=torch.long)
    runs = block_runs(block_L, previous)
    assert [n for run in runs for n in range(run.start, run.stop)] == list(range(len(numbers)))
    mask_LL = torch.zeros(len(numbers), len(numbers), dtype=torch.bool)
    borders = [0, *accumulate(length for run in runs for length in run.parts)]
    for run in runs:
        assert sum(run.parts) == run.length
        seen = [n for part in run.seen for n in range(borders[part], borders[part + 1])]
        assert len(seen) == run.num_past
        assert run.pairs == run.length * (len(seen) + run.length)
        mask_LL[run.start : run.stop, seen] = True
        own = slice(run.start, run.stop)
        mask_LL[own, own] = torch.ones(run.length, run.length).tril().bool()
    assert torch.equal(mask_LL, block_mask(block_L, previous))


def test_as_many_blocks_as_there_are_is_plain_causal() -> None:
    block_L = torch.tensor([-1, 0, 0, 1, -1, 2, 2, -1])
    assert torch.equal(block_mask(block_L, 2), torch.ones(8, 8).tril().bool())
    assert not torch.equal(block_mask(block_L, 1), torch.ones(8, 8).tril().bool())
    # One call of the kernel, as if there were no blocks.
    assert [(run.start, run.stop) for run in block_runs(block_L, 2)] == [(0, 8)]
    assert len(block_runs(block_L, 1)) > 1


def test_work_grows_linearly_with_the_blocks() -> None:
    def pairs(num: int) -> int:
        block_L = torch.arange(num).repeat_interleave(10)
        return sum(run.pairs for run in block_runs(block_L, 3))

    # The first four are one run; from then on every block costs the same.
    assert pairs(4) == 40 * 40
    assert pairs(40) - pairs(20) == 20 * 10 * 40 and pairs(20) - pairs(4) == 16 * 10 * 40


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one row"):
        block_mask(torch.zeros(2, 3).long(), 1)
    with pytest.raises(ValueError, match="0 or more"):
        block_runs(torch.zeros(3).long(), -1)
