"""`foveate.think`: a model first tells what the parts of a long video show, then answers.

Legend: T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from torch import nn

from foveate.attach import choose_frames
from foveate.checkpoints import own_scorer
from foveate.core import Method, Recipe
from foveate.video import Clip, Frames
from foveate.video.part import ClipPart, split_clip
from foveate.view.answer import Answer, ask, tokens_per_frame

#: What a part is asked; the wording is ours.
SUMMARISE = (
    "This is the segment of a longer video from {start} s to {end} s. Summarise what happens in it "
    "that helps to answer this question, and when: {question}"
)
#: The released form, which knows neither the question nor the times.
DESCRIBE = "Describe the video segment in detail."
#: Seconds from which on a video is cut into three parts in place of two, as released.
THREE_PARTS = 900.0


@dataclass(eq=False)
class Thought:
    """What a model told of one part of a video.

    Attributes:
        start, end: seconds of the whole video.
        asked: the prompt.
        answer: what was told and what it took; its report's times are those of the whole video.
    """

    start: float
    end: float
    asked: str
    answer: Answer

    @property
    def text(self) -> str:
        """What was told, without tags that would close the thought."""
        return self.answer.text.replace("<think>", "").replace("</think>", "").strip()

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {"start": self.start, "end": self.end, "asked": self.asked} | self.answer.as_dict()


@dataclass(eq=False)
class ThoughtfulAnswer(Answer):
    """An answer, and the thoughts that went before it; all figures are those of the answer alone.

    Attributes:
        thoughts: of the parts, in the order of time.
        asked: the prompt of the answer, thoughts and question.
    """

    thoughts: tuple[Thought, ...] = ()
    asked: str = ""

    @property
    def thinking_seconds(self) -> float:
        """Seconds that the thoughts took to generate."""
        return sum(thought.answer.total for thought in self.thoughts)

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        thoughts = [thought.as_dict() for thought in self.thoughts]
        return super().as_dict() | {
            "asked": self.asked,
            "seconds_of_thinking": self.thinking_seconds,
            "thoughts": thoughts,
        }


def think(
    model: nn.Module,
    processor: Any,
    source: Any,
    question: str,
    recipe: Recipe | Method | str | Iterable[Method] | None = None,
    *,
    parts: int | None = None,
    generic: bool = False,
    thought_tokens: int = 128,
    on_thought: Callable[[Thought], None] | None = None,
    max_new_tokens: int = 128,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> ThoughtfulAnswer:
    """Ask a model about a long video in steps: first about its parts, then about the whole.

    Every part is shown on its own, with as many frames and the same recipe as the whole, and
    summarised with the question in mind. The summaries stand in front of the question, between
    <think> and </think>, when the whole video is shown. Published for videos of ten minutes and
    more; it costs one call of `foveate.ask` per part on top.

    Args:
        model, processor, source, question, recipe: as in `foveate.ask`; `source` is a video.
        parts: parts that last equally long; None: 2, and 3 from 15 minutes on, as released. Of
            `Frames`, every part has as many of them as nearly as possible.
        generic: ask for a description in place of a summary for the question, and name no times,
            as the released code does; several questions about a video could share it.
        thought_tokens: longest summary of a part, in tokens; greedy decoding.
        on_thought: called with every `Thought` when it is finished.
        max_new_tokens, on_text: as in `foveate.ask`, of the answer.
        options: all others of `foveate.ask`: retain or tokens (of every call), frames (of every
            part and of the whole), companion, scorer, progress, hyper-parameters and so on.

    Returns:
        The `ThoughtfulAnswer`.

    Raises:
        VideoError: the clip cannot be read, or is too short for so many parts.
        FoveateError: the family takes no videos, or the recipe cannot act on the model.
        ValueError: a value is out of range, or `source` is a single picture.

    Example:
        >>> answer = foveate.think(model, processor, "film.mp4", "Who opens the door?",
        ...                        "divprune", retain=0.25)                     # doctest: +SKIP
        >>> [(thought.start, thought.end, thought.text) for thought in answer.thoughts]
        ...                                                                     # doctest: +SKIP

    Source: LVCoT of TDC (arXiv 2504.10443) and its released code.
    """
    _check(question, parts, thought_tokens, max_new_tokens)
    whole = source if isinstance(source, Frames) else Clip.open(source)
    if len(whole) < 2:
        raise ValueError("thinking in parts needs a video; this is a single picture, use ask().")
    thoughts = []
    for part, start, end in _parts(whole, parts):
        told = DESCRIBE
        if not generic:
            told = SUMMARISE.format(start=_seconds(start), end=_seconds(end), question=question)
        answer = ask(model, processor, part, told, recipe, max_new_tokens=thought_tokens, **options)
        if isinstance(part, ClipPart):
            for item in answer.report.items:
                if item.seconds is not None:
                    item.seconds = [second + part.offset for second in item.seconds]
        thoughts.append(Thought(start, end, told, answer))
        if on_thought is not None:
            on_thought(thoughts[-1])
    asked = f"<think>{join_thoughts(thoughts, generic)}</think>{question}"
    shown = _shown(model, processor, whole, question, recipe, **options)
    if shown is not whole:
        options = options | {"overlap": False}  # They are decoded already.
    answer = ask(
        model,
        processor,
        shown,
        asked,
        recipe,
        max_new_tokens=max_new_tokens,
        on_text=on_text,
        **options,
    )
    found = {field.name: getattr(answer, field.name) for field in fields(answer)}
    return ThoughtfulAnswer(**found, thoughts=tuple(thoughts), asked=asked)


def join_thoughts(thoughts: Iterable[Thought], generic: bool = False) -> str:
    """The thoughts in one line, with their times unless `generic`; empty ones are left out."""
    said = [thought for thought in thoughts if thought.text]
    if generic:
        return " ".join(thought.text for thought in said)
    return " ".join(
        f"From {_seconds(thought.start)} s to {_seconds(thought.end)} s: {thought.text}"
        for thought in said
    )


def _check(question: str, parts: int | None, thought_tokens: int, max_new_tokens: int) -> None:
    if not question.strip():
        raise ValueError("the question is empty.")
    if parts is not None and (isinstance(parts, bool) or not isinstance(parts, int) or parts < 1):
        raise ValueError(f"parts must be a whole number >= 1 (or None), got {parts!r}.")
    for name, value in (("thought_tokens", thought_tokens), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _parts(whole: Clip | Frames, parts: int | None) -> list[tuple[ClipPart | Frames, float, float]]:
    """The parts of a video, and from when to when they last."""
    if isinstance(whole, Clip):
        num = _num_parts(whole.info.duration) if parts is None else parts
        cut = split_clip(whole, num)
        return [(part, part.offset, part.offset + part.info.duration) for part in cut]
    num = _num_parts(float(whole.seconds[-1])) if parts is None else parts
    if num > len(whole):
        raise ValueError(f"{len(whole)} frames cannot be cut into {num} parts.")
    edges = [len(whole) * number // num for number in range(num + 1)]
    found = []
    for first, stop in pairwise(edges):
        here, last = slice(first, stop), min(stop, len(whole) - 1)
        # A choice made for the question says nothing of the parts.
        part = replace(
            whole,
            pixels=whole.pixels[here],
            seconds=whole.seconds[here],
            index=whole.index[here],
            plan=None,
        )
        found.append((part, float(part.seconds[0]), float(whole.seconds[last])))
    return found


def _num_parts(duration: float) -> int:
    return 3 if duration >= THREE_PARTS else 2


def _shown(
    model: nn.Module,
    processor: Any,
    whole: Clip | Frames,
    question: str,
    recipe: Any,
    *,
    frames: int = 16,
    retain: float | None = None,
    tokens: int | None = None,
    companion: Any = None,
    scorer: Any = None,
    **others: Any,
) -> Clip | Frames:
    """What is shown of the whole: frames are chosen by the question, not by the thoughts as well.

    They would drown it: a text encoder of CLIP reads 77 tokens.
    """
    if recipe is None or isinstance(whole, Frames):
        return whole
    known = {field.name for step in Recipe.of(recipe) for field in fields(step.method)}
    made = Recipe.of(recipe, **{k: v for k, v in others.items() if k in known})
    if not made.at("frames"):
        return whole
    return choose_frames(
        whole,
        made,
        question,
        frames,
        scorer=scorer or companion or own_scorer(model, processor),
        retain=retain,
        tokens=tokens,
        tokens_per_frame=tokens and tokens_per_frame(model, processor, whole, frames),
    )


def _seconds(second: float) -> str:
    return f"{second:.1f}".removesuffix(".0")
