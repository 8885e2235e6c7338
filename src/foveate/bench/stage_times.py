"""Seconds from a file to an answer, stage by stage, as somebody pays who asks for the first time.

Every measurement opens the clip anew: the packet scan and the decoding of frames count as "decode",
all that a scorer decodes and looks at as "choose", preprocessing and the vision tower as "encode".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from foveate.attach import Attachment
from foveate.attach.encode_spans import encode_spans
from foveate.bench.generation import Generator
from foveate.bench.inputs import taken_frames
from foveate.bench.suite import Item
from foveate.checkpoints import open_clip
from foveate.core import Recipe
from foveate.core.timeline import TIMED_STAGES, Timeline

#: Seconds after which no further turn is begun; every question is asked once in any case.
PATIENCE = 20.0
Attach = Callable[[], AbstractContextManager[Attachment | None]]


def stage_seconds(
    generator: Generator,
    items: Sequence[Item],
    recipe: Recipe | None,
    retain: float,
    attach: Attach,
    repeats: int,
    *,
    seed: int = 0,
    chooses: bool = True,
) -> dict[str, float]:
    """Median seconds per question of each stage.

    Args:
        generator: the model.
        items: questions, each about another clip.
        recipe: for the choice of frames; None: of the untouched model.
        retain: its budget.
        attach: puts the recipe on the model.
        repeats: turns over all questions; fewer where they take long; 0 measures nothing.
        seed: of methods that draw at random.
        chooses: whether the recipe's frames stage is used.

    Returns:
        stage -> seconds, in the order of `TIMED_STAGES`; a stage that did nothing has 0. Empty
        without repeats.
    """
    found: dict[str, list[float]] = {stage: [] for stage in TIMED_STAGES}
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - begin > PATIENCE:
            break
        for item in items:
            used = recipe if chooses else None
            seconds = _asked(generator, item, used, retain, attach, seed).seconds()
            for stage, values in found.items():
                values.append(seconds.get(stage, 0.0))
    return {stage: statistics.median(values) for stage, values in found.items() if values}


def _asked(
    generator: Generator,
    item: Item,
    recipe: Recipe | None,
    retain: float,
    attach: Attach,
    seed: int,
) -> Timeline:
    """When each stage of one question was at work."""
    prompts, timeline = generator.prompts, Timeline()
    ranks = plan = None
    with timeline.span("decode"):
        clip = open_clip(item.video)
    if recipe is not None and recipe.at("frames"):
        with timeline.span("choose"):
            index_K, plan = prompts.choose(clip, item, recipe, retain, seed)
            ranks = index_K.tolist()
    with timeline.span("decode"):
        taken = taken_frames(clip, ranks, prompts.frames)
    with timeline.span("encode"):
        sequences, visual = prompts.split(taken, item)
        inputs = {name: value.to(prompts.device) for name, value in (sequences | visual).items()}
    with attach() as run:
        if run is not None and plan is not None:
            run.plans = [plan]
        with encode_spans(generator.model, timeline):
            _generate(generator, inputs, timeline)
    return timeline


class _FirstToken:
    """Notes when the first new token reached the host, by the hook that streams text."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.calls, self.first = timeline, 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.calls += 1
        if self.calls == 2:
            self.first = self.timeline.now()

    def end(self) -> None:
        """Called after the last token."""


def _generate(generator: Generator, inputs: dict[str, torch.Tensor], timeline: Timeline) -> None:
    """Prefill is what lies between the vision tower and the first token."""
    watch, begin = _FirstToken(timeline), timeline.now()
    generator.generate(inputs, generator.max_new_tokens, streamer=watch)
    end = timeline.now()
    first = watch.first or end
    encoded = max((span.stop for span in timeline.spans if span.stage == "encode"), default=begin)
    timeline.add("prefill", min(max(begin, encoded), first), first)
    timeline.add("answer", first, end)
