"""What hooks belong to: one model, never a copy of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from foveate.errors import AttachmentError

Run = TypeVar("Run")


class OfOneModel:
    """Base of everything whose methods are hooks: refuses to be copied or pickled with a model."""

    def __reduce__(self) -> Any:
        raise AttachmentError(
            "A model cannot be copied or pickled while a recipe is attached: its hooks belong to "
            "this one. remove() the recipe first, or save the state_dict()."
        )


class OfOneRun(OfOneModel, Generic[Run]):
    """Hooks that keep what belongs to one forward call, in every thread its own."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._finished: Callable[[Run], None] = lambda run: None

    @property
    def run(self) -> Run | None:
        """The running call in this thread."""
        return getattr(self._local, "run", None)

    def when_over(self, call: Callable[[Run], None]) -> Callable[[Run], None]:
        """Have `call` told of every run that is over; a decorator."""
        self._finished = call
        return call
