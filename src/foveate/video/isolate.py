"""Decoding in a process of its own, for files that nobody vouches for.

Decoders are a million lines of C that read what strangers wrote. The process here (see
`foveate.video.child`) may run out of memory, loop or crash; the caller gets an error. What it sends
is taken apart as numbers and pixels of the expected lengths, never unpickled. Nothing is shared but
two pipes, so nothing is left behind. It is no sandbox: a file that takes the process over has the
rights of its user.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from foveate import errors
from foveate.errors import DecodeLimitError, DecoderFailedError, VideoError, VideoSourceError
from foveate.video.decode import Scan
from foveate.video.orientation import Orientation
from foveate.video.parallel import Filled
from foveate.video.source import MediaSource
from foveate.video.table import PacketTable

# Longest message head; pixels and tables come behind it, their length known beforehand.
_MOST_HEAD = 1 << 16
_NAP = 0.25
# Seconds for the process to start and import PyAV, which no limit counts.
_START_SECONDS = 60.0
_CODE = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from foveate.video.child import main; main()"
)


@dataclass(frozen=True)
class Limits:
    """What a decoder in a process of its own may use; `Clip`'s ``max_pixels`` holds there, too.

    Attributes:
        memory: bytes of address space beyond what the process needs before it sees the file.
        seconds: wall-clock time that one request (opening; or all frames of one call or stream) may
            keep its caller waiting.
        cpu_seconds: processor time of one request, all threads together (rounded up).
        frames: frames (packets) of the file.

    Raises:
        ValueError: a limit is not positive.

    Example:
        >>> Limits(memory=1 << 30, seconds=20).seconds
        20
    """

    memory: int = 2 << 30
    seconds: float = 300.0
    cpu_seconds: float = 600.0
    frames: int = 2_000_000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"limit {name} must be a positive number, got {value!r}")


class IsolatedReader:
    """Reads one video through a process of its own, or several for streams side by side.

    Args:
        source: where the bytes are; a file object is read into memory.
        limits: what each process may use.
        max_pixels: largest picture (pixels) that is decoded.
        threads: decoding threads in all.

    Raises:
        VideoSourceError: this platform cannot limit a process (Windows).
    """

    def __init__(
        self, source: MediaSource, limits: Limits, *, max_pixels: int, threads: int
    ) -> None:
        if os.name != "posix":
            raise VideoSourceError(
                "isolate=True needs a POSIX system; leave it out for files you trust",
                source=source.name,
            )
        self.name = source.name
        self.limits = limits
        self._path, self._data = source.path, b"" if source.path else source.read()
        self._settings = {"max_pixels": max_pixels, "threads": threads, "name": source.name}
        self._idle: list[_Child] = []
        self._scan: Scan | None = None

    def scan(self) -> Scan:
        """List the packets; see `foveate.video.decode.PyAVReader.scan`."""
        if self._scan is None:
            self._idle.append(self._start())
        assert self._scan is not None
        return self._scan

    def stream(
        self, ranks: np.ndarray, chunk: int, ahead: int, size: tuple[int, int], timeout: float
    ) -> IsolatedStream:
        """Chunks of frames; see `foveate.video.parallel.DecodeStream`."""
        request = {"chunk": chunk, "ahead": ahead, "size": list(size), "timeout": timeout}
        return IsolatedStream(self, ranks.astype("<i8"), request)

    def _take(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            if child.is_alive:
                return child
            child.kill()
        return self._start()

    def _give_back(self, child: _Child) -> None:
        if self._idle:
            child.kill()
        else:
            self._idle.append(child)

    def _start(self) -> _Child:
        child = _Child(self.name)
        try:
            child.receive(_START_SECONDS)
            head = {
                **self._settings,
                "path": self._path,
                "memory": self.limits.memory,
                "cpu_seconds": math.ceil(self.limits.cpu_seconds),
                "max_frames": self.limits.frames,
            }
            deadline = self.limits.seconds
            child.send(head, self._data, deadline)
            facts, left = child.receive(deadline)
            self._scan = self._scan_from(child, facts, left)
        except BaseException:
            child.kill()
            raise
        return child

    def _scan_from(self, child: _Child, facts: dict[str, Any], left: float) -> Scan:
        count = int(facts["num_frames"])
        if not 0 <= count <= self.limits.frames:
            raise DecoderFailedError("its decoder sent nonsense", source=self.name)
        columns = np.empty((5, count), "<i8")
        if columns.size:
            child.read_into(columns.data.cast("B"), left)
        pts_F, position_F, key_F, disposable_F, bytes_F = columns
        table = PacketTable(
            pts_F.astype(np.int64),
            position_F.astype(np.int64),
            key_F != 0,
            Fraction(*facts["time_base"]),
            int(facts["end_pts"]),
            bool(facts["by_order"]),
            disposable_F != 0 if disposable_F.any() else None,
            bool(facts["is_regular"]),
            bytes_F.astype(np.int64) if bytes_F.any() else None,
        )
        return Scan(
            table=table,
            codec=str(facts["codec"]),
            container=str(facts["container"]),
            height=int(facts["height"]),
            width=int(facts["width"]),
            orientation=Orientation(*map(bool, facts["orientation"])),
            has_audio=bool(facts["has_audio"]),
            lost_frames=int(facts["lost_frames"]),
        )


class IsolatedStream:
    """Chunks from a process of its own; it decodes ahead while the caller does something else."""

    def __init__(self, reader: IsolatedReader, ranks: np.ndarray, request: dict[str, Any]) -> None:
        self._reader = reader
        self._ranks = ranks
        self._request = request
        self._chunk = int(request["chunk"])
        self._given = 0
        self._child: _Child | None = None
        self._left = reader.limits.seconds
        self._is_closed = False

    def __next__(self) -> Filled:
        count = min(self._chunk, len(self._ranks) - self._given)
        if self._is_closed or count <= 0:
            raise StopIteration
        try:
            if self._child is None:
                self._child = self._reader._take()
                head = {**self._request, "num_ranks": len(self._ranks)}
                self._left = self._child.send(head, self._ranks.tobytes(), self._left)
            filled = self._receive(self._child, count)
        except _Closed:
            raise StopIteration from None
        except BaseException:
            self.close()
            raise
        self._given += count
        if self._given == len(self._ranks):
            self._is_closed = True
            self._reader._give_back(self._child)
        return filled

    def _receive(self, child: _Child, count: int) -> Filled:
        pixels_nCHW = np.empty((count, 3, *self._request["size"]), np.uint8)
        flat = pixels_nCHW.data.cast("B")
        shown: list[int] = []
        suspect: list[int] = []
        # Pixels come in parts, so that the process need not hold a large request whole.
        while len(shown) < count:
            head, self._left = child.receive(self._left)
            part = [int(rank) for rank in head["shown"]]
            if not part or len(shown) + len(part) > count:
                raise DecoderFailedError("its decoder sent nonsense", source=self._reader.name)
            step = len(flat) // count
            place = flat[len(shown) * step : (len(shown) + len(part)) * step]
            self._left = child.read_into(place, self._left)
            shown += part
            suspect += [int(rank) for rank in head["suspect"]]
        return Filled(pixels_nCHW, shown, tuple(suspect))

    def close(self) -> None:
        """End the process if it is still at work."""
        if not self._is_closed and self._child is not None:
            self._child.kill()
        self._is_closed = True

    def __del__(self) -> None:
        self.close()


class _Closed(Exception):
    """The stream was closed from another thread."""


class _Child:
    """A process with a pipe to it and a pipe from it; every wait has an end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.was_killed = False
        package_root = str(Path(errors.__file__).parents[1])
        path = json.dumps([package_root, *sys.path])
        # Few arenas: each reserves address space, which is what is limited.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CODE, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._finalizer = weakref.finalize(self, _end, self.process)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process and collect it."""
        self.was_killed = True
        self._finalizer()

    def send(self, head: dict[str, Any], payload: bytes, seconds: float) -> float:
        """Send a message; gives the seconds that are left."""
        text = json.dumps({**head, "payload": len(payload)}).encode()
        for part in (len(text).to_bytes(8, "little"), text, payload):
            view = memoryview(part)
            seconds = self._move(
                self._to,
                selectors.EVENT_WRITE,
                view,
                seconds,
                lambda rest: os.write(self._to, rest),
            )
        return seconds

    def receive(self, seconds: float) -> tuple[dict[str, Any], float]:
        """The head of the next message, and the seconds that are left; raises what it reports."""
        size = bytearray(8)
        seconds = self.read_into(memoryview(size), seconds)
        length = int.from_bytes(size, "little")
        if length > _MOST_HEAD:
            raise DecoderFailedError("its decoder sent nonsense", source=self.name)
        text = bytearray(length)
        seconds = self.read_into(memoryview(text), seconds)
        try:
            head = json.loads(bytes(text))
        except ValueError:
            raise DecoderFailedError("its decoder sent nonsense", source=self.name) from None
        if "error" in head:
            raise self._error(head)
        return head, seconds

    def read_into(self, view: memoryview, seconds: float) -> float:
        """Fill a buffer; gives the seconds that are left."""
        return self._move(
            self._from,
            selectors.EVENT_READ,
            view,
            seconds,
            lambda rest: os.readv(self._from, [rest]),
        )

    def _move(
        self,
        file: int,
        event: int,
        view: memoryview,
        seconds: float,
        step: Callable[[memoryview], int],
    ) -> float:
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            if len(view):
                selector.register(file, event)
            while len(view):
                left = deadline - time.monotonic()
                if self.was_killed:
                    raise _Closed
                if left <= 0:
                    self.kill()
                    raise DecodeLimitError(
                        "its decoder took longer than allowed", source=self.name, limit="seconds"
                    )
                if not selector.select(min(left, _NAP)):
                    continue
                try:
                    moved = step(view)
                except BlockingIOError:
                    continue
                except OSError:
                    moved = 0
                if moved == 0:
                    raise self._ended()
                view = view[moved:]
        return max(deadline - time.monotonic(), 0.0)

    def _ended(self) -> Exception:
        if self.was_killed:
            return _Closed()
        try:
            code = self.process.wait(_NAP)
        except subprocess.TimeoutExpired:
            self.kill()
            return DecoderFailedError("its decoder hung up", source=self.name)
        self.kill()
        if code == -signal.SIGXCPU:
            return DecodeLimitError(
                "its decoder used more processor time than allowed",
                source=self.name,
                limit="cpu_seconds",
            )
        how = f"exit status {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return DecoderFailedError(f"its decoder ended ({how})", source=self.name)

    def _error(self, head: dict[str, Any]) -> Exception:
        reason = str(head.get("reason"))
        kind = getattr(errors, str(head["error"]), None)
        if kind is DecodeLimitError:
            return DecodeLimitError(reason, source=self.name, limit=str(head.get("limit")))
        if isinstance(kind, type) and issubclass(kind, VideoError):
            return kind(reason, source=self.name)
        if kind is errors.MissingDependencyError:
            return errors.MissingDependencyError(reason)
        return DecoderFailedError(reason, source=self.name)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
