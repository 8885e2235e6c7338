"""`foveate.choose_frames`: the frames stage of a recipe, before a clip is decoded for the model.

Legend: F frames of a clip, K chosen ones.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.attach.looks import Looks
from foveate.core import Budget, FramePlan, FramesContext, Method, Recipe
from foveate.errors import DamagedVideoWarning
from foveate.models.scorer import Scorer
from foveate.video import Clip, Frames
from foveate.video.sampling import sample_ranks


def choose_frames(
    clip: Any,
    recipe: Recipe | Method | str | Iterable[Method],
    question: str = "",
    frames: int = 16,
    *,
    scorer: Scorer | None = None,
    retain: float | None = None,
    tokens: int | None = None,
    tokens_per_frame: float | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Frames:
    """Take the frames of a clip that a recipe's frames-stage method chooses.

    The choice goes by the packet table; nothing is decoded before it but the small copies that a
    scorer looks at. Those, and what the scorer made of them, are kept as long as clip and scorer
    live, so pass the same `Clip` for several questions.

    Args:
        clip: a `foveate.Clip` or what it takes.
        recipe: as in `foveate.reduce`; one of its methods may act at the frames stage. Where none
            does, or its budget is 1, the frames lie evenly.
        question: in words, for methods that go by it.
        frames: frames that the model is shown without a recipe.
        scorer: tells how well frames fit the question: `foveate.Companion`,
            `foveate.AskingScorer`, or any `foveate.Scorer`.
        retain: fraction of visual tokens kept by the whole recipe, in (0, 1].
        tokens: absolute count kept instead.
        tokens_per_frame: of the model; only methods that spend a count of tokens on whole frames
            need it.
        seed: for methods that draw random numbers.
        arguments: hyper-parameters of the recipe's methods.

    Returns:
        The frames in the order of time; `plan` says why these. Hand it to the attachment for the
        later stages: `run.plans = [frames.plan]`.

    Raises:
        VideoError: the clip cannot be read.
        MissingSignalError: the method needs a scorer.
        ValueError: a value is out of range, or the method chose frames that are not there.

    Example:
        >>> clip = Clip(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), fps=2)
        >>> class Recent:
        ...     size, probabilities = (8, 8), True
        ...     def relevance(self, pixels_T3hw, question):
        ...         return torch.linspace(0, 1, len(pixels_T3hw))
        >>> taken = choose_frames(clip, "quota", "Why?", 4, scorer=Recent(), retain=0.5)
        >>> taken.index.tolist(), taken.plan.method
        ([0, 7, 15, 23, 31, 39], 'quota')
    """
    opened = Clip.open(clip)
    index_K, plan = plan_frames(
        opened,
        recipe,
        question,
        frames,
        scorer=scorer,
        retain=retain,
        tokens=tokens,
        tokens_per_frame=tokens_per_frame,
        seed=seed,
        **arguments,
    )
    with warnings.catch_warnings():
        # Damage is recorded with the frames.
        warnings.simplefilter("ignore", DamagedVideoWarning)
        return replace(opened.take(index_K.tolist()), plan=plan)


def plan_frames(
    clip: Clip,
    recipe: Recipe | Method | str | Iterable[Method],
    question: str = "",
    frames: int = 16,
    *,
    scorer: Scorer | None = None,
    retain: float | None = None,
    tokens: int | None = None,
    tokens_per_frame: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> tuple[Tensor, FramePlan | None]:
    """`choose_frames` without taking them: for whoever decodes them in another way.

    Args:
        progress: called with how many frames the scorer has looked at, and how many it was asked
            for.

    Returns:
        Ranks, int64 [K], ascending, and the plan; None where no method chose and they lie evenly.

    Raises:
        VideoError: the clip cannot be read.
        MissingSignalError: the method needs a scorer.
        ValueError: a value is out of range, or the method chose frames that are not there.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ValueError(f"frames must be a whole number >= 1, got {frames!r}.")
    made, begin = Recipe.of(recipe, **arguments), time.perf_counter()
    budgets = made.budgets(Budget(retain, tokens))
    acting = [index for index in made.at("frames") if not budgets[index].is_full]
    plan = None
    if acting:
        step = made.steps[acting[0]]
        budget = budgets[acting[0]]
        if budget.num_samples is not None:
            raise ValueError("One clip takes one budget; choose the frames of each sample alone.")
        context = _context(clip, budget, step.method, question, frames, scorer, progress)
        context.seed, context.stages = seed, step.stages
        context.tokens_per_frame = tokens_per_frame
        with torch.no_grad():
            plan = step.method.frames(context)
        if plan is not None:
            plan = _checked(plan, step.method, len(clip))
            plan = replace(plan, spent=time.perf_counter() - begin)
            return plan.index_K, plan
    ranks = sample_ranks(len(clip), min(frames, len(clip)))
    return torch.from_numpy(ranks.astype("int64")), None


def _context(
    clip: Clip,
    budget: Budget,
    method: Method,
    question: str,
    frames: int,
    scorer: Scorer | None,
    progress: Callable[[int, int], None] | None,
) -> FramesContext:
    """What the method may know: the packet table, and what a scorer sees when it is asked."""
    info = clip.info
    keyframe_F = torch.zeros(len(clip), dtype=torch.bool)
    keyframe_F[info.keyframe_index] = True
    context = FramesContext(
        budget=budget,
        method=method.name,
        frames=frames,
        seconds_F=clip.seconds,
        duration=info.duration,
        keyframe_F=keyframe_F,
        bytes_F=info.packet_bytes,
        question=question,
    )
    if scorer is not None:
        looks = Looks(clip, scorer, progress)
        context.relevance = lambda index_n: looks.relevance(index_n, question)
        context.embeddings = looks.embeddings
        context.probabilities = bool(scorer.probabilities)
    return context


def _checked(plan: FramePlan, method: Method, num: int) -> FramePlan:
    last = int(plan.index_K[-1])
    if last >= num:
        raise ValueError(f"{method.name} chose frame {last} of a clip of {num} frames.")
    return replace(plan, method=method.name, num_candidates=num)
