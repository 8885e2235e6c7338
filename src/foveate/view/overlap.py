"""`foveate.prefill`: a clip is decoded, encoded and prefilled at the same time, then asked about.

Legend: T frames, L tokens of a prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach.frame_plans import note_plans
from foveate.attach.overlap import DEPTH, TIMEOUT, OverlappedPrefill
from foveate.attach.overlap_prompt import ChunkedPrompt, video_adapter
from foveate.attach.overlap_rules import chunk_recipe
from foveate.checkpoints.chunks import ChunkPreparer
from foveate.core import Budget, FramePlan, Method, Recipe, Report
from foveate.core.timeline import Timeline
from foveate.errors import AttachmentError, DamagedVideoWarning, FoveateError
from foveate.video import Clip
from foveate.video.sampling import sample_ranks
from foveate.view.decoding import DecodedChunks
from foveate.view.sources import small_pictures
from foveate.view.timing import Progress, no_progress

#: Frames of a chunk, as QuickVideo's accuracy runs have them.
CHUNK = 16


class Prefill:
    """A clip in a model's cache; made by `foveate.prefill`, a context manager.

    Attributes:
        inputs: for `model.generate`: the prompt, its mask and the cache.
        report: the account of the reduction.
        timeline: when each stage was at work.
        seconds: float64 [T], when each frame is shown.
        engine: the `OverlappedPrefill`.
    """

    def __init__(
        self,
        engine: OverlappedPrefill,
        preparer: ChunkPreparer,
        clip: Clip,
        index: Sequence[int],
        plan: FramePlan | None,
        recipe: Recipe | None,
    ) -> None:
        self.engine, self.timeline = engine, engine.timeline
        self.index_T = torch.tensor(index)
        self.seconds = clip.seconds[self.index_T]
        self._preparer, self._clip, self._plan, self._recipe = preparer, clip, plan, recipe
        self.report = Report(type(engine.model).__name__)

    def run(self) -> Prefill:
        """Read the whole clip; `foveate.prefill` has done it."""
        with warnings.catch_warnings():
            # Damage is noted in the report. From here, for filters belong to all threads.
            warnings.simplefilter("ignore", DamagedVideoWarning)
            self.engine.run()
        report = self.report = self.engine.report
        if report.items:
            note_plans(report, self._recipe or Recipe(()), [self._plan])
        if len(report.items) == 1:
            (item,) = report.items
            item.seconds = self.seconds.tolist()
            clip, index = self._clip, self.index_T.tolist()
            # Decoded again, and only if somebody looks: they are not kept in memory.
            item.pixels = lambda: small_pictures(clip, index)
        chunks: Any = self.engine.chunks
        if chunks.damage:
            report.notes.append(chunks.damage.reason)
        report.timeline = self.timeline
        return self

    @property
    def inputs(self) -> dict[str, Any]:
        """For `model.generate`."""
        return self.engine.inputs

    def inputs_for(self, question: str) -> dict[str, Any]:
        """The same for another question about the clip, which is not read again."""
        inputs = self._preparer.prompt(self.seconds, self.index_T, question)
        return self.engine.inputs_for(_cut(self.engine.model, inputs, self.engine.prompt.frames))

    def close(self) -> None:
        """Take the recipe off the model; calling it twice does no harm."""
        self.engine.close()

    def __enter__(self) -> Prefill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def prefill(
    model: nn.Module,
    processor: Any,
    source: Any,
    question: str,
    recipe: Recipe | Method | str | Iterable[Method] | None = None,
    *,
    retain: float | None = None,
    tokens: int | None = None,
    frames: int = 16,
    chunk: int = CHUNK,
    depth: int = DEPTH,
    encode_ahead: bool | None = None,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    **arguments: Any,
) -> Prefill:
    """Read a clip into a model's cache, decoding and encoding ahead of the language model.

    `foveate.ask` does this and answers; take this for generation of your own, or several questions.

    Args:
        model: LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA, Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        processor: its processor.
        source: what `foveate.Clip` takes, or a clip.
        question: in words; what stands behind the video. More of them: `inputs_for`.
        recipe: "quickvideo", or other methods of the patches, encoder, projector and cache stages
            (frames: see `foveate.choose_frames`); None: none.
        retain: fraction of visual tokens kept, in (0, 1].
        tokens: absolute count kept instead.
        frames: frames taken evenly; clips with fewer give all they have.
        chunk: frames read at a time, and QuickVideo's group; rounded up to whole temporal patches.
        depth: chunks that may wait between two stages; 0: one stage after another, no threads.
        encode_ahead: the encoder works on the next chunks while the language model reads; None: on
            a GPU, and on a CPU with more cores than torch uses for one operation. Decoding runs
            ahead in any case.
        timeout: seconds without any progress after which a wait ends in an error.
        progress: called with a stage, how much is done and how much there is.
        arguments: hyper-parameters of the methods.

    Returns:
        The `Prefill`, read; the recipe stays on the model until it is closed.

    Raises:
        VideoError: the clip cannot be read.
        FoveateError: family or recipe cannot be read chunk by chunk.
        ValueError: a value is out of range.

    Example:
        >>> import foveate
        >>> from foveate.world import World
        >>> model, processor = foveate.embedded()
        >>> clip = World(seed=0, frames=8).sample(0).frames_THWC
        >>> asked = (model, processor, clip, "what is blue ?")
        >>> with foveate.prefill(*asked, frames=8, chunk=4) as read:
        ...     ids = model.generate(**read.inputs, max_new_tokens=2)
        ...     again = model.generate(**read.inputs_for("what is red ?"), max_new_tokens=2)
        >>> [span.stage for span in read.timeline.spans].count("prefill")
        2
    """
    made = None if recipe is None else Recipe.of(recipe, **arguments)
    clip = Clip.open(source)
    if made is not None and made.at("frames"):
        raise AttachmentError(
            f"{made} chooses frames by the question: use foveate.ask(..., overlap=True), which "
            "lets it, or take the frames yourself."
        )
    index = sample_ranks(len(clip), min(frames, len(clip))).tolist()
    read = open_prefill(
        model,
        processor,
        clip,
        index,
        question,
        made,
        Budget(retain, tokens),
        chunk=chunk,
        depth=depth,
        encode_ahead=encode_ahead,
        timeout=timeout,
        progress=progress,
    )
    return read.run()


def open_prefill(
    model: nn.Module,
    processor: Any,
    clip: Clip,
    index: Sequence[int],
    question: str,
    recipe: Recipe | None,
    budget: Budget,
    *,
    plan: FramePlan | None = None,
    chunk: int = CHUNK,
    depth: int = DEPTH,
    encode_ahead: bool | None = None,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
    evidence: bool = True,
) -> Prefill:
    """A `Prefill` of chosen frames that has not begun to read."""
    video_adapter(model)
    tell = progress or no_progress
    timeline = Timeline() if timeline is None else timeline
    size = (clip.info.height, clip.info.width)
    preparer = ChunkPreparer(processor, len(index), size)
    index_T = torch.tensor(index)
    inputs = preparer.prompt(clip.seconds[index_T], index_T, question)
    prompt = _cut(model, inputs, [(0, min(chunk, len(index))), (0, len(index))])
    step = prompt.frames[0][1]
    # One chunk in the making and none beside it: the engine's own queue is what waits.
    chunks = DecodedChunks(clip, index, timeline, tell, step, ahead=0)
    try:
        engine = OverlappedPrefill(
            model,
            prompt,
            chunks,
            lambda taken: preparer.chunk(taken.pixels),
            recipe,
            budget,
            depth=depth,
            encode_ahead=encode_ahead,
            timeline=timeline,
            progress=tell,
            timeout=timeout,
            evidence=evidence,
            notes_decode=False,
        )
    except BaseException:
        chunks.close()
        raise
    return Prefill(engine, preparer, clip, index, plan, recipe)


def _cut(
    model: nn.Module, inputs: dict[str, Tensor], frames: Sequence[tuple[int, int]]
) -> ChunkedPrompt:
    """The prompt on the model's device, with chunks as long as the first of `frames`."""
    device = next(model.parameters()).device
    # Pixels of the prompt are shapes alone: moving them would fill the device with zeros.
    text = {k: v if k.startswith("pixel_values") else v.to(device) for k, v in inputs.items()}
    return ChunkedPrompt.of(model, text, frames[-1][1], frames[0][1])


def can_overlap(
    model: nn.Module, processor: Any, recipe: Recipe | None, num_frames: int, chunk: int
) -> bool:
    """Whether a clip can be read in several chunks with the answer that it has in one go.

    Or with the one that a system was published with: QuickVideo's groups are read so.
    """
    if num_frames <= chunk or getattr(processor, "video_processor", None) is None:
        return False
    try:
        video_adapter(model)
        ChunkPreparer(processor, num_frames, (64, 64))
        return not chunk_recipe(recipe)[1]
    except FoveateError:
        return False
