"""What is asked: questions about clips, generated or read from a user's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foveate.bench.questions import read_questions

#: Pixels below which the shapes of the world cannot be told apart, and what it draws by default.
SMALLEST = 64


@dataclass(frozen=True, eq=False)
class Item:
    """One question about one clip.

    Attributes:
        id: unique within its suite.
        clip_id: equal for all questions about the same clip.
        video: a video or picture file, or uint8 frames [T, H, W, 3].
        question: in words.
        options: texts to choose from; empty for open questions.
        answer: the right answer; one of `options` if there are any.
        task: what the question tests.
        where: where it was read from ("questions.jsonl:12"), for messages.
    """

    id: str
    clip_id: str
    video: Path | np.ndarray = field(repr=False)
    question: str
    options: tuple[str, ...]
    answer: str
    task: str
    where: str = ""


class Suite:
    """Questions under a name; iterate over it to get its items.

    Args:
        name: of the suite.
        items: the questions, or a function that makes them anew.
        args: what the suite was made with, plain data; part of a run's identity.
        errors: what could not be used, one line each. A run adds videos that do not decode.
        lettered: offer options with letters, to models that know the words of the offer; otherwise
            the question is asked as it is.

    Example:
        >>> frames = np.zeros((4, 32, 32, 3), dtype=np.uint8)
        >>> suite = Suite("mine", [Item("1", "black", frames, "Is it dark?", (), "yes", "light")])
        >>> [item.answer for item in suite]
        ['yes']
    """

    def __init__(
        self,
        name: str,
        items: Iterable[Item] | Callable[[], Iterable[Item]],
        *,
        args: dict[str, Any] | None = None,
        errors: Sequence[str] = (),
        lettered: bool = False,
    ) -> None:
        self.name = name
        self.args = args or {}
        self.errors = list(errors)
        self.lettered = lettered
        self._items = items if callable(items) else list(items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items() if callable(self._items) else self._items)

    def sized_for(self, side: int | None) -> Suite:
        """The suite for a model that sees square frames of `side` pixels; None: of any size.

        Only suites that draw their own clips have a choice; the others are returned as they are.
        """
        return self

    def __repr__(self) -> str:
        return f"<suite {self.name} {self.args}>"


class WorldSuite(Suite):
    """Questions about generated clips with exact answers (`foveate.world`), asked as they are.

    Clips are rendered when the suite is iterated over: equal arguments give equal questions on
    every machine.

    Args:
        clips: clips, the first of the split.
        tasks: only questions of these tasks; None: all.
        frames: frames of every clip.
        size: pixels of the square frames; None: what the model sees, at least 64 (`sized_for`).
        seed: of the world.
        split: "test" holds clips that no training has seen.

    Raises:
        ValueError: a count is below 1, or there is no such task.
    """

    def __init__(
        self,
        clips: int = 100,
        tasks: Iterable[str] | None = None,
        *,
        frames: int = 16,
        size: int | None = None,
        seed: int = 0,
        split: str = "test",
    ) -> None:
        from foveate.world import TASKS

        if clips < 1:
            raise ValueError(f"clips must be at least 1, got {clips}.")
        chosen = checked_tasks(tasks, tuple(TASKS))
        self.clips = clips
        self._options: dict[str, Any] = {
            "clips": clips,
            "tasks": chosen,
            "frames": frames,
            "size": size,
            "seed": seed,
            "split": split,
        }
        self._world: dict[str, Any] = {"seed": seed, "split": split, "frames": frames}
        if size is not None:
            self._world["size"] = size
        if chosen is not None:
            self._world["tasks"] = chosen
        args = {**self._world, "clips": clips, "tasks": chosen and list(chosen)}
        super().__init__("world", self._render, args=args)

    def sized_for(self, side: int | None) -> WorldSuite:
        """The same questions about clips drawn at the model's own size, if none was asked for.

        A clip that is drawn large and made small afterwards is blurred, and one that is drawn small
        and enlarged has no more detail than before. Smaller than 64 pixels nothing is drawn: the
        shapes could not be told apart.
        """
        if self._options["size"] is not None or side is None or side <= SMALLEST:
            return self
        return WorldSuite(**{**self._options, "size": side})

    def _render(self) -> Iterator[Item]:
        from foveate.world import World

        world, chosen = World(**self._world), self._world.get("tasks")
        for index in range(self.clips):
            sample = world.sample(index)
            for number, asked in enumerate(sample.questions):
                if chosen is None or asked.task in chosen:
                    yield Item(
                        f"{index}-{number}-{asked.task}",
                        f"world-{index}",
                        sample.frames_THWC,
                        asked.text,
                        tuple(asked.options),
                        asked.answer,
                        asked.task,
                    )


class FolderSuite(Suite):
    """A user's questions: one {"video", "question", "options"?, "answer", "task"?, "id"?} per line.

    Options are offered with letters. Lines that cannot be used are listed in `errors` with file and
    line, and left out.

    Args:
        path: a .jsonl file, or a folder that holds questions.jsonl (or exactly one .jsonl file).
            Relative video paths count from the file's folder.
        tasks: only questions of these tasks; None: all.
        clips: only the first so many clips; None: all.

    Raises:
        ValueError: there is no such file, it holds no usable line, or a task occurs in none.
    """

    def __init__(
        self, path: str | Path, tasks: Iterable[str] | None = None, clips: int | None = None
    ) -> None:
        if clips is not None and clips < 1:
            raise ValueError(f"clips must be at least 1, got {clips}.")
        file, rows, errors = read_questions(Path(path))
        items = [Item(**row) for row in rows]
        chosen = checked_tasks(tasks, list(dict.fromkeys(item.task for item in items)))
        if chosen is not None:
            items = [item for item in items if item.task in chosen]
        if clips is not None:
            first = list(dict.fromkeys(item.clip_id for item in items))[:clips]
            items = [item for item in items if item.clip_id in set(first)]
        args = {"file": file.name, "clips": clips, "tasks": chosen and list(chosen)}
        super().__init__(file.stem, items, args=args, errors=errors, lettered=True)
        self.file = file


def open_suite(
    name: str | Path,
    *,
    tasks: Iterable[str] | None = None,
    clips: int | None = None,
    frames: int = 16,
    seed: int = 0,
    minutes: float | None = None,
) -> Suite:
    """The suite that a command line names: "world", one of long clips, a folder or a .jsonl file.

    Args:
        name: "world", "world-needle", "world-dense", or a path.
        tasks: only questions of these tasks.
        clips: how many; None: 100 of the world, 16 of its long clips, all of a folder.
        frames: of every clip of the world.
        seed: of the world.
        minutes: length of long clips.

    Raises:
        ValueError: it cannot be read, or minutes are given for another suite.
    """
    if str(name) in ("world-needle", "world-dense"):
        from foveate.bench.long_suite import LongWorldSuite

        kind: Any = str(name).removeprefix("world-")
        return LongWorldSuite(
            kind, 16 if clips is None else clips, tasks, minutes=minutes, seed=seed
        )
    if minutes is not None:
        raise ValueError(f"minutes are for world-needle and world-dense, not for {name}.")
    if str(name) == "world":
        return WorldSuite(100 if clips is None else clips, tasks, frames=frames, seed=seed)
    return FolderSuite(name, tasks, clips)


def checked_tasks(tasks: Iterable[str] | None, known: Sequence[str]) -> tuple[str, ...] | None:
    """Tasks that a suite has, each once.

    Raises:
        ValueError: one of them is unknown, or none is named.
    """
    if tasks is None:
        return None
    chosen = tuple(dict.fromkeys(tasks))
    missing = [task for task in chosen if task not in known]
    if missing or not chosen:
        raise ValueError(
            f"there is no task {', '.join(missing) or '(none named)'}; tasks are "
            f"{', '.join(known)}."
        )
    return chosen
