"""Long clips: minutes of quiet scenes with short events, each the answer to a question.

Drawn a chunk of frames at a time, so that an hour takes no more memory than a minute.

Legend: T frames of a chunk; H, W pixels; C colours (3).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any

import numpy as np

from foveate.world.draw import Draw
from foveate.world.long_scenes import (
    BY_SHAPE,
    LONG_TASKS,
    Named,
    Naming,
    Window,
    add_event,
    quiet_cast,
    scene_of,
)
from foveate.world.questions import Question
from foveate.world.render import render
from foveate.world.scene import Scene
from foveate.world.vocabulary import COLORS, SHAPES
from foveate.world.world import SPLITS, Split

#: Shortest and longest quiet scene, seconds.
_SCENE = (4.0, 12.0)
#: Quiet time on either side of an event before the next cut, seconds.
_MARGIN = 0.5
#: Frames drawn at a time.
CHUNK = 64
#: Tasks of a clip whose events stay for a second or two, and of one whose events are over at once.
NEEDLE_TASKS = ("what", "where", "reading")
DENSE_TASKS = ("direction", "order")


@dataclass(frozen=True)
class Event:
    """Something short that happens in a long clip.

    Attributes:
        question: what is asked about it.
        first: first frame of the clip that it is in.
        last: last one, included.
        start: seconds at which it begins.
        stop: seconds at which it is over.
    """

    question: Question
    first: int
    last: int
    start: float
    stop: float


@dataclass(frozen=True)
class _Plan:
    """A scene before it is cast: its place in the clip, and which events fall into it."""

    first: int
    frames: int
    events: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LongClip:
    """One long clip: cast scene by scene when it is drawn.

    Attributes:
        name: unique, such as "long/0/test/17/needle".
        frames: how many there are.
        fps: frames per second.
        noise: sensor noise, levels of 255.
        tasks: of its events, in the order of time.
        windows: first and last frame of each event.
        naming: what things are named by in its questions.
        names: those that each event has to itself.
    """

    name: str
    frames: int
    fps: float
    noise: int
    tasks: tuple[str, ...]
    windows: tuple[tuple[int, int], ...]
    naming: Naming
    names: tuple[tuple[str, ...], ...]

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.frames / self.fps

    @cached_property
    def _plans(self) -> tuple[_Plan, ...]:
        """Scenes of random length, no cut within or close to an event."""
        draw, margin = Draw(self.name, "cuts"), round(_MARGIN * self.fps)
        edges, place = [0], 0
        while True:
            place += max(4, round(draw.uniform(*_SCENE) * self.fps))
            if place > self.frames - 4:
                break
            if all(
                place <= first - margin or place > last + margin for first, last in self.windows
            ):
                edges.append(place)
        ends = [*edges[1:], self.frames]
        events: list[list[int]] = [[] for _ in edges]
        for number, (first, _) in enumerate(self.windows):
            events[bisect.bisect_right(edges, first) - 1].append(number)
        return tuple(
            _Plan(first, end - first, tuple(inside))
            for first, end, inside in zip(edges, ends, events, strict=True)
        )

    def _scene(self, number: int) -> tuple[Scene, dict[int, Question]]:
        """A scene, and the questions about the events in it."""
        return _cast_scene(self, number)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """What happens, in the order of time."""
        asked: dict[int, Question] = {}
        for number, plan in enumerate(self._plans):
            if plan.events:
                asked |= self._scene(number)[1]
        return tuple(
            Event(asked[number], first, last, first / self.fps, (last + 1) / self.fps)
            for number, (first, last) in enumerate(self.windows)
        )

    def render(self, first: int, last: int, size: int = 64) -> np.ndarray:
        """Draw frames `first` to `last`, the last included: uint8 [T, H, W, C].

        Complexity: O(T H W), and a background for each scene that is met.

        Raises:
            ValueError: they are not frames of the clip.
        """
        if not 0 <= first <= last < self.frames:
            raise ValueError(f"frames go from 0 to {self.frames - 1}, got {first} to {last}.")
        starts, parts = [plan.first for plan in self._plans], []
        number = bisect.bisect_right(starts, first) - 1
        while first <= last:
            plan = self._plans[number]
            end = min(last + 1, plan.first + plan.frames)
            inside = range(first - plan.first, end - plan.first)
            parts.append(render(self._scene(number)[0], size, size, frames=inside)[0])
            first, number = end, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def chunks(self, size: int = 64, frames: int = CHUNK) -> Iterator[np.ndarray]:
        """The whole clip, so many frames at a time: uint8 [T, H, W, C] each."""
        for first in range(0, self.frames, frames):
            yield self.render(first, min(first + frames, self.frames) - 1, size)


@lru_cache(maxsize=8)
def _cast_scene(clip: LongClip, number: int) -> tuple[Scene, dict[int, Question]]:
    plan = clip._plans[number]
    name = f"{clip.name}/{number}"
    reserved = tuple(name for names in clip.names for name in names)
    cast = quiet_cast(Draw(name, "quiet"), plan.frames, clip.naming, reserved)
    asked = {}
    for event in plan.events:
        first, last = (frame - plan.first for frame in clip.windows[event])
        named = Named(clip.naming, clip.names[event])
        # A stream for each event: what is asked has nothing to do with the scene around it.
        draw = Draw(clip.name, "event", event)
        cast.draw = draw
        asked[event] = add_event(cast, draw, clip.tasks[event], Window(first, last), named)
    return scene_of(name, cast, noise=clip.noise), asked


class LongWorld:
    """Long clips by number, the same on every machine.

    Args:
        seconds: length of every clip.
        seed: of the whole world.
        split: "train", "val" or "test": disjoint streams.
        fps: frames per second.
        tasks: what is asked, of `LONG_TASKS`; event after event takes the next one.
        events: in every clip, at most 3.
        event_seconds: how long each lasts; at least 4 frames.
        noise: sensor noise, levels of 255, at most 8.

    Raises:
        ValueError: a value is out of range, or the events do not fit.

    Example:
        >>> clip = LongWorld(60, fps=8).sample(0)
        >>> clip.frames, len(clip.events), clip.render(100, 103).shape
        (480, 1, (4, 64, 64, 3))
    """

    def __init__(
        self,
        seconds: float,
        seed: int = 0,
        split: Split = "test",
        *,
        fps: float = 8.0,
        tasks: Sequence[str] = NEEDLE_TASKS,
        events: int = 1,
        event_seconds: float = 2.0,
        noise: int = 1,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
        if not fps > 0 or not seconds > 0 or not event_seconds > 0:
            raise ValueError(
                "seconds, fps and event_seconds must be above 0, got "
                f"{seconds}, {fps} and {event_seconds}."
            )
        if not 1 <= events <= 3:
            raise ValueError(f"a clip has 1 to 3 events, got {events}.")
        if not 0 <= noise <= 8:
            raise ValueError(f"noise is 0 to 8 levels, got {noise}.")
        unknown = [task for task in tasks if task not in LONG_TASKS]
        if unknown or not tasks or isinstance(tasks, str):
            raise ValueError(f"tasks are some of {', '.join(LONG_TASKS)}, got {tasks!r}.")
        self.seconds, self.fps = float(seconds), float(fps)  # 60 and 60.0 are one world
        self.seed, self.split = seed, split
        self.tasks, self.events, self.noise = tuple(tasks), events, noise
        self.frames = max(1, round(seconds * fps))
        self.event_frames = max(4, round(event_seconds * fps))
        room = self.event_frames + 2 * round(_MARGIN * fps)
        if self.frames < events * room:
            raise ValueError(
                f"{events} events of {self.event_frames} frames, with half a second of quiet on "
                f"either side, do not fit into {self.frames} frames: make the clip longer."
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """What determines the clips, plain data."""
        names = ("seconds", "seed", "split", "fps", "events", "event_frames", "noise")
        return {name: getattr(self, name) for name in names} | {"tasks": list(self.tasks)}

    def sample(self, index: int) -> LongClip:
        """The clip with this number.

        Raises:
            ValueError: a negative number, or no whole one.
        """
        if not isinstance(index, Integral) or index < 0:
            raise ValueError(f"clips are numbered from 0 by a whole number, got {index}.")
        # Lengths and tasks belong to the name: no frame of one world occurs in another.
        what = f"{self.frames}/{self.fps:g}/{self.event_frames}/{'+'.join(self.tasks)}"
        name = f"long/{self.seed}/{self.split}/{what}/{index}"
        draw = Draw(name, "events")
        first = index * self.events
        tasks = tuple(
            self.tasks[(first + number) % len(self.tasks)] for number in range(self.events)
        )
        by_shape = any(task in BY_SHAPE for task in tasks)
        naming: Naming = "shape" if by_shape or draw.chance(0.5) else "color"
        names = draw.shuffled(SHAPES if naming == "shape" else COLORS)
        own = tuple(tuple(names.pop() for _ in range(LONG_TASKS[task])) for task in tasks)
        return LongClip(
            name, self.frames, self.fps, self.noise, tasks, self._windows(draw), naming, own
        )

    def _windows(self, draw: Draw) -> tuple[tuple[int, int], ...]:
        """Frames of the events: any depth is as likely as any other, none overlap."""
        margin = round(_MARGIN * self.fps)
        room = self.event_frames + 2 * margin
        free = self.frames - self.events * room
        # Stretches of one length lie at random where their gaps do.
        gaps = sorted(draw.integer(0, free) for _ in range(self.events))
        firsts = [gap + number * room + margin for number, gap in enumerate(gaps)]
        return tuple((first, first + self.event_frames - 1) for first in firsts)

    def __iter__(self) -> Iterator[LongClip]:
        """Clips from number 0 on, without end."""
        index = 0
        while True:
            yield self.sample(index)
            index += 1

    def __repr__(self) -> str:
        return f"LongWorld({self.seconds:g} s, seed={self.seed}, {self.split}, {self.fps:g} fps)"
