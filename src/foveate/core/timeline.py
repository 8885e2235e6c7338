"""What ran when: the spans of the stages between a file and an answer.

Seconds everywhere, counted from when the timeline was made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Stages in the order of data flow, as reports and the command line name them.
TIMED_STAGES = ("choose", "decode", "encode", "prefill", "answer")


@dataclass(frozen=True, order=True)
class Span:
    """One piece of work.

    Attributes:
        start: when it began.
        stop: when it ended.
        stage: one of `TIMED_STAGES`.
        part: which chunk of frames it worked on, from 0; -1 where there are no chunks.
    """

    start: float
    stop: float
    stage: str
    part: int = -1


class Timeline:
    """Spans of work, noted by any number of threads.

    On a GPU a span ends when its work was handed over unless the caller synchronises before.

    Example:
        >>> line = Timeline()
        >>> line.add("decode", 0.0, 2.0, part=0)
        >>> line.add("encode", 1.5, 3.0, part=0)
        >>> line.seconds(), line.overlap(), line.total()
        ({'decode': 2.0, 'encode': 1.5}, 0.5, 3.0)
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans = list(spans)
        self._lock = threading.Lock()
        self._zero = time.perf_counter()

    def now(self) -> float:
        """Seconds since the timeline was made."""
        return time.perf_counter() - self._zero

    def add(self, stage: str, start: float, stop: float, part: int = -1) -> None:
        """Note a span.

        Raises:
            ValueError: no such stage, or it ends before it begins.
        """
        if stage not in TIMED_STAGES:
            raise ValueError(f"stage must be one of {', '.join(TIMED_STAGES)}, got {stage!r}.")
        if not 0 <= start <= stop:
            raise ValueError(
                f"a span must begin at 0 or later and end behind, got {start}, {stop}."
            )
        with self._lock:
            self._spans.append(Span(start, stop, stage, part))

    @contextmanager
    def span(self, stage: str, part: int = -1) -> Iterator[None]:
        """Note what happens inside a `with` block, if it ends well."""
        start = self.now()
        yield
        self.add(stage, start, self.now(), part)

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans by their beginning."""
        with self._lock:
            return tuple(sorted(self._spans))

    def seconds(self) -> dict[str, float]:
        """Seconds in which each stage was at work, several threads of one stage counted once."""
        spans = self.spans
        return {
            stage: _covered((s.start, s.stop) for s in spans if s.stage == stage)
            for stage in TIMED_STAGES
            if any(span.stage == stage for span in spans)
        }

    def busy(self) -> float:
        """Seconds in which any stage was at work."""
        return _covered((span.start, span.stop) for span in self.spans)

    def overlap(self) -> float:
        """Seconds of work that were done beside other stages: the sum of stages less `busy`.

        No more than that is saved, and less where stages share cores and slow each other down.
        """
        return sum(self.seconds().values()) - self.busy()

    def total(self) -> float:
        """When the last span ended; 0 without any."""
        return max((span.stop for span in self.spans), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [[span.stage, span.part, span.start, span.stop] for span in self.spans]
        return {"seconds": self.seconds(), "overlap": self.overlap(), "spans": rows}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Timeline:
        """What `as_dict` gave, as a timeline again."""
        line = cls()
        for stage, part, start, stop in data["spans"]:
            line.add(stage, start, stop, part)
        return line


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
