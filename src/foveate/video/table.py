"""The packet table of a video track and the plan for decoding chosen frames from it.

Everything here is pure arithmetic on numbers: no decoder, no file.

Legend: F frames in presentation order (the *rank* of a frame is its place there, 0-based);
K keyframes; "position" is the place of a frame's packet in decoding (file) order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Flushing the decoder and finding the file position costs about as much as decoding a few frames.
MIN_SKIP = 8


class Packet(NamedTuple):
    """One packet as the container lists it (timestamps and durations in ticks of the time base)."""

    position: int
    pts: int | None
    is_keyframe: bool
    duration: int
    is_disposable: bool = False
    size: int = 0


@dataclass(frozen=True, eq=False)
class PacketTable:
    """Which frames a video track has, when they are shown, and where decoding can start.

    Attributes:
        pts_F: int64 [F], presentation timestamps in ticks, strictly ascending.
        position_F: int64 [F], place of each frame's packet in decoding order.
        key_F: bool [F], whether decoding can start at this frame.
        time_base: seconds per tick.
        end_pts: tick at which the last frame stops being shown.
        by_order: timestamps of packets cannot be trusted (raw streams, h264 in AVI), so frames are
            numbered in the order in which the decoder gives them, and nothing is skipped.
        disposable_F: bool [F], whether no other frame refers to this one, so that its packet can be
            left out; None if that is not known.
        is_regular: every packet has a timestamp of its own, so that frames can be told apart
            wherever decoding starts.
        bytes_F: int64 [F], size of each frame's packet; None if nothing is packed.
    """

    pts_F: np.ndarray
    position_F: np.ndarray
    key_F: np.ndarray
    time_base: Fraction
    end_pts: int
    by_order: bool = False
    disposable_F: np.ndarray | None = None
    is_regular: bool = False
    bytes_F: np.ndarray | None = None

    @classmethod
    def from_packets(
        cls,
        packets: Sequence[Packet],
        time_base: Fraction,
        frame_rate: Fraction | None = None,
        *,
        by_order: bool = False,
    ) -> PacketTable:
        """Sort packets into presentation order; O(F log F).

        Packets without a timestamp are left out, because no frame can be asked for by them (second
        fields of interlaced pictures). If none has one, if ``by_order`` and some lack one of their
        own, or if a recording that begins anew gives timestamps out a second time, every packet
        counts as a frame at ``frame_rate`` (25 per second if unknown).
        """
        timed = [packet for packet in packets if packet.pts is not None]
        num_times = len({packet.pts for packet in timed})
        by_order = by_order or _begins_anew(timed, num_times)
        if not timed or (by_order and num_times < len(packets)):
            by_order = True
            time_base = 1 / frame_rate if frame_rate else Fraction(1, 25)
            timed = [
                Packet(p.position, i, p.is_keyframe, 1, False, p.size)
                for i, p in enumerate(packets)
            ]
        pts_D = np.array([packet.pts for packet in timed], dtype=np.int64)
        pts_F, first_F = np.unique(pts_D, return_index=True)
        position_F = np.array([timed[i].position for i in first_F], dtype=np.int64)
        key_F = np.array([timed[i].is_keyframe for i in first_F], dtype=bool)
        end_pts = 0
        if len(pts_F):
            last = timed[first_F[-1]].duration
            if last <= 0 and len(pts_F) > 1:
                last = int(np.median(np.diff(pts_F)))
            elif last <= 0 and frame_rate:
                last = round(1 / (frame_rate * time_base))
            end_pts = int(pts_F[-1]) + last
        is_regular = not by_order and len(pts_F) == len(packets)
        disposable_F = np.array([timed[i].is_disposable for i in first_F], dtype=bool)
        return cls(
            pts_F,
            position_F,
            key_F,
            time_base,
            end_pts,
            by_order,
            # The second field of a picture may hide behind a packet of its own: leave those alone.
            disposable_F if is_regular and disposable_F.any() else None,
            is_regular,
            np.array([timed[i].size for i in first_F], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.pts_F)

    @cached_property
    def seconds_F(self) -> np.ndarray:
        """float64 [F], when each frame is first shown, counted from the first frame."""
        tick = self.time_base
        return (self.pts_F - self.pts_F[:1]).astype(np.float64) * tick.numerator / tick.denominator

    @property
    def duration(self) -> float:
        """Seconds from the first frame until the last one stops being shown."""
        return float((self.end_pts - int(self.pts_F[0])) * self.time_base) if len(self) else 0.0

    @cached_property
    def rank_of_pts(self) -> dict[int, int]:
        """Rank of the frame with a given timestamp (ticks)."""
        return {pts: rank for rank, pts in enumerate(self.pts_F.tolist())}

    @cached_property
    def position_of_pts(self) -> dict[int, int]:
        """Decoding position of the packet with a given timestamp (ticks)."""
        return dict(zip(self.pts_F.tolist(), self.position_F.tolist(), strict=True))

    @cached_property
    def rank_by_position(self) -> np.ndarray:
        """int64 [F], ranks in decoding order."""
        return np.argsort(self.position_F, kind="stable")

    @cached_property
    def sorted_position(self) -> np.ndarray:
        """int64 [F], decoding positions, ascending (discarded packets leave holes)."""
        return self.position_F[self.rank_by_position]

    @property
    def is_variable(self) -> bool:
        """Whether gaps between frames differ by more than rounding to ticks explains."""
        gaps = np.diff(self.pts_F)
        if len(gaps) < 2:
            return False
        return bool(gaps.max() - gaps.min() > max(2.0, 0.05 * float(np.median(gaps))))

    def shown_at(self, seconds: np.ndarray) -> np.ndarray:
        """int64 ranks of the frames on screen at these seconds; O(log F) each."""
        return np.searchsorted(self.seconds_F, seconds + self.slack, side="right") - 1

    @property
    def slack(self) -> float:
        """Seconds by which a time may miss its frame: half a tick of rounding, 0.5 ms at most."""
        return 0.5 * min(float(self.time_base), 1e-3)


def _begins_anew(timed: Sequence[Packet], num_times: int) -> bool:
    """Whether packets share timestamps because time went back, or stands still."""
    if num_times == len(timed):
        return False
    keys = [packet.pts or 0 for packet in timed if packet.is_keyframe]
    # Two packets with one time may be the fields of one picture.
    return (num_times == 1 and len(timed) > 2) or any(b < a for a, b in pairwise(keys))


@dataclass(frozen=True)
class Group:
    """One run of the decoder: where it starts, which packets it needs, which frames are wanted.

    Attributes:
        ranks: wanted frames, ascending.
        start: decoding position of the first packet to decode.
        stop: decoding position of the last packet to decode.
        seek_pts: timestamp (ticks) of the keyframe to start at; None starts at the head of the
            file.
        key_rank: rank of that keyframe (0 at the head). Frames shown before it that come out of
            this run lack their references and must be dropped.
    """

    ranks: tuple[int, ...]
    start: int
    stop: int
    seek_pts: int | None = None
    key_rank: int = 0

    @property
    def cost(self) -> int:
        """Packets from the first to the last; see `needed` for those that must be decoded."""
        return self.stop - self.start + 1


def plan(table: PacketTable, ranks: Iterable[int], *, min_skip: int = MIN_SKIP) -> list[Group]:
    """Split wanted frames into decoder runs that decode as little as possible.

    A run goes on forward as long as the next wanted frame's keyframe is not ahead of what is
    decoded anyway; a new run (a seek) starts where at least ``min_skip`` packets would be decoded
    for nothing. ``min_skip=0`` starts a run at every keyframe that is still ahead; below zero, runs
    may also decode up to that many packets twice, so that they can go to decoders of their own even
    where groups of pictures are open. O(n log n) for n wanted frames.

    Args:
        table: the packet table.
        ranks: wanted frames, any order, repeats allowed; each in [0, F).
        min_skip: packets.

    Returns:
        Groups in presentation order; together they hold every wanted rank once.

    Example:
        >>> ticks = np.arange(100)
        >>> table = PacketTable(ticks, ticks, ticks % 25 == 0, Fraction(1, 25), 100)
        >>> [(g.seek_pts, g.ranks, g.cost) for g in plan(table, [0, 30, 99])]
        [(None, (0,), 1), (25, (30,), 6), (75, (99,), 25)]
    """
    wanted = np.unique(np.fromiter(ranks, dtype=np.int64))
    if not len(wanted):
        return []
    if table.by_order:
        # Without trusted timestamps the decoder's own count is the only clock: read from the head.
        return [Group(tuple(wanted.tolist()), 0, int(table.position_F.max()))]
    needed = np.maximum.accumulate(table.position_F[wanted])
    key = _keyframe_of(table, wanted)
    start = np.where(key >= 0, table.position_F[key], 0)
    # Packets between what the run before has decoded and the keyframe; negative if it is behind.
    skipped = start - 1 - np.concatenate(([-1], needed[:-1]))
    is_next = key != np.concatenate(([-1], key[:-1]))
    seeks = is_next & (start > 0) & (skipped >= min_skip)
    edges = sorted({0, len(wanted), *np.flatnonzero(seeks).tolist()})
    return [
        Group(
            ranks=tuple(wanted[first:end].tolist()),
            start=int(start[first]) if seeks[first] else 0,
            stop=int(needed[end - 1]),
            seek_pts=int(table.pts_F[key[first]]) if seeks[first] else None,
            key_rank=int(key[first]) if seeks[first] else 0,
        )
        for first, end in pairwise(edges)
    ]


def needed(table: PacketTable, group: Group) -> tuple[list[int], frozenset[int]]:
    """What a run has to decode when disposable frames that nobody asked for are left out.

    O(packets of the run).

    Returns:
        Ranks that must come out, in decoding order (leading frames, which lack their references,
        are not among them), and the decoding positions of the packets to leave out.
    """
    first, end = np.searchsorted(table.sorted_position, (group.start, group.stop + 1))
    order = table.rank_by_position[first:end]
    kept = np.ones(len(order), dtype=bool)
    if table.disposable_F is not None:
        kept = ~table.disposable_F[order] | np.isin(order, group.ranks)
    out = order[kept & (order >= group.key_rank)]
    return out.tolist(), frozenset(table.position_F[order[~kept]].tolist())


def _keyframe_of(table: PacketTable, wanted: np.ndarray) -> np.ndarray:
    """Rank of the keyframe from which each wanted frame decodes, -1 for the head of the file.

    That is the last keyframe shown no later than the frame *and* decoded no later. A leading frame
    of an open group of pictures is shown before the keyframe it follows in the file: it needs
    the keyframe before.
    """
    key_K = np.flatnonzero(table.key_F)
    slot = np.searchsorted(key_K, wanted, side="right") - 1
    if len(key_K):
        while True:
            late = (slot >= 0) & (table.position_F[key_K[slot]] > table.position_F[wanted])
            if not late.any():
                break
            slot = slot - late
    return np.where(slot >= 0, key_K[slot] if len(key_K) else -1, -1)


def suspects(
    table: PacketTable, ranks: np.ndarray, seen: set[int], flagged: set[int], highest: int
) -> list[int]:
    """Frames of `ranks` that came out, but after a loss in their own group of pictures.

    Decoders go on from a damaged reference and draw the error forward until the next keyframe; most
    say nothing about it. O(packets from the first frame's keyframe to the last frame).

    Args:
        table: the packet table.
        ranks: int64 [n], wanted frames, ascending.
        seen: ranks that have come out of the decoder.
        flagged: ranks that the decoder itself called damaged.
        highest: largest rank seen; frames after it may be still to come.
    """
    position_n = table.position_F[ranks]
    key_n = _keyframe_of(table, ranks)
    start_n = np.where(key_n >= 0, table.position_F[key_n], 0)
    order_F = table.rank_by_position
    first, last = np.searchsorted(
        table.position_F[order_F], (start_n.min(), position_n.max()), side="left"
    )
    wanted = set(ranks.tolist())
    found = []
    key_rank, is_tainted = 0, False
    for rank in order_F[first : last + 1].tolist():
        if table.key_F[rank]:
            key_rank, is_tainted = rank, False
        # Leading pictures after a seek are dropped on purpose; nothing refers to them.
        is_lost = key_rank <= rank <= highest and rank not in seen
        is_tainted = is_tainted or is_lost or rank in flagged
        if is_tainted and rank in wanted and rank in seen:
            found.append(rank)
    return sorted(found)
