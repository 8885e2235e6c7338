"""`foveate.Stream`: watch frames as they come, ask at any time, in bounded memory.

Legend: T frames, H, W pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach.stream_recall import RecallEngine
from foveate.attach.streaming import StreamEngine, split_recipe, stream_modality
from foveate.checkpoints import frame_inputs, prompt_around
from foveate.core import Budget, Method, Modality, Recipe
from foveate.core.stream import Recall, RecallMemory, StreamMemory
from foveate.errors import FoveateError
from foveate.models.companion import Companion
from foveate.video import Clip, Frames, Live


class StreamError(FoveateError, RuntimeError):
    """A stream was used in a state in which it cannot be: closed, or before its first frame."""


@dataclass(frozen=True)
class StreamState:
    """What a stream remembers at the moment.

    Attributes:
        seconds: times of the remembered frames, oldest first; where a model joins frames in pairs
            (Qwen-VL), one for each pair, that of its first frame.
        pushed: frames seen so far.
        slots: tokens in the cache of every layer, the system prompt among them.
        num_bytes: keys and values of all layers, and the summaries of a memory that is asked.
    """

    seconds: tuple[float, ...]
    pushed: int
    slots: int
    num_bytes: int


@dataclass(frozen=True)
class StreamClip:
    """A stretch of a stream that a question called back ("video_streaming").

    Attributes:
        start, end: times of its first and last frame, in seconds.
        relevance: how well it fits the question, a cosine.
        evidence: how much of its attention the end of the question paid to it; the clips of an
            answer add up to 1.
        running: it is the newest stretch, not finished yet, which is always called back.
    """

    start: float
    end: float
    relevance: float
    evidence: float
    running: bool


@dataclass(frozen=True)
class StreamAnswer:
    """An answer from the past of a stream.

    Attributes:
        text: the answer.
        seconds: times of the frames that were remembered when it was given, oldest first; one for
            each pair where frames are joined, see `StreamState`.
        evidence: how the end of the question spread its attention over those frames; adds up to 1.
        new_tokens: tokens of the answer.
        first_token: seconds from the question to the first token of the answer.
        total: seconds in all.
        clips: what the answer was read from, in the order of time, where a question calls clips
            back; `seconds` are then those of their frames.
    """

    text: str
    seconds: tuple[float, ...]
    evidence: tuple[float, ...]
    new_tokens: int
    first_token: float
    total: float
    clips: tuple[StreamClip, ...] = ()


class Stream:
    """A model that watches an endless video; a context manager.

    Frames are read a few at a time beside what is remembered of earlier ones, which the recipe
    bounds; a question is answered from the memory and leaves no trace in it. Several threads may
    share a stream (a camera's pushes, a user's asks): calls wait for each other.

    Args:
        model: LLaVA, LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA, Qwen2-VL or Qwen2.5-VL of
            transformers, under the attention "sdpa" or "eager".
        processor: its processor.
        recipe: a method with a memory ("videoscan"; "video_streaming", whose clips a question
            calls back), methods of the encoder and projector stages that shorten every group of
            frames ("divprune"), or both joined by +. Without a memory of its own, and for None, a
            stream remembers all tokens of the most recent frames.
        capacity: frames (pairs of them for Qwen-VL) at which the memory is full (of "videoscan"
            one less is left, as published); clips for "video_streaming"; None: the method's own, 64
            for the most recent frames.
        retain: fraction of every group's tokens that the shortening methods keep, in (0, 1].
        tokens: absolute count per group instead.
        group: most frames that are read in one go; results do not depend on it, but for methods
            that shorten a group as a whole.
        fps: frames a second, for frames pushed without times.
        renumber: turn cached keys to contiguous positions when they are read; None: as the memory
            was published (not for "videoscan").
        say_times: tell the model the times of the remembered frames (of the clips that were called
            back) before every question.
        companion: a CLIP-like model in whose space questions are compared with clips; None: that
            of the language model's embeddings. Only for a memory that is asked.
        arguments: hyper-parameters of the methods.

    Raises:
        UnsupportedModelError: the frames of this family cannot be read one by one (text or tiles
            between them).
        AttachmentError: a method cannot act in a stream, or the model carries a recipe already.
        UnknownModelError: no adapter knows the model, or its prompt shows no video.
        ValueError: recipe or a number is out of range.

    Example:
        >>> import foveate
        >>> from foveate.world import World
        >>> model, processor = foveate.embedded()
        >>> clip = World(seed=0, frames=8).sample(0).frames_THWC
        >>> with foveate.Stream(model, processor, "videoscan", capacity=4) as stream:
        ...     stream.push(clip.transpose(0, 3, 1, 2), seconds=range(8))
        ...     answer = stream.ask("what is blue ?")
        ...     len(answer.seconds), stream.memory.pushed
        (3, 8)

    Source: the streaming loop of VideoScan (arXiv 2503.09387), for any memory.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        recipe: Recipe | Method | str | Iterable[Method] | None = "videoscan",
        *,
        capacity: int | None = None,
        retain: float | None = None,
        tokens: int | None = None,
        group: int = 8,
        fps: float = 1.0,
        renumber: bool | None = None,
        say_times: bool = False,
        companion: Companion | None = None,
        **arguments: Any,
    ) -> None:
        if group < 1:
            raise ValueError(f"group must be at least 1 frame, got {group}.")
        if fps <= 0:
            raise ValueError(f"fps must be above 0, got {fps}.")
        made = None if recipe is None else Recipe.of(recipe, **arguments)
        memory, rest = split_recipe(made, capacity, model)
        self.model, self.processor = model, processor
        self.group, self.fps, self.say_times = group, fps, say_times
        self._kind: Modality = stream_modality(model)
        before, _ = prompt_around(processor, self._kind, "?")
        budget = Budget(retain, tokens)
        self._engine: StreamEngine | None = _engine_of(
            model, before, memory, rest, budget, renumber, companion
        )
        self._lock = threading.RLock()
        self._seconds: dict[int, float] = {}
        self._last: float | None = None
        # An odd frame of a model that joins pairs waits here for its partner.
        self._odd: tuple[Tensor, float] | None = None

    # -- watching -------------------------------------------------------------------------------

    def push(self, frames: Any, seconds: Iterable[float] | None = None) -> None:
        """Watch some more frames.

        Args:
            frames: uint8 [T, 3, H, W] or [3, H, W], a tensor or array; or `Frames`, which have
                times of their own.
            seconds: when each is shown, ascending and behind all pushed before; None: `fps` goes
                on.

        Raises:
            StreamError: the stream is closed.
            ValueError: shape, dtype or times are not as above.
        """
        pixels_T3HW, times = self._checked(frames, seconds)
        with self._lock:
            engine = self._open()
            if times is None:
                first = 0.0 if self._last is None else self._last + 1 / self.fps
                times = [first + number / self.fps for number in range(len(pixels_T3HW))]
            if self._last is not None and times[0] <= self._last:
                raise ValueError(
                    f"The first new frame is at {times[0]} s, the last one was at {self._last} s; "
                    "times go on from push to push (follow() has start=)."
                )
            if self._odd is not None:
                odd_3HW, second = self._odd
                self._odd = None
                if odd_3HW.shape == pixels_T3HW.shape[1:]:
                    pixels_T3HW = torch.cat([odd_3HW[None].to(pixels_T3HW), pixels_T3HW])
                    times = [second, *times]
                else:
                    # Frames of another size are no partners.
                    self._read(engine, odd_3HW.expand(engine.joined, -1, -1, -1), [second])
            whole = len(pixels_T3HW) // engine.joined * engine.joined
            step = max(self.group // engine.joined, 1) * engine.joined
            for at in range(0, whole, step):
                part = slice(at, min(at + step, whole))
                self._last = times[part][-1]
                self._read(engine, pixels_T3HW[part], times[part][:: engine.joined])
            if whole < len(pixels_T3HW):
                self._last = times[-1]
                self._odd = pixels_T3HW[-1].clone(), times[-1]

    def _read(self, engine: StreamEngine, pixels_T3HW: Tensor, times: list[float]) -> None:
        """Read frames of which each (or each pair) has a time."""
        self._seconds |= dict(enumerate(times, engine.num_frames))
        inputs = frame_inputs(self.processor, self._kind, pixels_T3HW)
        if isinstance(engine, RecallEngine):
            engine.push(inputs, times, pixels_T3HW)
        else:
            engine.push(inputs, times)
        if len(self._seconds) > len(engine.frames):
            self._seconds = {number: self._seconds[number] for number in engine.frames}

    @contextmanager
    def _odd_read(self, engine: StreamEngine) -> Iterator[None]:
        """Read the frame that waits for its partner beside itself, and forget that afterwards.

        Processors double the last frame of a clip with an odd number of them, too.
        """
        if self._odd is None:
            yield
            return
        pixels_3HW, second = self._odd
        seconds = dict(self._seconds)
        with engine.aside():
            self._read(engine, pixels_3HW.expand(engine.joined, -1, -1, -1), [second])
            try:
                yield
            finally:
                self._seconds = seconds

    def follow(
        self,
        source: Any,
        *,
        fps: float | None = None,
        start: float = 0.0,
        live: bool = False,
        **options: Any,
    ) -> Iterator[float]:
        """Watch a source chunk by chunk, decoding ahead; gives the newest time after each.

        Ask between the chunks, or from another thread.

        Args:
            source: what `foveate.Clip` takes, a clip, a `foveate.Live`, a `FrameStream`, or any
                iterator or list of `Frames`.
            fps: frames a second to take of a path, clip or live source; None: the stream's.
            start: seconds added to the source's own times.
            live: the source is what `foveate.Live` takes: an address, "-" for standard input, a
                pipe, a file that is being written (``growing=True``).
            options: of `foveate.Live`.

        Raises:
            StreamError: the stream is closed.
            VideoError: the source cannot be read.
            ValueError: options without ``live``.

        Example:
            >>> for second in stream.follow("street.mp4", fps=1):          # doctest: +SKIP
            ...     print(second, stream.ask("Is the road clear?").text)
        """
        with self._lock:
            self._open()
        if options and not live:
            raise ValueError(f"{', '.join(options)} are for live sources: give live=True, too.")
        if live and not isinstance(source, Live):
            source = Live(source, self.fps if fps is None else fps, **options)
        elif isinstance(source, Frames):
            source = [source]
        if isinstance(source, Iterator | list | tuple):
            chunks: Iterable[Frames] = source
        else:
            clip = source if isinstance(source, Clip) else Clip(source)
            chunks = clip.stream(self.fps if fps is None else fps, chunk=self.group)
        try:
            for frames in chunks:
                self.push(frames.pixels, (frames.seconds + start).tolist())
                yield float(frames.seconds[-1]) + start
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    # -- asking ---------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 128,
        on_text: Callable[[str], None] | None = None,
    ) -> StreamAnswer:
        """Answer from what is remembered; the stream goes on as if nobody had asked.

        Args:
            question: in words.
            max_new_tokens: longest answer; greedy decoding.
            on_text: called with the whole text so far at every new token.

        Raises:
            StreamError: the stream is closed, or no frame was pushed yet.
            ValueError: the question is empty, or the answer has no room.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if not question.strip():
            raise ValueError("the question is empty.")
        with self._lock, ExitStack() as stack:
            engine = self._open()
            if not engine.frames and self._odd is None:
                raise StreamError("No frame is remembered yet: push() some before asking.")
            begin = time.perf_counter()
            stack.enter_context(self._odd_read(engine))
            _, ids = prompt_around(self.processor, self._kind, question)
            numbers, recalled, read = engine.frames, None, engine.answer
            if isinstance(engine, RecallEngine):
                recalled = engine.recall(ids)
                numbers = recalled.number_L.unique().tolist()
                read = partial(engine.answer, recalled=recalled)
            seconds = tuple(self._seconds[number] for number in numbers)
            if self.say_times:
                now = self._last or 0.0
                if recalled is None:
                    said = describe_times(seconds, now)
                else:
                    said = describe_clips(self._clips(recalled, numbers), now)
                _, ids = prompt_around(self.processor, self._kind, f"{said} {question}")
            first: list[float] = []
            so_far: list[int] = []

            def note(token: int) -> None:
                if not first:
                    first.append(time.perf_counter() - begin)
                so_far.append(token)
                if on_text is not None:
                    on_text(self._decode(so_far))

            new, evidence = read(ids, max_new_tokens, note)
            total = time.perf_counter() - begin
            clips = () if recalled is None else self._clips(recalled, numbers, evidence)
        return StreamAnswer(
            self._decode(new),
            seconds,
            tuple(evidence),
            len(new),
            first[0] if first else total,
            total,
            clips,
        )

    def _clips(
        self, recalled: Recall, numbers: Sequence[int], evidence: Sequence[float] = ()
    ) -> tuple[StreamClip, ...]:
        """What was called back, with the times and the attention of its frames."""
        share = dict(zip(numbers, evidence, strict=False))
        return tuple(
            StreamClip(
                self._seconds[clip.first],
                self._seconds[clip.last],
                clip.relevance,
                sum(share.get(number, 0.0) for number in range(clip.first, clip.last + 1)),
                clip.running,
            )
            for clip in recalled.clips
        )

    @property
    def memory(self) -> StreamState:
        """What is remembered at the moment."""
        with self._lock:
            engine = self._open()
            seconds = tuple(self._seconds[number] for number in engine.frames)
            pushed = engine.num_frames * engine.joined + (self._odd is not None)
            return StreamState(seconds, pushed, engine.cache.length, engine.num_bytes)

    # -- life cycle -----------------------------------------------------------------------------

    def close(self) -> None:
        """Forget everything and leave the model as it was; calling it twice does no harm."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def __enter__(self) -> Stream:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self._engine
        state = "closed" if engine is None else f"{len(engine.frames)} of {engine.num_frames}"
        return f"<foveate.Stream on {type(self.model).__name__}, {state} frames remembered>"

    def _open(self) -> StreamEngine:
        if self._engine is None:
            raise StreamError("This stream is closed; start another.")
        return self._engine

    def _decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _checked(
        self, frames: Any, seconds: Iterable[float] | None
    ) -> tuple[Tensor, list[float] | None]:
        if isinstance(frames, Frames):
            pixels = frames.pixels
            seconds = frames.seconds.tolist() if seconds is None else seconds
        else:
            pixels = torch.as_tensor(frames)
        pixels = pixels[None] if pixels.dim() == 3 else pixels
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
            raise ValueError(
                f"frames must be uint8 [T, 3, H, W], got {pixels.dtype} {list(pixels.shape)}."
            )
        if len(pixels) == 0:
            raise ValueError("push() needs at least one frame.")
        if seconds is None:
            return pixels, None
        times = [float(second) for second in seconds]
        if len(times) != len(pixels):
            raise ValueError(f"{len(times)} times for {len(pixels)} frames.")
        if any(late <= early for early, late in pairwise(times)):
            raise ValueError(f"seconds must be ascending, got {times}.")
        return pixels, times


def _engine_of(
    model: nn.Module,
    before: Tensor,
    memory: StreamMemory | RecallMemory,
    rest: Recipe | None,
    budget: Budget,
    renumber: bool | None,
    companion: Companion | None,
) -> StreamEngine:
    """The engine that a memory needs."""
    if isinstance(memory, RecallMemory):
        if renumber is not None:
            raise ValueError(
                "renumber says at which positions cached keys are read; this memory keeps none, "
                "what it calls back is read anew: leave it out."
            )
        return RecallEngine(model, before, memory, rest, budget, companion)
    if companion is not None:
        raise ValueError(
            "companion compares questions with clips, and this memory is not asked; take "
            '"video_streaming", or leave it out.'
        )
    return StreamEngine(model, before, memory, rest, budget, renumber)


def describe_clips(clips: Sequence[StreamClip], now: float) -> str:
    """The sentence that tells a model what time the clips that it is shown are from.

    Example:
        >>> clip = StreamClip(16.0, 31.0, 0.5, 0.0, False)
        >>> describe_clips([clip], 99.0)
        'The video has lasted 99.00 seconds so far. The clips you see are from 16.00s to 31.00s.'
    """
    times = ", ".join(f"from {clip.start:.2f}s to {clip.end:.2f}s" for clip in clips)
    return f"The video has lasted {now:.2f} seconds so far. The clips you see are {times}."


def describe_times(seconds: Sequence[float], now: float) -> str:
    """The sentence that tells a model when the frames it remembers were shown.

    Example:
        >>> describe_times([0.0, 4.0], 9.0)
        'The video has lasted 9.00 seconds so far. The frames you see are at 0.00s, 4.00s.'
    """
    times = ", ".join(f"{second:.2f}s" for second in seconds)
    return f"The video has lasted {now:.2f} seconds so far. The frames you see are at {times}."
