"""How far `foveate ask` is: a line per stage in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from foveate._wording import count, plural
from foveate.cli.output import err

#: Stages -> what is written of them, and what they count.
_STAGES = {
    "load": ("load the model", ""),
    "choose": ("choose", "frames looked at"),
    "decode": ("decode", "frames"),
    "encode": ("encode", "frames"),
    "prefill": ("prefill", "tokens"),
    "answer": ("answer", "tokens"),
}
#: Seconds between two lines where there is no terminal, and before the first.
EVERY = 10.0


def clock(seconds: float) -> str:
    """A time in a video: 3725.4 -> "1:02:05", 65 -> "1:05"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Stages:
    """What was told of every stage; made by `stages`.

    Attributes:
        totals: how much every stage told of has to do: frames, or tokens.
        position: seconds of the video that decoding has reached, for stages that decode.
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.position: Callable[[], float] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note how far a stage is."""
        self.totals[stage] = total
        self.show(stage, done, total)

    def show(self, stage: str, done: int, total: int) -> None:
        """Say it to people; nothing here."""

    def stop(self) -> None:
        """Say no more: the answer begins."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Out of the way while something is written to standard output."""
        yield

    def words(self, stage: str, done: int, total: int) -> str:
        """Such as "640 of 3,600 frames looked at, to 10:39 of the video"."""
        unit = _STAGES[stage][1]
        if not unit:
            return ""
        if stage == "answer":  # It may be shorter than the longest.
            return plural(done, "token")
        amount = f"{count(done)} of {count(total)}"
        at = ""
        if stage in ("choose", "decode") and self.position is not None and done:
            at = f", to {clock(self.position())} of the video"
        return f"{amount} {unit}{at}"


class _Lines(Stages):
    """For logs and pipes: a line every few seconds, none where all is done before."""

    def __init__(self, every: float = EVERY) -> None:
        super().__init__()
        self._every, self._last = every, time.monotonic()

    def show(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            words = self.words(stage, done, total)
            err().print(f"{_STAGES[stage][0]}: {words}" if words else _STAGES[stage][0])


class _Bars(Stages):
    """For terminals: a bar per stage, gone when the answer begins."""

    def __init__(self, bars: Any) -> None:
        super().__init__()
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def show(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            name = _STAGES[stage][0]
            self._tasks[stage] = self._bars.add_task(name, total=total or None, words="")
        # How long an answer will be, nobody knows.
        known = None if stage == "answer" else total or None
        words = self.words(stage, done, total)
        self._bars.update(self._tasks[stage], completed=done, total=known, words=words)

    def stop(self) -> None:
        self._bars.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()


@contextmanager
def stages(enabled: bool = True) -> Iterator[Stages]:
    """A display on standard error, gone when done; to be told `(stage, done, total)`."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not enabled:
        yield Stages()
    elif not err().is_terminal:
        yield _Lines()
    else:
        columns = (
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[words]}[/]"),
        )
        with Progress(*columns, console=err(), transient=True) as bars:
            yield _Bars(bars)
