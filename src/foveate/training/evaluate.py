"""Accuracy of a model on the world's questions, and of two baselines that must fail.

Legend: B clips, T frames, H, W pixels, C colours, L tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.training.data import AnswerBatches
from foveate.training.packing import packed_hidden, visual_tokens
from foveate.training.sizes import Size
from foveate.world.draw import Draw
from foveate.world.vocabulary import TASKS

#: What the model sees instead of the clip.
VIEWS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "clip": lambda frames_BTHWC, _: frames_BTHWC,
    "one frame": lambda frames_BTHWC, name: _one_frame(frames_BTHWC, name),
    "blind": lambda frames_BTHWC, _: torch.full_like(frames_BTHWC, 127),
}


def _one_frame(frames_BTHWC: Tensor, name: str) -> Tensor:
    """One frame of each clip, drawn at random, in place of all of them."""
    draw = Draw(name, "one frame")
    count = frames_BTHWC.shape[1]
    chosen_B = torch.tensor([draw.integer(0, count - 1) for _ in frames_BTHWC])
    picked = frames_BTHWC[torch.arange(len(frames_BTHWC)), chosen_B]
    return picked[:, None].expand_as(frames_BTHWC)


@torch.inference_mode()
def world_accuracy(
    model: Any,
    size: Size,
    *,
    seed: int = 0,
    split: str = "val",
    clips: int = 256,
    batch: int = 16,
    view: str = "clip",
    natural: float | None = None,
) -> dict[str, tuple[int, int]]:
    """Right and asked questions of each task on held-out clips.

    The first word of the answer is compared, as greedy generation would give it.

    Args:
        model: a `LlavaOnevisionForConditionalGeneration`.
        size: its size.
        seed: of the world.
        split: of the world.
        clips: how many, from number 0 on.
        batch: clips at a time.
        view: one of `VIEWS`: "clip", "one frame" (the same random frame all the time), "blind".
        natural: fraction of natural backgrounds; None: as in training.

    Raises:
        ValueError: an unknown view, or no clips.
    """
    if clips < 1 or batch < 1:
        raise ValueError(f"clips and batch must be at least 1, got {clips} and {batch}.")
    if view not in VIEWS:
        raise ValueError(f"unknown view {view!r}; choose one of {', '.join(VIEWS)}.")
    device = next(model.parameters()).device
    was_training, _ = model.training, model.eval()
    counts = {task: [0, 0] for task in TASKS}
    for step, first in enumerate(range(0, clips, batch)):
        data = AnswerBatches(
            size, seed, min(batch, clips - first), first, split=split, captions=False
        )
        if natural is not None:
            data.world.natural = natural
        made = data[0]
        frames = VIEWS[view](made.pop("frames"), f"{seed}/{split}/{step}").to(device)
        made = {name: value.to(device) for name, value in made.items()}
        visual_BVD = visual_tokens(model, frames)
        hidden_BLD = packed_hidden(model, visual_BVD, made)
        said = model.lm_head(hidden_BLD[made["first"]]).argmax(-1).tolist()
        meant = made["labels"][made["first"]].tolist()
        for task, word, right in zip(_tasks(data), said, meant, strict=True):
            counts[task][0] += word == right
            counts[task][1] += 1
    model.train(was_training)
    return {task: (right, asked) for task, (right, asked) in counts.items()}


def _tasks(data: AnswerBatches) -> list[str]:
    """Task of each packed question of the first step, in order."""
    samples = (data.world.sample(data.first + index) for index in range(data.clips))
    return [question.task for sample in samples for question in data.asked(sample)]


def summary(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Accuracy of each task with questions, and overall (every question counts the same).

    Args:
        counts: right and asked questions of each task, from `world_accuracy`.

    Example:
        >>> summary({"what": (3, 4), "where": (1, 4), "when": (0, 0)})
        {'overall': 0.5, 'what': 0.75, 'where': 0.25}
    """
    table = {task: right / asked for task, (right, asked) in counts.items() if asked}
    right, asked = (sum(column) for column in zip(*counts.values(), strict=True))
    return {"overall": right / max(asked, 1), **table}
