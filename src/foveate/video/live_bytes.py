"""Bytes that come as they are made: a file that grows, a pipe, whatever can be read forward.

What is here has `read` alone, so that FFmpeg cannot seek in it.
"""

from __future__ import annotations

import io
import os
import select
import stat
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from foveate.errors import (
    DamagedVideoError,
    DecoderFailedError,
    DecodeStalledError,
    EmptyVideoError,
    TruncatedVideoError,
    VideoSourceError,
)

# Seconds between looks at a file that may have grown; closing wakes who waits.
_LOOK = 0.05
# How far to look for the index of an MP4: it stands behind a few small boxes, or behind the data.
_HEAD_BYTES = 1 << 16
# What holds no packet for so long is no video, whatever it begins with.
_HOPELESS_BYTES = 64 << 20


class Bytes(Protocol):
    """Where bytes come from; `read` waits for some, and gives none at the end."""

    ended: str

    def take(self, count: int) -> bytes:
        """Up to `count` bytes, at least one unless it is over."""
        ...

    def close(self) -> None:
        """Wake whoever waits; safe from any thread."""
        ...

    def release(self) -> None:
        """Let go of the file, when nobody reads any more."""
        ...


class ForwardFile:
    """What FFmpeg reads: bytes in order, of which the first were looked at before.

    Attributes:
        first: the first bytes, once `check_index` has looked at them.
        tick: called whenever bytes have come.
    """

    def __init__(self, source: Bytes, name: str) -> None:
        self.source = source
        self.name = name
        self.first = b""
        self.tick: Callable[[], None] = lambda: None
        self._head = b""
        self._since_mark = 0
        self._is_over = False

    def read(self, count: int = -1) -> bytes:
        """The next bytes; empty at the end."""
        if self._head:
            found, self._head = self._head[:count], self._head[count:]
        else:
            found = self._take(count if count > 0 else 1 << 16)
        self.tick()
        self._since_mark += len(found)
        if self._since_mark > _HOPELESS_BYTES:
            raise DamagedVideoError(
                f"there is no video packet in {_HOPELESS_BYTES >> 20} MiB of it", source=self.name
            )
        return found

    def _take(self, count: int) -> bytes:
        # FFmpeg asks again at the end; nobody must wait a second time for it.
        found = b"" if self._is_over else self.source.take(count)
        self._is_over = not found
        return found

    def mark(self) -> None:
        """Say that a packet was found in what was read so far."""
        self._since_mark = 0

    def peek(self, count: int) -> bytes:
        """The first bytes, which stay to be read; fewer where the source ends."""
        while len(self._head) < count:
            more = self._take(count - len(self._head))
            if not more:
                break
            self._head += more
        return self._head

    def check_index(self) -> None:
        """See to it that an MP4 can be read forward.

        Raises:
            TruncatedVideoError: its index stands behind its data.
            EmptyVideoError: there are no bytes.
        """
        self.first = head = self.peek(16)
        if not head:
            raise EmptyVideoError(f"there are no bytes ({self.source.ended})", source=self.name)
        if head[4:8] not in (b"ftyp", b"styp", b"mdat", b"moov", b"moof"):
            return
        at = 0
        while at + 8 <= _HEAD_BYTES and len(head := self.peek(at + 8)) >= at + 8:
            size, kind = struct.unpack_from(">I4s", head, at)
            if kind == b"mdat":
                raise TruncatedVideoError(
                    "it is an MP4 whose index comes behind its data, where it is written when the "
                    "recording ends; open it with foveate.Clip then, or record as fragmented MP4 "
                    "(movflags=frag_keyframe+empty_moov), Matroska or MPEG-TS",
                    source=self.name,
                )
            if kind in (b"moov", b"moof") or size < 8:
                return
            at += size

    def close(self) -> None:
        """Wake whoever reads."""
        self.source.close()

    def release(self) -> None:
        """Let go of the file, when nobody reads any more."""
        self.source.release()


class GrowingFile:
    """A regular file, read to its end, and on when it grows.

    Args:
        path: the file.
        name: what errors call it.
        timeout: seconds without growth after which it counts as finished; None: it does not grow.
    """

    def __init__(self, path: str, name: str, timeout: float | None) -> None:
        self.ended = "the file ends here"
        self._name = name
        self._timeout = timeout
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115
        self._position = 0
        self._closed = threading.Event()

    def take(self, count: int) -> bytes:
        """Up to `count` bytes; see `Bytes.take`."""
        since = time.monotonic()
        while not self._closed.is_set():
            found = self._file.read(count)
            if found:
                self._position += len(found)
                return found
            if self._timeout is None:
                return b""
            size = os.fstat(self._file.fileno()).st_size
            if size < self._position:
                raise DecoderFailedError(
                    f"the file was cut back to {size} bytes after {self._position} had been read",
                    source=self._name,
                )
            if time.monotonic() - since > self._timeout:
                self.ended = f"the file did not grow for {self._timeout:g} s"
                return b""
            self._closed.wait(_LOOK)
        return b""

    def close(self) -> None:
        """Wake whoever waits."""
        self._closed.set()

    def release(self) -> None:
        """Close the file; under a reader's feet it must not be."""
        self._file.close()


class PipeBytes:
    """A pipe, a socket, a terminal, or any object with `read`.

    Where the system can tell whether there is something to read, waiting ends after `timeout`
    seconds, or when it is closed. Otherwise it ends when the object's `read` does.

    Args:
        file: binary file object, or the path of a named pipe.
        name: what errors call it.
        timeout: longest silence in seconds.
    """

    def __init__(self, file: Any, name: str, timeout: float) -> None:
        self.ended = "the source ended"
        self._name = name
        self._timeout = timeout
        self._closed = threading.Event()
        self._is_ours = isinstance(file, str)
        self._is_silent = self._is_ours  # nobody has opened the other end yet
        self._head = b""
        self._file = file
        self._fd: int | None = None
        if self._is_ours:
            # Without O_NONBLOCK, opening waits for a writer.
            self._fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        elif os.name == "posix":
            self._fd = _waitable(file)
            if self._fd is not None:
                self._head = _buffered(file, self._fd)

    def take(self, count: int) -> bytes:
        """Up to `count` bytes; see `Bytes.take`."""
        if self._head:
            found, self._head = self._head[:count], self._head[count:]
            return found
        if self._fd is None:
            return b"" if self._closed.is_set() else self._take_blindly(count)
        since = time.monotonic()
        while not self._closed.is_set():
            ready, _, _ = select.select([self._fd], [], [], _LOOK)
            if ready:
                # Select may be wrong about a pipe that does not block.
                with suppress(BlockingIOError):
                    found = os.read(self._fd, count)
                    if found or not self._is_silent:
                        self._is_silent = self._is_silent and not found
                        return found
                self._closed.wait(_LOOK)
            if time.monotonic() - since > self._timeout:
                raise DecodeStalledError(
                    f"it gave nothing for {self._timeout:g} s", source=self._name
                )
        return b""

    def _take_blindly(self, count: int) -> bytes:
        read = getattr(self._file, "read1", None) or self._file.read
        try:
            found = read(count)
        except (OSError, ValueError) as error:
            raise DecoderFailedError(f"reading it failed: {error}", source=self._name) from error
        if found is None:
            raise VideoSourceError(
                "its read() gives None when there is nothing to read; make it wait",
                source=self._name,
            )
        if not isinstance(found, bytes):
            raise VideoSourceError(
                f"its read() gives {type(found).__name__} instead of bytes; open it with mode 'rb'",
                source=self._name,
            )
        return found

    def close(self) -> None:
        """Wake whoever waits."""
        self._closed.set()

    def release(self) -> None:
        """Close a named pipe; a file object is its owner's."""
        fd, self._fd = self._fd, None
        if self._is_ours and fd is not None:
            os.close(fd)


def _waitable(file: Any) -> int | None:
    """The file descriptor of a pipe, socket or terminal; None for anything else."""
    try:
        fd = int(file.fileno())
        mode = os.fstat(fd).st_mode
    except (AttributeError, OSError, ValueError, TypeError):
        return None
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)
    # select() knows descriptors below 1,024 only.
    return fd if waits and fd < 1024 else None


def _buffered(file: Any, fd: int) -> bytes:
    """What a buffered reader has read ahead, which its file descriptor will not give again."""
    if not isinstance(file, io.BufferedReader):
        return b""
    was_blocking = os.get_blocking(fd)
    os.set_blocking(fd, False)
    try:
        return file.read(len(file.peek(1)))
    finally:
        os.set_blocking(fd, was_blocking)
