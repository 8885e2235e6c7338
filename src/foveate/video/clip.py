"""A video to take frames from: the first stage of every pipeline.

Legend: T frames given out; C colour channels (3); H, W pixels in display orientation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from foveate.errors import FrameRequestError, FrameTooLargeError
from foveate.video import sampling
from foveate.video.decode import PyAVReader, Reader
from foveate.video.facts import file_facts, memory_facts
from foveate.video.frames import Damage, Frames
from foveate.video.isolate import IsolatedReader, Limits
from foveate.video.memory import pixels_from
from foveate.video.parallel import DecodeStream, Filled, cores
from foveate.video.resize import resize
from foveate.video.source import TIMEOUT_SECONDS, MediaSource
from foveate.video.stream import ChunkSource, FrameStream, MemorySource

Size = tuple[int, int]
MAX_PIXELS = 64 << 20
MAX_BYTES = 16 << 30


class Clip:
    """A video file, or frames in memory, that gives out frames with their times.

    Opening lists the packets (0.4 % of the cost of decoding) and decodes one picture, for its
    rotation. Seconds count from the first frame; frames are numbered by presentation order, never
    by rate arithmetic, so variable rates, reordering and late starts need no care. Frames are
    upright (the container's rotation is applied); non-square pixels are not stretched.

    Args:
        source: path, bytes, binary file object (read from its beginning); uint8 tensor [T, 3, H, W]
            or numpy array [T, H, W, 3], or either as floats in 0..1; or a list of PIL images.
        fps: frames per second of frames in memory (1 unless given); files carry their own times.
        max_pixels: largest picture, in pixels, that is decoded; checked before any decoding.
        max_bytes: most memory for the frames of one request.
        threads: decoding threads in all, 0 for one per core (16 at most). They are spread over
            decoders that work side by side where the file allows it.
        timeout: seconds without any progress after which waiting for a decoder ends in an error.
        isolate: decode in a process of its own, for files that cannot be trusted; True or `Limits`.
            What it takes and how long is limited, and it may crash without harm to the caller.
        reader: another decoder in place of PyAV; `source` is then not looked at.

    Attributes:
        info: facts about the video.
        name: of the file, or what the frames came as.
        position: seconds of the last frame given out, by whatever request; 0 before the first.
            For displays of how far a long request is.

    Raises:
        VideoError: of the subclass that says what is wrong; see `foveate.errors`.
        MissingDependencyError: the source is a file and PyAV is not installed.

    Example:
        >>> clip = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8), fps=5)
        >>> clip.info.duration, len(clip)
        (2.0, 10)
        >>> clip.sample(3).seconds.tolist()
        [0.0, 0.8, 1.8]
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes | BinaryIO | Tensor | np.ndarray | list[Any],
        *,
        fps: float | None = None,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        threads: int = 0,
        timeout: float = TIMEOUT_SECONDS,
        isolate: bool | Limits = False,
        reader: Reader | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._threads = _checked_threads(threads)
        self._timeout = timeout
        self.position = 0.0
        self._pixels_TCHW: Tensor | None = None if reader else pixels_from(source)
        self._reader: Reader | IsolatedReader | None = reader
        if self._pixels_TCHW is not None:
            self._table, self.info = memory_facts(self._pixels_TCHW, 1.0 if fps is None else fps)
            self.name = f"{type(source).__name__} of {len(self)} frames"
            return
        if fps is not None:
            raise FrameRequestError(
                "fps is for frames in memory; files carry their times (use clip.uniform(fps=...) "
                "to take frames at a rate)"
            )
        if self._reader is None:
            media = MediaSource(source)  # type: ignore[arg-type]
            self.name = media.name
            if isolate:
                limits = isolate if isinstance(isolate, Limits) else Limits()
                self._reader = IsolatedReader(
                    media, limits, max_pixels=max_pixels, threads=self._threads
                )
            else:
                self._reader = PyAVReader(media, max_pixels=max_pixels, threads=self._threads)
        else:
            self.name = type(self._reader).__name__
        scan = self._reader.scan()
        self._table = scan.table
        self.info = file_facts(scan, self.name)

    @classmethod
    def open(cls, source: Any, **options: Any) -> Clip:
        """The same as ``Clip(source, **options)``; a clip is given back as it is."""
        return source if isinstance(source, Clip) else cls(source, **options)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"Clip({self.name!r}, {info.width}x{info.height}, {info.duration:.3f} s, "
            f"{info.num_frames} frames at {info.frame_rate:.3f}/s, {info.codec})"
        )

    @property
    def seconds(self) -> Tensor:
        """float64 [F], when each frame is first shown."""
        return torch.from_numpy(self._table.seconds_F.copy())

    def sample(
        self,
        n: int,
        *,
        policy: sampling.Policy = "ends",
        allow_repeat: bool = False,
        size: Size | None = None,
        strict: bool = False,
    ) -> Frames:
        """Take n frames spread evenly over the clip.

        Args:
            n: number of frames.
            policy: "ends" (first and last frame included) or "centers"; see
                `foveate.video.sampling.sample_ranks`.
            allow_repeat: let n exceed the number of frames.
            size: (height, width) to scale to while converting (one fast bicubic call per
                frame, for files); None keeps full size and exact pixels.
            strict: raise instead of standing in for frames that do not decode.

        Raises:
            FrameRequestError: n is no whole number, below 1, or more than there are.
            FrameTooLargeError: the result would take more than ``max_bytes``.
            DamagedVideoError: nothing decodes, or anything is lost and ``strict`` is set.

        Example:
            >>> Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8)).sample(4).index.tolist()
            [0, 3, 6, 9]
        """
        ranks = sampling.sample_ranks(len(self), n, policy=policy, allow_repeat=allow_repeat)
        return self._read(ranks, size, strict)

    def at(
        self, seconds: float | Iterable[float], *, size: Size | None = None, strict: bool = False
    ) -> Frames:
        """Take the frames on screen at these seconds (counted from the first frame), in that order.

        Raises:
            FrameRequestError: a time lies outside of [0, duration).

        Example:
            >>> clip = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8), fps=5)
            >>> clip.at([1.5, 0.1]).index.tolist()
            [7, 0]
        """
        times = sampling.check_seconds(seconds, self.info.duration)
        return self._read(self._table.shown_at(times), size, strict)

    def take(
        self, index: int | Iterable[int], *, size: Size | None = None, strict: bool = False
    ) -> Frames:
        """Take frames by rank (0-based, presentation order), in the order given.

        Raises:
            FrameRequestError: an index is not in [0, len(clip)).
        """
        return self._read(sampling.check_ranks(index, len(self)), size, strict)

    def uniform(self, fps: float, *, size: Size | None = None, strict: bool = False) -> Frames:
        """Take the frames on screen at 0, 1/fps, 2/fps, ... seconds, each once.

        Raises:
            FrameRequestError: fps is not a positive number.

        Example:
            >>> clip = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8), fps=5)
            >>> clip.uniform(fps=1).index.tolist()
            [0, 5]
        """
        return self._read(self._at_rate(fps), size, strict)

    def stream(
        self,
        fps: float | None = None,
        *,
        index: Iterable[int] | None = None,
        chunk: int = 32,
        ahead: int = 2,
        size: Size | None = None,
        strict: bool = False,
    ) -> FrameStream:
        """Give all frames (or some) in order, a chunk at a time, decoding ahead in the background.

        Each chunk has its own damage report.

        Args:
            fps: as in `uniform`; None gives every frame.
            index: in place of a rate, ranks of frames, strictly ascending.
            chunk: frames per chunk (the last may be shorter).
            ahead: finished chunks that may wait for the caller, beside the one in the making; 0
                decodes no more than one chunk ahead.
            size: as in `sample`.
            strict: as in `sample`.

        Raises:
            FrameRequestError: chunk is below 1, ahead is negative, fps is not positive, or index is
                given with fps or is not ascending.

        Example:
            >>> clip = Clip(torch.zeros(10, 3, 4, 6, dtype=torch.uint8))
            >>> [len(frames) for frames in clip.stream(chunk=4)]
            [4, 4, 2]
        """
        if sampling.whole(chunk, "chunk") < 1:
            raise FrameRequestError(f"chunk must be at least 1 frame, got {chunk}")
        if sampling.whole(ahead, "ahead") < 0:
            raise FrameRequestError(f"ahead must be at least 0 chunks, got {ahead}")
        if fps is not None and index is not None:
            raise FrameRequestError("give either fps or index, not both")
        if index is not None:
            ranks = sampling.check_ranks(index, len(self))
            if np.any(np.diff(ranks) <= 0):
                raise FrameRequestError(
                    "index of a stream must be strictly ascending; take() gives any order"
                )
        else:
            ranks = np.arange(len(self)) if fps is None else self._at_rate(fps)
        size = self._checked_size(size, min(chunk, len(ranks)))
        return self._stream(ranks, chunk, ahead, size, strict)

    def __iter__(self) -> FrameStream:
        """Every frame, one at a time."""
        return self.stream(chunk=1, ahead=8)

    def _at_rate(self, fps: float) -> np.ndarray:
        table = self._table
        return sampling.rate_ranks(table.seconds_F, table.duration, table.slack, fps)

    def _read(self, ranks: np.ndarray, size: Size | None, strict: bool) -> Frames:
        """Decode each distinct rank once, then put them in the order asked for."""
        distinct, order = np.unique(ranks, return_inverse=True)
        size = self._checked_size(size, len(ranks))
        stream = self._stream(distinct, len(distinct), 0, size, strict, stacklevel=5)
        with stream:
            frames = next(stream)
        if np.array_equal(distinct, ranks):
            return frames
        order_T = torch.from_numpy(order.astype(np.int64))
        return Frames(
            frames.pixels[order_T.to(frames.pixels.device)],
            frames.seconds[order_T],
            frames.index[order_T],
            frames.damage,
        )

    def _stream(
        self,
        ranks: np.ndarray,
        chunk: int,
        ahead: int,
        size: Size,
        strict: bool,
        stacklevel: int = 3,
    ) -> FrameStream:
        """Frames of ascending distinct ranks, converted straight into one buffer per chunk."""
        source: ChunkSource
        if self._pixels_TCHW is not None:
            source = MemorySource(ranks, chunk, lambda part: self._from_memory(part, size))
        elif isinstance(self._reader, IsolatedReader):
            source = self._reader.stream(ranks, chunk, ahead, size, self._timeout)
        else:
            assert self._reader is not None
            source = DecodeStream(
                self._reader,
                self._table,
                ranks.tolist(),
                size=size,
                chunk=chunk,
                ahead=ahead,
                threads=self._threads,
                timeout=self._timeout,
                name=self.name,
            )
        return FrameStream(
            source,
            ranks,
            chunk,
            self._frames,
            strict=strict,
            name=self.name,
            stacklevel=stacklevel,
        )

    def _from_memory(self, ranks: np.ndarray, size: Size) -> Tensor:
        assert self._pixels_TCHW is not None
        index_T = torch.from_numpy(ranks.astype(np.int64))
        pixels_TCHW = self._pixels_TCHW[index_T.to(self._pixels_TCHW.device)]
        if size != tuple(pixels_TCHW.shape[-2:]):
            pixels_TCHW = resize(pixels_TCHW, size)
        return pixels_TCHW

    def _frames(self, ranks: np.ndarray, filled: Filled) -> Frames:
        replaced = {
            rank: shown
            for rank, shown in zip(ranks.tolist(), filled.shown, strict=True)
            if shown != rank
        }
        damage = Damage(len(ranks), replaced, filled.suspect, self.info.lost_frames)
        self.position = float(self._table.seconds_F[ranks[-1]])
        pixels: Any = filled.pixels_nCHW
        return Frames(
            torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels,
            torch.from_numpy(self._table.seconds_F[ranks]),
            torch.from_numpy(ranks.astype(np.int64)),
            damage,
        )

    def _checked_size(self, size: Size | None, count: int) -> Size:
        if size is None:
            size = (self.info.height, self.info.width)
        try:
            height, width = (sampling.whole(value, "height and width") for value in size)
        except (TypeError, ValueError) as error:
            raise FrameRequestError(
                f"size must be (height, width) in pixels, got {size!r}"
            ) from error
        if height < 1 or width < 1:
            raise FrameRequestError(f"size must be at least (1, 1) pixels, got {size!r}")
        needed = 3 * height * width * count
        if needed > self._max_bytes:
            raise FrameTooLargeError(
                f"{count} frames of {width}x{height} pixels take {needed / 2**30:.1f} GiB, more "
                f"than max_bytes allows ({self._max_bytes / 2**30:.1f} GiB); take fewer, pass "
                "size=(height, width), or read them with clip.stream()",
                source=self.name,
            )
        return height, width


def _checked_threads(threads: int) -> int:
    if sampling.whole(threads, "threads") < 0:
        raise FrameRequestError(f"threads must be 0 (one per core) or more, got {threads}")
    return min(threads, 16) or cores()
