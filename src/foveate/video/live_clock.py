"""When a picture of a live source is shown, and whether it is wanted, without looking ahead.

Nothing here imports torch or PyAV.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

# A clock that jumps ahead by more than this was set anew; nothing that was watched took so long.
_RESET_SECONDS = 3600.0
# What lies between pictures that carry the same time, and before the rate of a source is known.
_INSTANT = 1e-3
_INTERVAL = 0.04


@dataclass(frozen=True)
class Gap:
    """A place where the times of a live source do not go on evenly.

    Attributes:
        kind: "forward" (time passed without pictures), "backwards" (the source began again) or
            "reset" (its clock was set ahead by more than an hour).
        seconds: time of the last picture before it, counted from the first picture.
        jump: seconds by which the source's own clock moved, below zero for "backwards".
    """

    kind: str
    seconds: float
    jump: float

    def __str__(self) -> str:
        return f"{self.kind} jump of {self.jump:+.2f} s after {self.seconds:.2f} s"


class LiveClock:
    """Turns the times of pictures into seconds that always ascend, the first one being 0.

    A step back, and a leap of more than an hour, is a source that began again: time goes on one
    interval of pictures after the last one. Any other leap is time that passed. A source whose
    first picture has no time is timed by the wall clock. O(1) per picture.

    Args:
        interval: seconds between pictures, as far as it is known; None: it is not.
        longest: seconds between pictures beyond which there is a gap.
        now: the wall clock, in seconds.

    Attributes:
        gaps: the most recent gaps, at most 1,000.
        num_gaps: gaps in all.

    Example:
        >>> clock = LiveClock(0.1)
        >>> [clock(time) for time in (7.0, 7.1, 7.2, 0.0, 0.1, 20.1)]
        [0.0, 0.1, 0.2, 0.3, 0.4, 20.4]
        >>> [str(gap) for gap in clock.gaps]
        ['backwards jump of -7.20 s after 0.20 s', 'forward jump of +20.00 s after 0.40 s']
    """

    def __init__(
        self,
        interval: float | None = None,
        *,
        longest: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.interval = interval if interval and 0 < interval < longest else _INTERVAL
        self.longest = longest
        self.gaps: list[Gap] = []
        self.num_gaps = 0
        self._now = now
        self._by_wall: bool | None = None
        self._last_raw = 0.0
        self._last = 0.0
        self._offset = 0.0

    def __call__(self, raw: float | None) -> float:
        """Seconds at which a picture is shown.

        Args:
            raw: its time by the source; None: it has none.
        """
        if raw is not None and not math.isfinite(raw):
            raw = None
        if self._by_wall is None:
            self._by_wall = raw is None
            self._last_raw = self._now() if raw is None else raw
            self._offset = -self._last_raw
            return 0.0
        if self._by_wall:
            raw = self._now()
        elif raw is None:
            raw = self._last_raw + self.interval
        step = raw - self._last_raw
        if step < 0 or step > _RESET_SECONDS:
            # Wherever the source's clock stands now, ours goes on.
            self._note("backwards" if step < 0 else "reset", step)
            self._offset = self._last + self.interval - raw
        elif step > self.longest:
            self._note("forward", step)
        elif step > 0:
            self.interval = step
        self._last_raw = raw
        # Differences of times in ticks carry noise in their last digits.
        self._last = round(max(raw + self._offset, self._last + _INSTANT), 9)
        return self._last

    def _note(self, kind: str, jump: float) -> None:
        self.num_gaps += 1
        self.gaps = [*self.gaps[-999:], Gap(kind, self._last, jump)]


class RateGate:
    """Lets pictures through at a rate: the first one at or behind 0, 1/fps, 2/fps, ... seconds.

    Args:
        fps: frames per second; None: every picture passes.

    Example:
        >>> gate = RateGate(2)
        >>> [second for second in (0.0, 0.3, 0.5, 0.6, 1.9, 2.0, 2.1) if gate(second)]
        [0.0, 0.5, 1.9, 2.0]
    """

    def __init__(self, fps: float | None) -> None:
        self.fps = fps
        self._due = 0

    def __call__(self, seconds: float) -> bool:
        """Whether the picture shown at this time is wanted."""
        if self.fps is None:
            return True
        # Times in ticks miss the grid by rounding.
        place = math.floor(seconds * self.fps + 1e-3)
        if place < self._due:
            return False
        self._due = place + 1
        return True
