"""Decoding on threads, frames given in order while later ones are still being decoded.

Fast runs decode pieces of a plan side by side, leave out what nobody needs, and vouch for every
frame that they give: all it refers to has come out of the decoder undamaged. Where one cannot
vouch, a careful run takes over, which decodes everything in order, puts the nearest frame in the
place of a lost one and keeps the record that damage reports are made of. After a stretch of that
a fast run is tried again.

Legend: N frames asked for ("slots"); n slots of a chunk; H, W pixels.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

import numpy as np

from foveate.errors import DamagedVideoError, DecoderFailedError, DecodeStalledError, VideoError
from foveate.video.collect import DecodeLog, stand_ins
from foveate.video.decode import Decoded, Reader
from foveate.video.jobs import schedule
from foveate.video.table import Group, PacketTable, needed, plan, suspects

# Longest nap of a thread that waits for another; it is woken earlier when there is news.
_NAP = 0.25
# Seconds to wait for threads that were told to stop.
_FAREWELL = 5.0
# Frames of the first careful run; each later one of a stream is twice as long.
_CAREFUL = 32


def cores() -> int:
    """Cores that this process may use, at most 16: beyond that nothing is gained."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), 16)
    return min(os.cpu_count() or 1, 16)


class Filled(NamedTuple):
    """A chunk of decoded frames.

    Attributes:
        pixels_nCHW: uint8 [n, 3, H, W].
        shown: rank of the frame that each slot shows; another than asked for is a stand-in.
        suspect: ranks that may show traces of a loss before them.
    """

    pixels_nCHW: np.ndarray
    shown: list[int]
    suspect: tuple[int, ...]


class _Stopped(Exception):
    """Unwinds a thread whose work nobody waits for any more."""


class _Board:
    """What threads and consumer share: the chunks in the making and which slots are done."""

    def __init__(self, count: int, chunk: int, size: tuple[int, int], ahead: int) -> None:
        self.count = count
        self.chunk = chunk
        self.size = size
        self.ahead = ahead
        self.news = threading.Condition()
        self.open_chunk = 0
        self.shown: list[int | None] = [None] * count
        self.error: Exception | None = None
        self.is_closed = False
        self.beats = 0
        self._chunks: dict[int, np.ndarray] = {}

    def row(self, slot: int, tick: Callable[[], None], *, may_wait: bool = True) -> np.ndarray:
        """Where a slot's picture goes; waits while its chunk is too far ahead of the consumer."""
        index, offset = divmod(slot, self.chunk)
        with self.news:
            while may_wait and index > self.open_chunk + self.ahead:
                self.news.wait(_NAP)
                tick()
            if index not in self._chunks:
                length = min(self.chunk, self.count - index * self.chunk)
                self._chunks[index] = np.empty((length, 3, *self.size), np.uint8)
            return self._chunks[index][offset]

    def commit(self, slot: int, rank: int) -> None:
        with self.news:
            self.shown[slot] = rank
            self.news.notify_all()

    def fail(self, error: Exception) -> None:
        with self.news:
            self.error = self.error or error
            self.news.notify_all()

    def hand_over(self) -> np.ndarray:
        """The chunk being waited for; the next one is waited for from now on."""
        with self.news:
            self.open_chunk += 1
            self.news.notify_all()
            return self._chunks.pop(self.open_chunk - 1)


class _Run:
    """Threads that fill slots from `first` on; `end` is where they cannot go on.

    They know the board and the reader but not the stream, so that a stream which nobody holds any
    more is collected and stops them.
    """

    def __init__(
        self,
        name: str,
        board: _Board,
        reader: Any,
        table: PacketTable,
        ranks: list[int],
        first: int,
    ) -> None:
        self.name = name
        self.board = board
        self.reader = reader
        self.table = table
        self.ranks = ranks
        self.first = first
        self.end = len(ranks)
        self.is_stopped = False
        self.near = first
        self.threads: list[threading.Thread] = []

    def start(self, count: int = 1) -> None:
        for i in range(count):
            name = f"foveate-decode-{i}"
            self.threads.append(threading.Thread(target=self._guard, name=name, daemon=True))
        for thread in self.threads:
            thread.start()

    def stop(self) -> bool:
        """Tell the threads to end and wait for them; whether they did."""
        self.is_stopped = True
        with self.board.news:
            self.board.news.notify_all()
        deadline = time.monotonic() + _FAREWELL
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self.threads)

    @property
    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)

    def tick(self) -> None:
        """Called at every packet: a sign of life, and where a thread learns that it may go."""
        self.board.beats += 1
        if self.is_stopped or self.board.is_closed or self.board.error is not None:
            raise _Stopped

    def _guard(self) -> None:
        try:
            self._work()
        except _Stopped:
            pass
        except Exception as error:
            self.board.fail(self._explain(error))
        finally:
            with self.board.news:
                self.board.news.notify_all()

    def _explain(self, error: Exception) -> Exception:
        """The error with the file and the time, whatever it was."""
        if isinstance(error, ImportError) or getattr(error, "source", None):
            return error
        near = self.ranks[min(self.near, len(self.ranks) - 1)]
        place = f"near {float(self.table.seconds_F[near]):.2f} s"
        if isinstance(error, VideoError):
            failure = type(error)(f"{place}: {error.reason}", source=self.name)
        else:
            words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            failure = DecoderFailedError(f"decoding failed {place} ({words})", source=self.name)
        failure.__cause__ = error
        return failure

    def _work(self) -> None:
        raise NotImplementedError


class _FastRun(_Run):
    """Pieces of a plan, side by side; gives sound frames only and ends where one is not."""

    def __init__(self, *shared: Any, threads: int, in_order: bool) -> None:
        super().__init__(*shared)
        pending = [slot for slot in range(self.first, self.end) if self.board.shown[slot] is None]
        self.slot_of = {self.ranks[slot]: slot for slot in pending}
        jobs = schedule(self.table, self.slot_of, min(threads, self.reader.max_sessions))
        # A source with one place to read from still gets a decoder with all codec threads.
        self.codec_threads = threads if jobs.workers == 1 else jobs.codec_threads
        self.groups = jobs.groups
        self.waiting = deque(range(len(jobs.groups)) if in_order else jobs.longest_first)
        self.start(jobs.workers)

    def _next(self) -> Group | None:
        with self.board.news:
            while self.waiting:
                group = self.groups[self.waiting.popleft()]
                # What lies behind a place of damage is planned anew after it.
                if self.slot_of[group.ranks[0]] < self.end:
                    return group
        return None

    def _work(self) -> None:
        with self.reader.session(self.codec_threads, self.tick) as session:
            while (group := self._next()) is not None:
                left = self._decode(session, group)
                if left:
                    with self.board.news:
                        self.end = min(self.end, self.slot_of[min(left)])
                        self.board.news.notify_all()

    def _decode(self, session: Any, group: Group) -> set[int]:
        """Decode one piece; the wanted frames that one cannot vouch for are left."""
        expected, skip = needed(self.table, group)
        left = set(group.ranks)
        self.near = first = self.slot_of[group.ranks[0]]
        seen: set[int] = set()
        at = num_written = 0
        with closing(session.run(group, skip)) as frames:
            for decoded in frames:
                self.tick()
                if decoded.is_corrupt or first >= self.end:
                    break
                seen.add(decoded.rank)
                if decoded.rank in left:
                    slot = self.slot_of[decoded.rank]
                    # A frame that is written waits for frames behind it to be vouched for.
                    may_wait = num_written == len(group.ranks) - len(left)
                    decoded.write(self.board.row(slot, self.tick, may_wait=may_wait))
                    num_written += 1
                while at < len(expected) and expected[at] in seen:
                    # All that stands before this frame in the file has come out.
                    rank = expected[at]
                    if rank in left:
                        left.discard(rank)
                        self.board.commit(self.slot_of[rank], rank)
                    at += 1
                if at < len(expected) and expected[at] < decoded.rank:
                    break  # its turn is over: it was lost
        return left


class _CarefulRun(_Run):
    """One decoder, everything in order, stand-ins for what is lost, and a record of it."""

    def __init__(self, *shared: Any, threads: int, count: int, before: Decoded | None) -> None:
        super().__init__(*shared)
        self.end = min(self.first + count, self.end)
        self.threads_wanted = threads
        self.before = before
        self.log = DecodeLog()
        self.start()

    def _work(self) -> None:
        wanted = self.ranks[self.first :]
        groups = plan(self.table, wanted)
        if self.first:
            # Perhaps it is the keyframe that is not what it says: begin at the one before.
            groups[0] = _from_keyframe_before(self.table, groups[0])
        with closing(self._frames(groups)) as frames:
            shown = stand_ins(self.log.watch(frames), wanted, self.before)
            for slot, decoded in zip(range(self.first, self.end), shown, strict=False):
                self.near = slot
                if decoded is None:
                    raise DamagedVideoError(
                        f"none of the {len(self.ranks)} frames asked for can be decoded",
                        source=self.name,
                    )
                if self.board.shown[slot] is None:
                    decoded.write(self.board.row(slot, self.tick))
                    self.board.commit(slot, decoded.rank)

    def _frames(self, groups: Sequence[Group]) -> Generator[Decoded]:
        if not hasattr(self.reader, "session"):
            for decoded in self.reader.decode(groups):
                self.tick()
                yield decoded
            return
        with self.reader.session(self.threads_wanted, self.tick) as session:
            for group in groups:
                yield from session.run(group)


def _from_keyframe_before(table: PacketTable, group: Group) -> Group:
    if group.seek_pts is None:
        return group
    key_K = np.flatnonzero(table.key_F)
    key_K = key_K[table.position_F[key_K] < group.start]
    if not len(key_K):
        return Group(group.ranks, 0, group.stop)
    rank = int(key_K[-1])
    return Group(group.ranks, int(table.position_F[rank]), group.stop, int(table.pts_F[rank]), rank)


class DecodeStream:
    """An iterator of chunks; threads decode ahead from the first `next` on.

    Args:
        reader: where frames come from; one that opens sessions is read by several threads.
        table: its packet table.
        ranks: frames, ascending, each once.
        size: (height, width) that frames are scaled to.
        chunk: frames per chunk.
        ahead: finished chunks that may wait for the consumer.
        threads: decoding threads in all.
        timeout: seconds without a sign of life from any thread after which waiting ends.
        name: what errors call the source.
    """

    def __init__(
        self,
        reader: Reader,
        table: PacketTable,
        ranks: Sequence[int],
        *,
        size: tuple[int, int],
        chunk: int,
        ahead: int,
        threads: int,
        timeout: float,
        name: str,
    ) -> None:
        self._ranks = list(ranks)
        self._board = _Board(len(self._ranks), chunk, size, ahead)
        self._shared = (name, self._board, reader, table, self._ranks)
        self._name = name
        self._table = table
        self._threads = threads
        self._timeout = timeout
        self._can_be_fast = table.is_regular and hasattr(reader, "session")
        self._tells_losses = getattr(reader, "gives_every_frame", True)
        self._run: _Run | None = None
        self._careful_count = _CAREFUL
        self._careful: list[_CarefulRun] = []
        self._last: Decoded | None = None

    def __iter__(self) -> Iterator[Filled]:
        return self

    def __next__(self) -> Filled:
        board = self._board
        first = board.open_chunk * board.chunk
        if board.is_closed or first >= board.count:
            self.close()
            raise StopIteration
        end = min(first + board.chunk, board.count)
        try:
            for slot in range(first, end):
                self._wait(slot, first)
        except _Stopped:
            raise StopIteration from None
        except BaseException as error:
            self.close(wait=not isinstance(error, DecodeStalledError))
            raise
        pixels_nCHW = board.hand_over()
        last = pixels_nCHW[-1].copy()
        self._last = Decoded(board.shown[end - 1] or 0, lambda out: np.copyto(out, last))
        shown = [rank for rank in board.shown[first:end] if rank is not None]
        filled = Filled(pixels_nCHW, shown, self._suspects(first, end))
        if end == board.count:
            self.close()
        return filled

    def close(self, *, wait: bool = True) -> None:
        """Stop decoding; a `next` that waits in another thread ends its iteration."""
        with self._board.news:
            self._board.is_closed = True
            self._board.news.notify_all()
        run = self._run
        if run is not None and wait:
            run.stop()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close(wait=False)

    def _wait(self, slot: int, first: int) -> None:
        """Until a slot is done, starting whatever run is its turn."""
        board = self._board
        beats, since = board.beats, time.monotonic()
        while board.shown[slot] is None:
            if board.error is not None:
                raise board.error
            if board.is_closed:
                raise _Stopped
            run = self._run
            if run is None or slot >= run.end:
                self._run = self._turn(run, slot, first)
                continue
            with board.news:
                if board.shown[slot] is None and board.error is None and slot < run.end:
                    if run.is_over:
                        raise DecoderFailedError("its decoder ended early", source=self._name)
                    board.news.wait(_NAP)
            if board.beats != beats:
                beats, since = board.beats, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                seconds = float(self._table.seconds_F[self._ranks[slot]])
                raise DecodeStalledError(
                    f"nothing was decoded for {self._timeout:g} s, waiting for the frame at "
                    f"{seconds:.2f} s",
                    source=self._name,
                )

    def _turn(self, run: _Run | None, slot: int, first: int) -> _Run:
        if run is not None:
            run.stop()
        shared = (*self._shared, slot)
        if self._can_be_fast and not isinstance(run, _FastRun):
            in_order = self._board.chunk < self._board.count
            return _FastRun(*shared, threads=self._threads, in_order=in_order)
        before = self._last
        if slot > first:
            row_CHW = self._board.row(slot - 1, lambda: None)
            before = Decoded(self._board.shown[slot - 1] or 0, lambda out: np.copyto(out, row_CHW))
        count = self._careful_count if self._can_be_fast else self._board.count
        self._careful_count *= 2
        careful = _CarefulRun(*shared, threads=self._threads, count=count, before=before)
        self._careful.append(careful)
        return careful

    def _suspects(self, first: int, end: int) -> tuple[int, ...]:
        """Frames of a chunk that came from careful runs and follow a loss."""
        found: list[int] = []
        self._careful = [run for run in self._careful if run.end > first]
        for run in self._careful if self._tells_losses else ():
            part = self._ranks[max(first, run.first) : min(end, run.end)]
            if part:
                log = run.log
                found += suspects(self._table, np.array(part), log.seen, log.flagged, log.highest)
        return tuple(sorted(set(found)))
