"""From what a decoder gives to what was asked for, with stand-ins for what it could not give."""

from __future__ import annotations

from collections.abc import Iterator

from foveate.video.decode import Decoded


class DecodeLog:
    """Remembers which frames came out of a decoder, for the damage report."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.flagged: set[int] = set()
        self.highest = -1

    def watch(self, frames: Iterator[Decoded]) -> Iterator[Decoded]:
        for decoded in frames:
            self.seen.add(decoded.rank)
            self.highest = max(self.highest, decoded.rank)
            if decoded.is_corrupt:
                self.flagged.add(decoded.rank)
            yield decoded


def stand_ins(
    frames: Iterator[Decoded], wanted: list[int], before: Decoded | None = None
) -> Iterator[Decoded | None]:
    """For each wanted rank (ascending) the decoded frame to show: itself, else the nearest one.

    Frames met on the way count as neighbours, too, and so does `before`, a frame ahead of all. None
    means that nothing decoded at all.
    """
    slot = 0
    for decoded in frames:
        while slot < len(wanted) and wanted[slot] < decoded.rank:
            is_nearer = before and wanted[slot] - before.rank <= decoded.rank - wanted[slot]
            yield before if is_nearer else decoded
            slot += 1
        if slot < len(wanted) and wanted[slot] == decoded.rank:
            yield decoded
            slot += 1
        if slot == len(wanted):
            return
        if before is None or decoded.rank > before.rank:
            before = decoded
    for _ in range(slot, len(wanted)):
        yield before
