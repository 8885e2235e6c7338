"""An endless, reproducible supply of clips with exact ground truth.

Legend: T frames; H, W pixels; C colours (3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Literal

import numpy as np

from foveate.world.captions import caption_of
from foveate.world.cast import sample_scene
from foveate.world.policies import Policy, policies_of
from foveate.world.questions import Question, questions_of
from foveate.world.render import render
from foveate.world.scene import Scene
from foveate.world.truth import Truth
from foveate.world.vocabulary import TASKS

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels."""
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size is one side or (height, width) in pixels, got {size}.")
    if min(sides) < 16:
        raise ValueError(f"frames must be at least 16 pixels high and wide, got {size}.")
    return int(sides[0]), int(sides[1])


def _tasks(tasks: Sequence[str] | None) -> tuple[str, ...]:
    if tasks is None:
        return tuple(TASKS)
    if isinstance(tasks, str):
        raise ValueError(f"tasks is a sequence of names; write tasks=({tasks!r},).")
    if not tasks:
        raise ValueError(f"name at least one task; choose from {', '.join(TASKS)}.")
    return tuple(tasks)


@dataclass(frozen=True, eq=False)
class Sample:
    """One clip of the world with everything there is to know about it.

    Pixels, masks and truth are drawn when first asked for.

    Attributes:
        scene: what happens.
        size: height and width of the frames, pixels.
        questions: what can be asked about it.
        fps: frames per second.
    """

    scene: Scene
    size: tuple[int, int]
    questions: tuple[Question, ...]
    fps: float

    @property
    def name(self) -> str:
        """Unique name, such as "0/test/17"."""
        return self.scene.name

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        return render(self.scene, *self.size)

    @property
    def frames_THWC(self) -> np.ndarray:
        """Pixels: uint8 [T, H, W, C]."""
        return self._drawn[0]

    @property
    def masks_THW(self) -> np.ndarray:
        """Id of the sprite that covers each pixel, 0 for the background: uint8 [T, H, W]."""
        return self._drawn[1]

    @cached_property
    def truth(self) -> Truth:
        """Boxes, visibility, trajectories, cuts and camera."""
        return Truth(self.scene, self.masks_THW)

    @property
    def caption(self) -> str:
        """What the clip shows, in words."""
        return caption_of(self.scene)

    @cached_property
    def policies(self) -> tuple[Policy, ...]:
        """Guardrail rules with the verdict on this clip, one of each kind at most."""
        return policies_of(self.scene)


class World:
    """Clips by number, the same on every machine.

    Args:
        seed: of the whole world.
        split: "train", "val" or "test": disjoint streams.
        frames: per clip, at least 4.
        size: of the frames in pixels: one side, or (height, width); at least 16.
        tasks: which questions to ask; None: all of `TASKS`.
        per_task: at most so many questions of each task per clip; None: all there are.
        natural: fraction of shots before a natural background (needs `foveate[demo]`).
        noise: sensor noise, levels of 255, at most 8.
        fps: frames per second, for writing videos and for timestamps.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> sample = World(frames=8, size=32).sample(5)
        >>> sample.frames_THWC.shape
        (8, 32, 32, 3)
    """

    def __init__(
        self,
        seed: int = 0,
        split: Split = "test",
        *,
        frames: int = 16,
        size: int | tuple[int, int] = 64,
        tasks: Sequence[str] | None = None,
        per_task: int | None = 1,
        natural: float = 0.0,
        noise: int = 3,
        fps: float = 4.0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}.")
        self.seed = seed
        self.split = split
        self.frames = frames
        self.size = _sides(size)
        self.tasks = _tasks(tasks)
        self.per_task = per_task
        self.natural = natural
        self.noise = noise
        self.fps = fps
        self.sample(0)  # Refuses bad values here rather than in the middle of a run.

    def sample(self, index: int) -> Sample:
        """The clip with this number.

        Raises:
            ValueError: a negative number, or no whole one.
        """
        if not isinstance(index, Integral):
            raise ValueError(f"clips are numbered by a whole number, got {index}.")
        if index < 0:
            raise ValueError(f"clips are numbered from 0, got {index}.")
        name = f"{self.seed}/{self.split}/{index}"
        scene = sample_scene(name, self.frames, natural=self.natural, noise=self.noise)
        questions = questions_of(scene, tasks=self.tasks, per_task=self.per_task)
        return Sample(scene, self.size, questions, self.fps)

    def __iter__(self) -> Iterator[Sample]:
        """Clips from number 0 on, without end."""
        index = 0
        while True:
            yield self.sample(index)
            index += 1

    def __repr__(self) -> str:
        height, width = self.size
        return f"World(seed={self.seed}, {self.split}, {self.frames} x {height} x {width})"
