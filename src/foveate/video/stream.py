"""Chunks of frames in order, decoded ahead of whoever takes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from foveate.errors import DamagedVideoError, DamagedVideoWarning
from foveate.video.frames import Damage, Frames

if TYPE_CHECKING:
    from foveate.video.parallel import Filled


class ChunkSource(Protocol):
    """Where a stream's chunks come from: threads, another process, or memory."""

    def __next__(self) -> Filled: ...

    def close(self) -> None: ...


class FrameStream(Iterator[Frames]):
    """An iterator of `Frames`, made by `Clip.stream`.

    Decoding starts with the first ``next`` and runs ahead on threads of its own until ``ahead``
    chunks are waiting, so it overlaps with whatever is done with the chunks; memory is
    ``ahead + 2`` chunks at most, however long the video is. A stream that is closed, used up,
    failed or forgotten leaves no thread and no open file behind. An error is raised once, by the
    ``next`` that meets it; the stream is over then.

    Example:
        >>> from foveate import Clip
        >>> clip = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8), fps=5)
        >>> with clip.stream(chunk=4) as stream:
        ...     [(len(frames), frames.seconds[0].item()) for frames in stream]
        [(4, 0.0), (4, 0.8), (2, 1.6)]
    """

    def __init__(
        self,
        source: ChunkSource,
        ranks: np.ndarray,
        chunk: int,
        build: Callable[[np.ndarray, Filled], Frames],
        *,
        strict: bool,
        name: str,
        stacklevel: int = 3,
    ) -> None:
        self._source = source
        self._ranks = ranks
        self._chunk = chunk
        self._build = build
        self._strict = strict
        self._name = name
        self._stacklevel = stacklevel
        self._given = 0

    @property
    def index(self) -> Tensor:
        """int64 [N], ranks of all frames that the stream gives, ascending."""
        return torch.from_numpy(self._ranks.astype(np.int64))

    def __len__(self) -> int:
        """Chunks in all."""
        return -(-len(self._ranks) // self._chunk)

    def __iter__(self) -> FrameStream:
        return self

    def __next__(self) -> Frames:
        filled = next(self._source)
        part = self._ranks[self._given : self._given + self._chunk]
        self._given += len(part)
        frames = self._build(part, filled)
        if frames.damage:
            self._report(frames.damage)
        return frames

    def close(self) -> None:
        """Stop decoding and let go of the file; a ``next`` in another thread ends its loop."""
        self._source.close()

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _report(self, damage: Damage) -> None:
        if self._strict:
            self.close()
            raise DamagedVideoError(damage.reason, source=self._name)
        # The level points at the caller of next(), sample(), at(), ...
        message = f"{self._name}: {damage.reason}"
        warnings.warn(message, DamagedVideoWarning, stacklevel=self._stacklevel)


class MemorySource:
    """Chunks of frames that are in memory already.

    Args:
        ranks: int64 [N].
        chunk: frames per chunk.
        fill: gives a chunk's frames.
    """

    def __init__(self, ranks: np.ndarray, chunk: int, fill: Callable[[np.ndarray], Any]) -> None:
        self._parts = iter(np.split(ranks, range(chunk, len(ranks), chunk)))
        self._fill = fill

    def __next__(self) -> Filled:
        from foveate.video.parallel import Filled

        part = next(self._parts)
        return Filled(self._fill(part), part.tolist(), ())

    def close(self) -> None:
        """Give nothing any more."""
        self._parts = iter(())
