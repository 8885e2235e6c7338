"""What `foveate ask` does: a question about a clip, answered by a model under a recipe.

Legend: T frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from foveate.attach import reduce
from foveate.attach.encode_spans import encode_spans, settle
from foveate.attach.frame_choice import plan_frames
from foveate.checkpoints import own_scorer, prepare
from foveate.checkpoints.processors import sees_whole_frames
from foveate.core import Budget, FramePlan, Method, Recipe, Report
from foveate.core.timeline import Timeline
from foveate.errors import DamagedVideoWarning
from foveate.models.companion import Companion
from foveate.models.registry import adapter_for
from foveate.models.scorer import Scorer
from foveate.video import Clip, Frames
from foveate.video.sampling import sample_ranks
from foveate.view.decoding import DecodedChunks, join_frames
from foveate.view.overlap import CHUNK, Prefill, can_overlap, open_prefill
from foveate.view.sources import picture_sized
from foveate.view.timing import (
    Progress,
    make_clock,
    no_progress,
    peak_memory,
)


@dataclass(eq=False)
class Answer:
    """An answer and what it took.

    Attributes:
        text: the answer.
        report: the account of the reduction; empty when nothing was reduced.
        prompt_tokens: tokens of the prompt before reduction, text included.
        new_tokens: tokens of the answer.
        first_token: seconds from the start of generation to the first token (encoder included; with
            `overlap`, from the start of decoding).
        total: seconds of the whole generation.
        peak_memory: most bytes in use: of the GPU's memory in this call; on CPU of the process,
            over its whole life; None where the system does not tell.
        timeline: when each stage was at work, from the file to the last token.
    """

    text: str
    report: Report
    prompt_tokens: int
    new_tokens: int
    first_token: float
    total: float
    peak_memory: int | None = None
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def file_to_first_token(self) -> float:
        """Seconds from the call to the first token: choosing, decoding, encoding, prefill."""
        return max((s.stop for s in self.timeline.spans if s.stage == "prefill"), default=0.0)

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding after the first token; 0 when there was only one."""
        spent = self.total - self.first_token
        return (self.new_tokens - 1) / spent if self.new_tokens > 1 and spent > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "answer": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds_to_first_token": self.first_token,
            "seconds_from_file_to_first_token": self.file_to_first_token,
            "seconds": self.total,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory,
            "timeline": self.timeline.as_dict(),
            "report": self.report.as_dict(),
        }


def ask(
    model: nn.Module,
    processor: Any,
    source: Any,
    question: str,
    recipe: Recipe | Method | str | Iterable[Method] | None = None,
    *,
    retain: float | None = None,
    tokens: int | None = None,
    frames: int = 16,
    max_new_tokens: int = 128,
    on_text: Callable[[str], None] | None = None,
    companion: Companion | None = None,
    scorer: Scorer | None = None,
    progress: Progress | None = None,
    overlap: bool | None = None,
    chunk: int = CHUNK,
    evidence: bool = True,
    **arguments: Any,
) -> Answer:
    """Ask a model about a clip or picture, with or without a recipe on it.

    Args:
        model: a transformers vision-language model of a known family.
        processor: its processor; `load_model` gives both.
        source: what `foveate.Clip` takes, a clip, or `Frames`; one frame counts as an image.
        question: in words.
        recipe: as in `foveate.reduce`; None leaves the model untouched.
        retain: fraction of visual tokens kept, in (0, 1].
        tokens: absolute count kept instead.
        frames: frames taken evenly; clips with fewer give all they have. A method of the frames
            stage chooses in their place (not where `source` is `Frames` already).
        max_new_tokens: longest answer, in tokens; greedy decoding.
        on_text: called with each piece of the answer as it comes.
        companion: as in `foveate.reduce`.
        scorer: as in `foveate.choose_frames`; default: the companion, else the model itself is
            asked of each frame (`foveate.AskingScorer`, or, where it reads no letters,
            `foveate.AnsweringScorer`).
        progress: called with a stage ("choose", "decode", "encode", "prefill", "answer"), how much
            of it is done and how much there is: frames, frames, frames, tokens of the prompt,
            tokens of the answer (of which there may be fewer). Stages that overlap call it from
            threads of their own.
        overlap: decode and encode chunks of the clip while the language model reads earlier ones
            (see docs/overlap.md); None: where `source` is still to be decoded, there are at least
            two chunks, and family and recipe allow it with the same answer but for rounding (or,
            for "quickvideo", the answer of the published system).
        chunk: frames of such a chunk, and QuickVideo's group.
        evidence: collect what the recipe's methods go by for the report's pictures, as in
            `foveate.reduce`; the time for it counts to the first token.
        arguments: hyper-parameters of the recipe's methods.

    Returns:
        The `Answer`; its report's items know their frames' times.

    Raises:
        VideoError: the clip cannot be read.
        FoveateError: the family takes no videos, or the recipe cannot act on the model.
        ValueError: a value is out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not question.strip():
        raise ValueError("the question is empty.")
    made = None if recipe is None else Recipe.of(recipe, **arguments)
    budget = {"retain": retain, "tokens": tokens}
    timeline, tell = Timeline(), progress or no_progress
    taken = source if isinstance(source, Frames) else None
    if taken is None:
        clip = Clip.open(source)
        index, plan = _chosen(
            clip,
            made,
            question,
            frames,
            model,
            processor,
            scorer or companion,
            budget,
            timeline,
            tell,
        )
        if overlap is None:
            overlap = companion is None and can_overlap(model, processor, made, len(index), chunk)
        if overlap and len(index) > 1:  # one frame is an image
            read = open_prefill(
                model,
                processor,
                clip,
                index,
                question,
                made,
                Budget(retain, tokens),
                plan=plan,
                chunk=chunk,
                progress=tell,
                timeline=timeline,
                evidence=evidence,
            )
            return _after_prefill(read, processor, max_new_tokens, on_text, tell)
        taken = _decoded(clip, index, plan, timeline, tell)
    elif overlap:
        raise ValueError(
            "overlap=True decodes while the model reads, and these frames are decoded already: "
            "give the file or clip instead, with frames=."
        )
    with timeline.span("encode"):
        inputs = _prepared(model, processor, taken, question)
    with ExitStack() as stack:
        shown = len(taken)
        done = partial(tell, "encode", shown, shown)
        stack.enter_context(encode_spans(model, timeline, done))
        run = None
        if made is not None:
            run = reduce(model, made, evidence=evidence, companion=companion, **budget)
            stack.callback(run.remove)
            run.plans = [] if taken.plan is None else [taken.plan]
        tell("encode", 0, len(taken))
        answer = _generate(model, processor, inputs, max_new_tokens, on_text, timeline, tell)
        if run is not None:
            answer.report = run.report
    answer.report.timeline = timeline
    if len(answer.report.items) == 1 and len(taken) > 1:
        (item,) = answer.report.items
        item.seconds = taken.seconds.tolist()
        if sees_whole_frames(processor):
            # In their own proportions and resolution, not as the encoder gets them.
            item.pixels = lambda: picture_sized(taken.pixels)
    if taken.damage:
        answer.report.notes.append(taken.damage.reason)
    return answer


def _after_prefill(
    read: Prefill,
    processor: Any,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None,
    tell: Progress,
) -> Answer:
    """Read a clip chunk by chunk, and answer."""
    with read:
        begin = read.timeline.now()
        inputs = read.run().inputs
        model = read.engine.model
        answer = _generate(
            model, processor, inputs, max_new_tokens, on_text, read.timeline, tell, begin
        )
    report = answer.report = read.report
    if not sees_whole_frames(processor):
        for item in report.items:
            item.pixels = None
    return answer


def _decoded(
    clip: Clip, index: list[int], plan: FramePlan | None, timeline: Timeline, tell: Progress
) -> Frames:
    """All chosen frames, decoded one chunk after another."""
    clip._checked_size(None, len(index))  # All of them lie in memory at once.
    with warnings.catch_warnings(), DecodedChunks(clip, index, timeline, tell) as chunks:
        # Damage is recorded with the frames.
        warnings.simplefilter("ignore", DamagedVideoWarning)
        return join_frames(chunks, len(index), plan)


def _chosen(
    clip: Clip,
    recipe: Recipe | None,
    question: str,
    frames: int,
    model: nn.Module,
    processor: Any,
    scorer: Scorer | None,
    budget: dict[str, Any],
    timeline: Timeline,
    tell: Progress,
) -> tuple[list[int], FramePlan | None]:
    """Ranks of the frames that are shown, and the plan of the method that chose them, if any."""
    if recipe is None or not recipe.at("frames"):
        return sample_ranks(len(clip), min(frames, len(clip))).tolist(), None
    tokens = budget["tokens"]
    with timeline.span("choose"):
        index_K, plan = plan_frames(
            clip,
            recipe,
            question,
            frames,
            scorer=scorer or own_scorer(model, processor),
            tokens_per_frame=tokens and tokens_per_frame(model, processor, clip, frames),
            progress=lambda done, total: tell("choose", done, total),
            **budget,
        )
    return index_K.tolist(), plan


def _prepared(
    model: nn.Module, processor: Any, taken: Frames, question: str
) -> dict[str, torch.Tensor]:
    """Inputs of the model, on its device."""
    inputs = prepare(processor, taken, question, is_image=len(taken) == 1)
    inputs.pop("batch_num_images", None)
    parameter = next(model.parameters())
    return {k: _placed(v, parameter) for k, v in inputs.items() if isinstance(v, torch.Tensor)}


def tokens_per_frame(model: nn.Module, processor: Any, clip: Clip, frames: int) -> float:
    """Visual tokens of a frame of this clip, counted on as many black ones."""
    num = min(frames, len(clip))
    pixels = torch.zeros(num, 3, clip.info.height, clip.info.width, dtype=torch.uint8)
    index = torch.arange(num)
    black = Frames(pixels, index.double(), index)
    ids = prepare(processor, black, "?", is_image=num == 1)["input_ids"]
    adapter: Any = adapter_for(model)
    tokens = adapter.placeholder_ids(model)
    return sum(int((ids == token).sum()) for token in set(tokens.values())) / num


def _placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)


def _generate(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    max_new_tokens: int,
    on_text: Callable[[str], None] | None,
    timeline: Timeline,
    tell: Progress,
    begin: float | None = None,
) -> Answer:
    device = inputs["input_ids"].device
    prompt = inputs["input_ids"].shape[1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def on_token(number: int) -> None:
        if number == 1:
            tell("prefill", prompt, prompt)
        tell("answer", number, max_new_tokens)

    clock = make_clock(processor.tokenizer, timeline, on_text, on_token)
    start = timeline.now()
    begin = start if begin is None else begin
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock
        )
    settle(device)
    end = timeline.now()
    first = end if clock.first is None else clock.first
    encoded = max((s.stop for s in timeline.spans if s.stage == "encode"), default=start)
    timeline.add("prefill", max(start, encoded), first)
    timeline.add("answer", first, end)
    return Answer(
        processor.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).strip(),
        Report(type(model).__name__),
        prompt,
        int(ids.shape[1]) - prompt,
        first - begin,
        end - begin,
        peak_memory(device),
        timeline,
    )
