"""Chunks of a clip's chosen frames, decoded with a word on how far it is, and put together again.

Legend: T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from foveate.core import FramePlan
from foveate.core.timeline import Timeline
from foveate.video import Clip, Damage, Frames
from foveate.view.timing import Progress

#: Frames between two words on how far decoding is.
DECODE_CHUNK = 32


class DecodedChunks(Iterator[Frames]):
    """Frames of a clip a chunk at a time; what was waited for is noted as the stage "decode".

    Decoding runs ahead in the background, so that a chunk which was ready takes no time here.

    Args:
        clip: where they come from.
        index: ranks, ascending, each once.
        timeline: gets a span per chunk.
        progress: told ("decode", frames so far, frames in all).
        chunk: frames per chunk.
        ahead: chunks that may wait for the caller, beside the one in the making.

    Attributes:
        damage: what was lost so far.

    Raises:
        VideoError: the clip cannot be read.
    """

    def __init__(
        self,
        clip: Clip,
        index: Sequence[int],
        timeline: Timeline,
        progress: Progress,
        chunk: int = DECODE_CHUNK,
        ahead: int = 1,
    ) -> None:
        self.total, self.done, self.part = len(index), 0, 0
        self.timeline, self.progress, self.chunk = timeline, progress, chunk
        self.damage = Damage(0)
        self._stream = clip.stream(index=index, chunk=min(chunk, self.total), ahead=ahead)
        progress("decode", 0, self.total)

    def __next__(self) -> Frames:
        if self.done >= self.total:
            raise StopIteration
        with self.timeline.span("decode", self.part if self.total > self.chunk else -1):
            frames = next(self._stream)
        self.done, self.part = self.done + len(frames), self.part + 1
        self.damage = join_damage([self.damage, frames.damage])
        self.progress("decode", self.done, self.total)
        return frames

    def close(self) -> None:
        """Stop decoding and let go of the file; may be called from another thread."""
        self._stream.close()

    def __enter__(self) -> DecodedChunks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def join_frames(chunks: Iterable[Frames], total: int, plan: FramePlan | None = None) -> Frames:
    """Chunks as one, without holding any pixel twice for long.

    Args:
        chunks: in order, of one size.
        total: frames of all of them.
        plan: how they were chosen.
    """
    taken: list[Frames] = []
    pixels_T3HW: Tensor | None = None
    first = 0
    for frames in chunks:
        if len(frames) == total:
            return replace(frames, plan=plan)
        if pixels_T3HW is None:
            pixels_T3HW = frames.pixels.new_empty((total, *frames.pixels.shape[1:]))
        pixels_T3HW[first : first + len(frames)] = frames.pixels
        first += len(frames)
        taken.append(replace(frames, pixels=frames.pixels[:0]))
    assert pixels_T3HW is not None and first == total
    return Frames(
        pixels_T3HW,
        torch.cat([frames.seconds for frames in taken]),
        torch.cat([frames.index for frames in taken]),
        join_damage(frames.damage for frames in taken),
        plan,
    )


def join_damage(parts: Iterable[Damage]) -> Damage:
    """What was lost of several chunks of one file."""
    found = list(parts)
    return Damage(
        sum(damage.requested for damage in found),
        {rank: shown for damage in found for rank, shown in damage.replaced.items()},
        tuple(rank for damage in found for rank in damage.suspect),
        max((damage.lost_frames for damage in found), default=0),
    )
