"""Questions about long generated clips: files that are made once and decoded like any other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from foveate.bench.suite import SMALLEST, Item, Suite, checked_tasks

Kind = Literal["needle", "dense"]
#: Raised when the same arguments give other files, so that old ones are not taken for them.
_VERSION = 1
#: Most bytes of all suites that are kept; the longest unused go first.
CACHE_BYTES = 8 << 30


class LongWorldSuite(Suite):
    """Short events in long clips of the generated world, asked for one by one.

    "needle": something is there for two seconds at a random depth of minutes of quiet scenes, three
    times in a clip: what it is, where, what a sign says. "dense": within half a second, 16 frames
    of a clip of 30 a second, something crosses the picture or two things come one after the other,
    which a frame or two a second do not show.

    Clips are written to a cache when they are first needed (`FOVEATE_CACHE`, else `foveate` in
    the user's cache folder), under a name that their arguments determine; whole suites that were
    not used for longest are deleted when all of them together exceed 8 GiB.

    Args:
        kind: "needle" or "dense".
        clips: clips, the first of the split.
        tasks: only questions of these tasks; None: all.
        minutes: length of every clip; None: 1 of needles, 0.1 of dense ones.
        fps: frames per second; None: 8 of needles, 30 of dense ones.
        size: pixels of the square that is drawn; None: what the model sees, at least 64.
        seed: of the world.
        split: "test" holds clips that no training has seen.
        cache: folder of the files, in place of the user's.

    Raises:
        ValueError: a value is out of range, or the events do not fit.

    Example:
        >>> suite = LongWorldSuite("needle", clips=2, minutes=5)
        >>> suite.name, suite.args["seconds"]
        ('world-needle', 300.0)

    Source: needles in long video are a common probe; dense motion is in the spirit of DIVE
    (arXiv 2509.14199).
    """

    def __init__(
        self,
        kind: Kind = "needle",
        clips: int = 16,
        tasks: Iterable[str] | None = None,
        *,
        minutes: float | None = None,
        fps: float | None = None,
        size: int | None = None,
        seed: int = 0,
        split: str = "test",
        cache: str | Path | None = None,
    ) -> None:
        from foveate.world.long import DENSE_TASKS, NEEDLE_TASKS, LongWorld

        if kind not in ("needle", "dense"):
            raise ValueError(f'kind must be "needle" or "dense", got {kind!r}.')
        if clips < 1:
            raise ValueError(f"clips must be at least 1, got {clips}.")
        needle = kind == "needle"
        self.clips, self.cache = clips, cache
        self.drawn = SMALLEST if size is None else size
        known = NEEDLE_TASKS if needle else DENSE_TASKS
        self.tasks = checked_tasks(tasks, known)
        self.world = LongWorld(
            60 * ((1.0 if needle else 0.1) if minutes is None else minutes),
            seed,
            split,  # type: ignore[arg-type]  # checked there
            fps=(8.0 if needle else 30.0) if fps is None else fps,
            tasks=known,
            events=3 if needle else 2,
            event_seconds=2.0 if needle else 16 / 30,
        )
        self._options: dict[str, Any] = {
            "kind": kind,
            "clips": clips,
            "tasks": self.tasks,
            "minutes": minutes,
            "fps": fps,
            "size": size,
            "seed": seed,
            "split": split,
            "cache": cache,
        }
        chosen = None if self.tasks is None else list(self.tasks)
        args = {"clips": clips, "tasks": chosen, "drawn": self.drawn, "pixels": self.pixels}
        world = {k: v for k, v in self.world.arguments.items() if k != "tasks"}
        super().__init__(f"world-{kind}", self._items_of_files, args={**world, **args})

    @property
    def pixels(self) -> int:
        """Side of the files' square frames: small ones are enlarged, which keeps their colours."""
        return max(128, self.drawn + self.drawn % 2)

    def sized_for(self, side: int | None) -> LongWorldSuite:
        """The same questions about clips drawn at the model's own size, if none was asked for."""
        if self._options["size"] is not None or side is None or side <= SMALLEST:
            return self
        return LongWorldSuite(**{**self._options, "size": side})

    @property
    def folder(self) -> Path:
        """Where the files are, or will be."""
        from foveate.models.default_encoder import cache_root

        facts = [_VERSION, self.world.arguments, self.drawn, self.pixels]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return cache_root(self.cache) / "suites" / f"{self.name}-{digest}"

    def _items_of_files(self) -> Iterator[Item]:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # used now: the last one to be deleted
        _make_room(folder)
        for index in range(self.clips):
            clip = self.world.sample(index)
            file = folder / f"clip-{index:05d}.mp4"
            for number, event in enumerate(clip.events):
                asked = event.question
                if self.tasks is not None and asked.task not in self.tasks:
                    continue
                if not file.is_file():
                    self._write(clip, file)
                yield Item(
                    f"{index}-{number}-{asked.task}",
                    f"{self.name}-{index}",
                    file,
                    asked.text,
                    tuple(asked.options),
                    asked.answer,
                    asked.task,
                )

    def _write(self, clip: Any, file: Path) -> None:
        from foveate.world.long_files import write_clip

        write_clip(clip, file, size=self.pixels, drawn=self.drawn)


def _make_room(folder: Path) -> None:
    """Delete suites that were not used for longest until the rest fit; never this one."""
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    sizes = {path: _size(path) for path in others}
    total = sum(sizes.values())
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if total <= CACHE_BYTES:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= sizes[path]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
