"""The tasks by name; a module is imported when its task is asked for."""

from __future__ import annotations

from importlib import import_module

from foveate.training.task import Task, TaskSize

#: Name -> "module:class" below `foveate.training.tasks`.
TASKS: dict[str, str] = {
    "shapes": "shapes:Shapes",
    "retrieval": "retrieval:Retrieval",
    "poses": "poses:Poses",
    "sequences": "sequences:Sequences",
    "scan": "scan:Scan",
}


def make_task(name: str, size: TaskSize = "small", seed: int = 0) -> Task:
    """The task with this name.

    Raises:
        ValueError: there is none, or no such size.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}.")
    module, _, kind = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(f"foveate.training.tasks.{module}"), kind)
    return found(size, seed)
