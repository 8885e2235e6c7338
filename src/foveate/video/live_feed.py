"""The short queue between a live source and whoever takes its pictures, and what became of both.

Nothing here imports torch.

Legend: H, W pixels in display orientation.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from foveate.errors import DecodeStalledError
from foveate.video.live_clock import Gap, LiveClock

# Longest nap of a thread that waits for another; it is woken earlier when there is news.
_NAP = 0.25


class Picture(NamedTuple):
    """One frame of a live source: uint8 [3, H, W], its time and its number among all decoded."""

    pixels_CHW: np.ndarray
    seconds: float
    rank: int
    is_suspect: bool


@dataclass(frozen=True)
class LiveReport:
    """What became of a live source so far.

    Attributes:
        decoded: pictures that came out of the decoder.
        taken: pictures that were wanted at the rate asked for.
        given: pictures handed out.
        dropped: pictures thrown away because nobody took them in time.
        damaged: packets that did not decode, counted from the first picture on.
        gaps: places where the source's times do not go on evenly, the most recent 1,000.
        num_gaps: those places in all.
        seconds: time of the newest picture, from the first one.
        ended: why there is no more; empty while there may be.
    """

    decoded: int = 0
    taken: int = 0
    given: int = 0
    dropped: int = 0
    damaged: int = 0
    gaps: tuple[Gap, ...] = ()
    num_gaps: int = 0
    seconds: float = 0.0
    ended: str = ""

    @property
    def summary(self) -> str:
        """In one line."""
        parts = [f"{self.given} frames of {self.decoded} decoded"]
        parts += [f"{self.dropped} dropped"] if self.dropped else []
        parts += [f"{self.damaged} damaged packets"] if self.damaged else []
        parts += [f"{self.num_gaps} gaps in time"] if self.num_gaps else []
        parts += [self.ended] if self.ended else []
        return ", ".join(parts)


class Settings(NamedTuple):
    """How a source is read; see `foveate.Live`."""

    name: str
    fps: float | None
    size: tuple[int, int] | None
    ahead: int
    drops: bool
    timeout: float
    max_pixels: int
    threads: int
    longest: float
    format: str | None
    options: dict[str, str]


class Feed:
    """What the thread and the consumer share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.news = threading.Condition()
        self.waiting: deque[Picture] = deque()
        self.error: Exception | None = None
        self.is_closed = False
        self.is_over = False
        self.beats = 0
        self.decoded = self.taken = self.given = self.dropped = self.damaged = 0
        self.seconds = 0.0
        self.ended = ""
        self.clock: LiveClock | None = None

    @property
    def report(self) -> LiveReport:
        with self.news:
            clock = self.clock
            return LiveReport(
                self.decoded,
                self.taken,
                self.given,
                self.dropped,
                self.damaged,
                tuple(clock.gaps) if clock else (),
                clock.num_gaps if clock else 0,
                self.seconds,
                self.ended,
            )

    def put(self, picture: Picture) -> bool:
        """Queue a picture; False: nobody wants any more."""
        with self.news:
            while len(self.waiting) >= self.settings.ahead and not self.is_closed:
                if self.settings.drops:
                    self.waiting.popleft()
                    self.dropped += 1
                else:
                    self.news.wait(_NAP)
                    self.beats += 1
            if self.is_closed:
                return False
            self.taken += 1
            self.waiting.append(picture)
            self.news.notify_all()
            return True

    def get(self, most: int) -> list[Picture]:
        """Up to so many pictures of one size, at least one unless it is over; waits for it.

        Raises:
            VideoError: the source failed; pictures before that were given.
            DecodeStalledError: there was no sign of life.
        """
        # The thread knows better what it waits for: let it speak first.
        limit = self.settings.timeout + 2.0
        with self.news:
            beats, since = self.beats, time.monotonic()
            while not self.waiting and not self.is_closed:
                if self.error is not None:
                    error, self.error = self.error, None
                    self.is_closed = True
                    raise error
                if self.is_over:
                    break
                self.news.wait(_NAP)
                if self.beats != beats:
                    beats, since = self.beats, time.monotonic()
                elif time.monotonic() - since > limit:
                    self.is_closed = True
                    self.ended = "it gave no sign of life"
                    raise DecodeStalledError(
                        f"it gave no sign of life for {limit:g} s", source=self.settings.name
                    )
            found: list[Picture] = []
            while self.waiting and len(found) < most and not self.is_closed:
                if found and self.waiting[0].pixels_CHW.shape != found[0].pixels_CHW.shape:
                    break
                found.append(self.waiting.popleft())
            self.given += len(found)
            self.news.notify_all()
            return found

    def close(self) -> None:
        with self.news:
            if not self.is_over and not self.is_closed:
                self.ended = self.ended or "it was closed"
            self.is_closed = True
            self.waiting.clear()
            self.news.notify_all()
