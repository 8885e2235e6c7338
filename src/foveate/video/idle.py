"""Open containers waiting to be read again: opening costs as much as decoding some ten frames."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from typing import Any

# Each holds a file descriptor and a decoder.
_MOST = 4


class IdleContainers:
    """The containers used last, at most one of each source, closed when their source is gone.

    A forked process forgets them: it shares their place in the file with its parent, and the
    threads of their decoders do not exist there.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._forgotten: list[Any] = []
        self._watched: weakref.WeakSet[Any] = weakref.WeakSet()
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._idle: OrderedDict[int, Any] = OrderedDict()

    def _forget(self) -> None:
        # Closing would wait for threads that were not forked, so they are left as they are.
        self._forgotten.append(self._idle)
        self._reset()

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, source: object) -> Any | None:
        """The open container of a source, if there is one; it is the caller's now."""
        with self._lock:
            return self._idle.pop(id(source), None)

    def put(self, source: object, container: Any) -> None:
        """Keep a container until its source is gone or others have been used more lately.

        Anything with a ``close`` will do.
        """
        with self._lock:
            surplus = [self._idle.pop(id(source), None)]
            if source not in self._watched:
                self._watched.add(source)
                weakref.finalize(source, self._drop, id(source)).atexit = False
            self._idle[id(source)] = container
            if len(self._idle) > self._most:
                surplus.append(self._idle.popitem(last=False)[1])
        for old in surplus:
            if old is not None:
                old.close()

    def _drop(self, key: int) -> None:
        with self._lock:
            container = self._idle.pop(key, None)
        if container is not None:
            container.close()


IDLE = IdleContainers()
