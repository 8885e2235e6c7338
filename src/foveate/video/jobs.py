"""Dividing a plan among decoders that work side by side: pure arithmetic, no decoder.

Costs are counted in packets to decode. The constants say what else costs about as much.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from foveate.video.table import MIN_SKIP, Group, PacketTable, plan

# Opening a file once more: FFmpeg decodes some pictures to learn how they are reordered.
_OPEN = 12
# Flushing a decoder and finding the place in the file.
_SEEK = 1
# Packets that two decoders may both decode where a group of pictures is open.
_OVERLAP = 8
# Share of a core that a codec thread adds: threads inside one decoder wait for each other.
_CODEC_THREAD = 0.85
# Pieces a decoder should get, so that an unlucky one can be made up for, and their least size.
_PIECES_EACH, _SMALLEST = 8, 16


class Schedule(NamedTuple):
    """What to decode, by how many decoders, with how many codec threads in each.

    Attributes:
        groups: pieces in presentation order; each may go to any decoder.
        costs: packets to decode for each piece.
        workers: decoders.
        codec_threads: threads inside each.
    """

    groups: list[Group]
    costs: list[int]
    workers: int
    codec_threads: int

    @property
    def longest_first(self) -> list[int]:
        """Pieces by cost: dealt in this order, decoders finish at nearly the same time."""
        return sorted(range(len(self.groups)), key=lambda i: (-self.costs[i], i))


def packets_to_decode(table: PacketTable, groups: Sequence[Group]) -> list[int]:
    """Packets of each group that must be decoded; disposable ones only where they are wanted."""
    spare = np.zeros(len(table) + 1, dtype=np.int64)
    disposable_F = table.disposable_F
    if disposable_F is not None:
        spare[1:] = np.cumsum(disposable_F[table.rank_by_position])
    costs = []
    for group in groups:
        first, end = np.searchsorted(table.sorted_position, (group.start, group.stop + 1))
        saved = int(spare[end] - spare[first])
        if disposable_F is not None:
            saved -= int(disposable_F[list(group.ranks)].sum())
        costs.append(int(end - first) - saved)
    return costs


def schedule(table: PacketTable, ranks: Iterable[int], threads: int) -> Schedule:
    """Decide between decoders side by side and one decoder with codec threads.

    Pieces start at keyframes. Clips of a few groups of pictures are cut only if that saves more
    than opening the file again costs; where pieces are much fewer than threads, one decoder with
    all threads is faster. O(n log n) for n wanted frames.

    Args:
        table: the packet table.
        ranks: wanted frames, each in [0, F).
        threads: threads in all, at least 1.

    Example:
        >>> from fractions import Fraction
        >>> ticks = np.arange(1000)
        >>> table = PacketTable(ticks, ticks, ticks % 100 == 0, Fraction(1, 25), 1000,
        ...                     is_regular=True)
        >>> both = schedule(table, range(1000), 2)
        >>> len(both.groups), sum(both.costs), both.workers, both.codec_threads
        (10, 1000, 2, 1)
        >>> schedule(table, [3, 40, 60], 2)[2:]  # one group of pictures
        (1, 2)
    """
    wanted = np.unique(np.fromiter(ranks, dtype=np.int64))
    one = plan(table, wanted.tolist())
    one_costs = packets_to_decode(table, one)
    alone = Schedule(one, one_costs, 1, threads)
    if threads < 2 or not table.is_regular:
        return alone
    pieces = plan(table, wanted.tolist(), min_skip=-_OVERLAP)
    least = max(_SMALLEST, sum(one_costs) // (threads * _PIECES_EACH))
    pieces, costs = _join(pieces, packets_to_decode(table, pieces), least)
    workers = min(threads, len(pieces))
    apart = _OPEN + _makespan([cost + _SEEK for cost in costs], workers)
    together = (sum(one_costs) + _SEEK * len(one)) / (_CODEC_THREAD * threads)
    if workers < 2 or apart >= together:
        return alone
    return Schedule(pieces, costs, workers, 1)


def _join(
    groups: Sequence[Group], costs: Sequence[int], least: int
) -> tuple[list[Group], list[int]]:
    """Small neighbours become one piece: every piece costs a seek."""
    joined: list[Group] = []
    total: list[int] = []
    for group, cost in zip(groups, costs, strict=True):
        last = joined[-1] if joined else None
        is_near = last is not None and group.start - last.stop <= MIN_SKIP
        if last is not None and is_near and total[-1] + cost <= least:
            ranks = last.ranks + group.ranks
            stop = max(last.stop, group.stop)
            joined[-1] = Group(ranks, last.start, stop, last.seek_pts, last.key_rank)
            total[-1] += cost
        else:
            joined.append(group)
            total.append(cost)
    return joined, total


def _makespan(costs: Sequence[int], workers: int) -> int:
    """When the last decoder is done if each takes the longest piece left."""
    busy = [0] * workers
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)
