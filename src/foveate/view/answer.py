"""What `foveate ask` does: a question about a clip, answered by a model under a recipe.

Legend: T frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foveate.attach import choose_frames, reduce
from foveate.checkpoints import AskingScorer, prepare, sample_frames
from foveate.checkpoints.processors import sees_whole_frames
from foveate.core import Method, Recipe, Report
from foveate.errors import UnsupportedModelError
from foveate.models.companion import Companion
from foveate.models.registry import adapter_for
from foveate.models.scorer import Scorer
from foveate.video import Clip, Frames
from foveate.view.sources import picture_sized


@dataclass(eq=False)
class Answer:
    """An answer and what it took.

    Attributes:
        text: the answer.
        report: the account of the reduction; empty when nothing was reduced.
        prompt_tokens: tokens of the prompt before reduction, text included.
        new_tokens: tokens of the answer.
        first_token: seconds from the start of generation to the first token (encoder included).
        total: seconds of the whole generation.
        peak_memory: most bytes in use: of the GPU's memory in this call; on CPU of the process,
            over its whole life; None where the system does not tell.
    """

    text: str
    report: Report
    prompt_tokens: int
    new_tokens: int
    first_token: float
    total: float
    peak_memory: int | None = None

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
            "seconds": self.total,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory,
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
            asked of each frame (`foveate.AskingScorer`).
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
    if isinstance(source, Frames):
        taken = source
    elif made is None or not made.at("frames"):
        taken = sample_frames(source, frames)
    else:
        clip = Clip.open(source)
        taken = choose_frames(
            clip,
            made,
            question,
            frames,
            scorer=scorer or companion or _asking(model, processor),
            tokens_per_frame=tokens and _tokens_per_frame(model, processor, clip, frames),
            **budget,
        )
    inputs = prepare(processor, taken, question, is_image=len(taken) == 1)
    parameter = next(model.parameters())
    inputs = {name: _placed(value, parameter) for name, value in inputs.items()}
    inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    inputs.pop("batch_num_images", None)
    run = None
    if made is not None:
        run = reduce(model, made, evidence=True, companion=companion, **budget)
        run.plans = [] if taken.plan is None else [taken.plan]
    try:
        answer = _generate(model, processor, inputs, max_new_tokens, on_text)
        if run is not None:
            answer.report = run.report
    finally:
        if run is not None:
            run.remove()
    if len(answer.report.items) == 1 and len(taken) > 1:
        (item,) = answer.report.items
        item.seconds = taken.seconds.tolist()
        if sees_whole_frames(processor):
            # In their own proportions and resolution, not as the encoder gets them.
            item.pixels = lambda: picture_sized(taken.pixels)
    if taken.damage:
        answer.report.notes.append(taken.damage.reason)
    return answer


def _asking(model: nn.Module, processor: Any) -> Scorer | None:
    """The model as its own scorer, if it can be asked."""
    kind = "video" if getattr(processor, "image_token", None) is None else "image"
    try:
        return AskingScorer(model, processor, kind=kind)
    except UnsupportedModelError:
        return None


def _tokens_per_frame(model: nn.Module, processor: Any, clip: Clip, frames: int) -> float:
    """Visual tokens of a frame of this clip, counted on as many black ones."""
    num = min(frames, len(clip))
    pixels = torch.zeros(num, 3, clip.info.height, clip.info.width, dtype=torch.uint8)
    index = torch.arange(num)
    black = Frames(pixels, index.double(), index)
    ids = prepare(processor, black, "?", is_image=num == 1)["input_ids"]
    adapter: Any = adapter_for(model)
    tokens = adapter.placeholder_ids(model)
    return sum(int((ids == token).sum()) for token in set(tokens.values())) / num


def _placed(value: Any, like: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)


def _generate(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    max_new_tokens: int,
    on_text: Callable[[str], None] | None,
) -> Answer:
    device = inputs["input_ids"].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = _make_clock(processor.tokenizer, on_text)
    begin = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock
        )
    total = time.perf_counter() - begin
    prompt = inputs["input_ids"].shape[1]
    text = processor.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).strip()
    return Answer(
        text,
        Report(type(model).__name__),
        prompt,
        int(ids.shape[1]) - prompt,
        (clock.first or time.perf_counter()) - begin,
        total,
        _peak_memory(device),
    )


def _make_clock(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    from transformers import TextStreamer

    class Clock(TextStreamer):
        """Hands text on as it comes and notes when the first token did."""

        first: float | None = None

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt and self.first is None:
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text and on_text is not None:
                on_text(text)

    return Clock(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
