"""Decoding overlaps encoding, and encoding overlaps the prefill of earlier chunks.

Two threads beside the caller's: one takes decoded chunks from their source, one prepares and
encodes them; the caller's thread runs the language model on each with the cache so far. What waits
between two of them is bounded. Where encoder and language model would only share the same cores,
the caller's thread does both in turn, and decoding alone runs ahead.

Legend: L tokens of the prompt, N tokens of a chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from foveate.attach.attachment import Attachment, refuse_hooked
from foveate.attach.overlap_channel import Cancelled, Channel
from foveate.attach.overlap_prompt import ChunkedPrompt, given_to, video_adapter
from foveate.attach.overlap_report import ReportJoiner
from foveate.attach.overlap_rules import chunk_recipe
from foveate.core import Budget, Recipe, Report
from foveate.core.timeline import Timeline
from foveate.errors import AttachmentError
from foveate.video.parallel import cores

#: Chunks that may wait before the encoder, and as many before the language model.
DEPTH = 2
#: Seconds without any progress after which a wait ends in an error.
TIMEOUT = 600.0
#: Seconds that a worker which was told to stop has at least to finish the chunk in its hands.
GRACE = 60.0

Progress = Callable[[str, int, int], None]


class _Encoded(NamedTuple):
    """Features of a chunk, and when a GPU will have them."""

    output: Any
    ready: Any


class OverlappedPrefill:
    """Reads the video of a prompt into a cache, chunk by chunk, and leaves the text behind it.

    `foveate.ask` does all of this by itself; this is for loops of your own. Between `run()` and the
    end of the `with` block `model.generate(**read.inputs)` goes on from the cache.

    Every layer of the language model attends to what earlier chunks left in its cache and to the
    whole present chunk; a recipe's cache stage then thins out that chunk's entries alone. Position
    ids are those of the full prompt. Chunks are decoded ahead, at most `depth` waiting, and
    encoded ahead, at most `depth` waiting; with the chunk that each worker has in hand that makes
    2 `depth` + 3 chunks in memory, beside what the source holds.

    Args:
        model: a video model whose frames can be encoded some at a time.
        prompt: `ChunkedPrompt.of(...)`, on the model's device.
        chunks: decoded chunks in order, one per chunk of the prompt, of any type; if it has
            `close()`, that is called at the end.
        prepare: turns one of them into the arguments of the model's feature method.
        recipe: methods of the patches, encoder, projector and cache stages; None: none.
        budget: of the recipe; an absolute count is shared out by the sizes of the chunks.
        depth: chunks that may wait between two workers; 0: no thread, one stage after another.
        encode_ahead: the encoder has a thread of its own; None: on a GPU, where it has a stream of
            its own as well, and on a CPU with more cores than torch uses for one operation.
        timeline: gets spans of the stages "encode" and "prefill", and "decode" where `chunks` does
            not note them itself (`notes_decode`).
        progress: called with a stage, how much is done and how much there is (frames; tokens).
        timeout: seconds without any progress after which a wait ends in an error.
        evidence: as in `foveate.reduce`.

    Raises:
        AttachmentError: the recipe needs the whole prompt at once, or the model carries a recipe.
        UnsupportedModelError: videos of this family cannot be encoded in chunks.
        ValueError: depth or timeout is out of range.

    Attributes:
        cache: keys and values so far.
        inputs: for `model.generate`: the whole prompt, its mask, the cache, and with M-RoPE the
            positions.
        report: the account of all chunks together, once `run()` is done.
        most_alive: most chunks that were decoded and not yet prefilled at one time.

    Example:
        >>> with OverlappedPrefill(model, prompt, chunks, prepare) as read:     # doctest: +SKIP
        ...     read.run()
        ...     ids = model.generate(**read.inputs, max_new_tokens=64)

    Source: QuickVideo, sections 3.2 and 3.3 (arXiv 2505.16175).
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: ChunkedPrompt,
        chunks: Iterator[Any],
        prepare: Callable[[Any], Mapping[str, Tensor]],
        recipe: Recipe | None = None,
        budget: Budget | None = None,
        *,
        depth: int = DEPTH,
        encode_ahead: bool | None = None,
        timeline: Timeline | None = None,
        progress: Progress | None = None,
        timeout: float = TIMEOUT,
        evidence: bool = False,
        notes_decode: bool = True,
    ) -> None:
        if depth < 0 or timeout <= 0:
            raise ValueError(
                f"depth must be at least 0 chunks and timeout above 0 s, got {depth}, {timeout}."
            )
        self.model: Any = model
        self.adapter = video_adapter(model)
        self.base: Any = self.adapter.base(model)
        self.prompt, self.chunks, self.prepare = prompt, chunks, prepare
        self.depth, self.timeout, self.notes_decode = depth, timeout, notes_decode
        self.timeline = Timeline() if timeline is None else timeline
        self.progress: Progress = progress or (lambda stage, done, total: None)
        recipe, self.notes = chunk_recipe(recipe)
        refuse_hooked(model)
        self.attachment: Attachment | None = None
        if recipe is not None:
            shared = _shared(budget or Budget(), prompt.num_visual)
            self.attachment = Attachment(model, recipe, shared, evidence=evidence)
        self.cache: Cache = DynamicCache(config=self.adapter.text_config(model))
        self.report = Report(type(model).__name__)
        self.most_alive = 0
        self._joiner = ReportJoiner(model, prompt)
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        spare = self._side is not None or cores() > torch.get_num_threads()
        self.encode_ahead = spare if encode_ahead is None else encode_ahead
        self._taken = self._read = 0
        self._count = threading.Lock()
        self._channels: list[Channel] = []
        self._threads: list[threading.Thread] = []

    @property
    def inputs(self) -> dict[str, Any]:
        """For `generate`, which prefills the text behind the video and goes on from there."""
        return self._inputs(self.prompt)

    def inputs_for(self, prompt: ChunkedPrompt) -> dict[str, Any]:
        """`inputs` of another prompt with the same video and another text behind it.

        What came behind the video so far (an earlier question and its answer) leaves the cache.

        Args:
            prompt: equal to the first one up to the last visual token.

        Raises:
            ValueError: it is not.
        """
        known = self.prompt.columns[-1][1]
        if not torch.equal(prompt.ids_1L[:, :known], self.prompt.ids_1L[:, :known]):
            raise ValueError(
                f"The new prompt differs from the old one within its first {known} tokens, which "
                "hold the video; only what stands behind the video may change."
            )
        behind = self.cache.get_seq_length() - known
        if behind > 0:
            self.cache.crop(-behind)
        return self._inputs(prompt)

    def _inputs(self, prompt: ChunkedPrompt) -> dict[str, Any]:
        ids = prompt.ids_1L
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "past_key_values": self.cache,
        }
        if prompt.rope_deltas is not None:
            # Of the full prompt, row of the text first: told by deltas alone, transformers would
            # number the text behind a video otherwise than in one go.
            text_11L = torch.arange(ids.shape[1], device=ids.device)[None, None]
            inputs["position_ids"] = torch.cat([text_11L, prompt.position_P1L])
            self.base.rope_deltas = prompt.rope_deltas
        return inputs

    # -- running --------------------------------------------------------------------------------

    def run(self) -> Cache:
        """Decode, encode and prefill all chunks; the cache then lacks the text behind the video.

        Raises:
            OverlapTimeoutError: a worker did not get on.
            Exception: what a worker raised, once, with a note on which chunk it was; the model is
                then as before and no thread is left.
        """
        encoded = self._encode(self._decode()) if self.depth == 0 else self._in_threads()
        done = False
        try:
            with torch.inference_mode():
                for part, features in enumerate(encoded):
                    with _about("prefill", part, len(self.prompt)):
                        self._prefill(part, features)
            if self._read != len(self.prompt):
                raise AttachmentError(
                    f"The prompt has {len(self.prompt)} chunks, {self._read} came."
                )
            self.report = self._joiner.report(self.notes)
            done = True
        finally:
            self._stop()
            if not done:
                self.close()
        return self.cache

    def _in_threads(self) -> Iterator[_Encoded]:
        frames = Channel(self.depth, self.timeout, "decoding")
        features = Channel(self.depth, self.timeout, "encoding")
        self._channels = [frames, features]
        self._start("foveate-decode", self._decode(), frames)
        if not self.encode_ahead:
            return self._encode(frames)
        self._start("foveate-encode", self._encode(frames), features)
        return iter(features)

    def _start(self, name: str, items: Iterator[Any], out: Channel) -> None:
        def work() -> None:
            try:
                for item in items:
                    out.put(item)
                out.end()
            except Cancelled:
                pass
            except BaseException as error:
                out.end(error)
            finally:
                items.close()  # type: ignore[attr-defined]

        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stop(self) -> None:
        """Let all workers go, and wait for them."""
        for channel in self._channels:
            channel.close()
        if not hasattr(self.chunks, "gi_frame"):  # a generator is closed by its own thread
            getattr(self.chunks, "close", lambda: None)()
        for thread in self._threads:
            thread.join(max(self.timeout, GRACE))
        self._threads, self._channels = [], []

    # -- the three workers ----------------------------------------------------------------------

    def _decode(self) -> Iterator[Any]:
        chunks, part = iter(self.chunks), 0
        try:
            while True:
                with _about("decode", part, len(self.prompt)):
                    start = self.timeline.now()
                    try:
                        frames = next(chunks)
                    except StopIteration:
                        return
                    if self.notes_decode:
                        self.timeline.add("decode", start, self.timeline.now(), part)
                with self._count:
                    self._taken += 1
                    self.most_alive = max(self.most_alive, self._taken - self._read)
                if self.notes_decode:
                    last = self.prompt.frames[min(part, len(self.prompt) - 1)][1]
                    self.progress("decode", last, self.prompt.num_frames)
                yield frames
                part += 1
        finally:
            if hasattr(chunks, "gi_frame"):
                chunks.close()  # type: ignore[attr-defined]

    def _encode(self, chunks: Iterator[Any]) -> Iterator[_Encoded]:
        method = getattr(self.base, self.adapter.feature_methods["video"])
        for part, frames in enumerate(chunks):
            if part >= len(self.prompt):
                raise AttachmentError(f"More than the prompt's {len(self.prompt)} chunks came.")
            with _about("encode", part, len(self.prompt)), torch.inference_mode():
                start = self.timeline.now()
                with self._beside():
                    inputs = {k: self._placed(v) for k, v in self.prepare(frames).items()}
                    del frames
                    self._watch(part)
                    output = method(**given_to(method, inputs), return_dict=True)
                    self._open_end(part, output)
                    ready = None
                    if self._side is not None:
                        ready = self._side.record_event()
                        ready.synchronize()
                self.timeline.add("encode", start, self.timeline.now(), part)
            self.progress("encode", self.prompt.frames[part][1], self.prompt.num_frames)
            encoded = _Encoded(output, ready)
            del inputs, output
            yield encoded
            del encoded

    def _prefill(self, part: int, encoded: _Encoded) -> None:
        start = self.timeline.now()
        first, last = self.prompt.columns[part]
        if encoded.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(encoded.ready)
        self.base(
            input_ids=self.prompt.ids_1L[:, first:last],
            position_ids=_rows(self.prompt.position_P1L[..., first:last]),
            past_key_values=self.cache,
            use_cache=True,
            mm_encoder_outputs={"video": encoded.output},
        )
        if self._side is not None:
            # Before the features go: the side stream would take their memory at once.
            torch.cuda.current_stream(self._device).synchronize()
        if self.attachment is not None:
            self._joiner.add(part, self.attachment.report, last - first)
        with self._count:
            self._read += 1
        self.timeline.add("prefill", start, self.timeline.now(), part)
        self.progress("prefill", last, self.prompt.ids_1L.shape[1])

    # -- helpers --------------------------------------------------------------------------------

    def _placed(self, value: Tensor) -> Tensor:
        dtype = self._dtype if value.is_floating_point() else value.dtype
        return value.to(self._device, dtype)

    def _beside(self) -> AbstractContextManager[Any]:
        """On a GPU, the stream of the encoder; it does not wait for the language model's."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _watch(self, part: int) -> None:
        """What records this chunk's layout must not expect the end of the video."""
        watch = None if self.attachment is None else self.attachment._watch
        if watch is not None:
            last = part == len(self.prompt) - 1
            watch.adapter = self.adapter if last else self.adapter.open_ended()

    def _open_end(self, part: int, output: Any) -> None:
        """Take off what the model puts behind the last frame, where it is not the last one."""
        grid, features = self.prompt.grids[part], output.pooler_output
        extra = sum(x.shape[:-1].numel() for x in _parts(features)) - grid.num_tokens
        if extra == 0:
            return
        if extra < 0 or part == len(self.prompt) - 1 or not isinstance(features, Tensor):
            raise AttachmentError(
                f"Chunk {part + 1} has {grid.num_tokens + extra} tokens where the prompt has "
                f"{grid.num_tokens}."
            )
        output.pooler_output = features[..., :-extra, :]

    # -- life cycle -----------------------------------------------------------------------------

    def close(self) -> None:
        """Stop everything and take the recipe off the model; calling it twice does no harm."""
        self._stop()
        if self.attachment is not None:
            self.attachment.remove()
            self.attachment = None

    def __enter__(self) -> OverlappedPrefill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _about:
    """Says of an error in a worker which chunk it was about."""

    def __init__(self, stage: str, part: int, total: int) -> None:
        self.words = f"while chunk {part + 1} of {total} was at the stage {stage!r}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, (Cancelled, GeneratorExit)):
            error.add_note(self.words)


def _shared(budget: Budget, num_visual: int) -> Budget:
    """A count of tokens for the whole video as the fraction that every chunk keeps."""
    if budget.num_samples is not None:
        raise ValueError("One clip takes one budget, not one per sample.")
    if budget.tokens is None:
        return budget
    return Budget(retain=min(1.0, int(budget.tokens) / num_visual))  # pyright: ignore


def _rows(position_P1L: Tensor) -> Tensor:
    """Position ids in the form that a model takes: [1, L] of text, [3, 1, L] with M-RoPE."""
    return position_P1L[0] if position_P1L.shape[0] == 1 else position_P1L


def _parts(features: Any) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)
