"""A bounded way from one worker to the next, whose waits all end: by a timeout at the latest."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from foveate.errors import FoveateError


class OverlapTimeoutError(FoveateError, TimeoutError):
    """A worker of an overlapped prefill has not got on for too long."""


class Cancelled(Exception):
    """Whoever waits at a channel that was closed gets this; it never leaves the pipeline."""


class Channel:
    """Items in order, at most `depth` of them waiting.

    Args:
        depth: items that may wait.
        timeout: seconds after which a wait ends in an error.
        waits_for: the stage that fills it, for that error.
    """

    def __init__(self, depth: int, timeout: float, waits_for: str) -> None:
        self.depth, self.timeout, self.waits_for = depth, timeout, waits_for
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: Any) -> None:
        """Hand an item on, once there is room.

        Raises:
            Cancelled: nobody wants it any more.
        """
        with self._changed:
            self._wait(lambda: len(self._items) < self.depth, f"what follows {self.waits_for}")
            self._items.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """There are no more items; `error` is raised where the next one was to be taken."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of all items and of everybody who waits."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._changed:
            self._wait(lambda: bool(self._items) or self._ended, self.waits_for)
            if not self._items:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            item = self._items.popleft()
            self._changed.notify_all()
        return item

    def _wait(self, ready: Callable[[], bool], stage: str) -> None:
        end = time.monotonic() + self.timeout
        while not ready():
            if self._closed:
                raise Cancelled
            left = end - time.monotonic()
            if left <= 0:
                raise OverlapTimeoutError(
                    f"{stage} did not get on for {self.timeout:g} s; is a device or a decoder "
                    "stuck? A larger timeout= waits longer."
                )
            self._changed.wait(left)
        if self._closed:
            raise Cancelled
