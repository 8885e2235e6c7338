"""The `watch` command: asks the same question again and again while a source goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from foveate.checkpoints import EMBEDDED, embedded_folder, load_model
from foveate.cli.asking import embedded_notes
from foveate.cli.options import checked_dtype
from foveate.cli.output import err, out, progress
from foveate.video import Live
from foveate.view.streaming import Stream, StreamAnswer

# Frames that may wait while a question is answered.
_AHEAD = 64


@dataclass(frozen=True)
class Watching:
    """The options of one call, checked and run."""

    source: str
    question: str
    every: float
    answers: int | None
    model: str
    recipe: str | None
    stream: dict[str, Any]
    live: dict[str, Any]
    fps: float
    max_new_tokens: int
    device: str
    dtype: str
    as_json: bool

    def run(self) -> None:
        """Watch until the source ends, or enough answers were given.

        Raises:
            ValueError: an option is out of range.
            VideoError: the source cannot be read, broke off or fell silent.
        """
        dtype = checked_dtype(self.dtype)
        if not self.every > 0:
            raise ValueError(f"--every must be above 0 seconds, got {self.every}.")
        # Whatever is wrong with the source is said before a model is loaded; a frame at a time, so
        # that questions are asked when they are due.
        live = Live(self.source, self.fps, chunk=1, ahead=_AHEAD, **self.live)
        with live:
            self._watch(live, dtype)

    def _watch(self, live: Live, dtype: Any) -> None:
        with progress(not self.as_json) as tell:
            if self.model == EMBEDDED:
                embedded_folder()  # Says what to do where it is missing.
            tell("load the model", 0, 1)
            model, processor = load_model(self.model, device=self.device, dtype=dtype)
        with Stream(model, processor, self.recipe, fps=self.fps, **self.stream) as stream:
            try:
                self._follow(stream, live)
            finally:
                self._print_end(live)
            if self.model == EMBEDDED and not self.as_json:
                known = len(stream.memory.seconds)
                for note in embedded_notes(processor.tokenizer, self.question, known):
                    out().print(f"[dim]note: {escape(note)}[/]")

    def _follow(self, stream: Stream, live: Live) -> None:
        """Ask whenever so many seconds of the source have gone by, and at its end."""
        given, due, last, asked = 0, self.every, None, None
        for last in stream.follow(live):
            if last < due:
                continue
            # However many questions fell due in a gap, one is asked.
            due = (last // self.every + 1) * self.every
            self._ask(stream, last)
            given, asked = given + 1, last
            if given == self.answers:
                return
        if last is not None and last != asked:
            self._ask(stream, last)

    def _ask(self, stream: Stream, now: float) -> None:
        write = None if self.as_json else _Printer(f"{clock(now)}  ")
        answer = stream.ask(self.question, max_new_tokens=self.max_new_tokens, on_text=write)
        if self.as_json:
            print_line(now, answer, stream)
        else:
            print(flush=True)

    def _print_end(self, live: Live) -> None:
        report = live.report
        if self.as_json or not report.decoded:
            return  # What went wrong is said elsewhere.
        err().print(f"[dim]{escape(report.summary)}[/]")
        for gap in report.gaps[-5:]:
            err().print(f"[dim]{escape(str(gap))}[/]")


class _Printer:
    """Prints an answer as it grows, behind the time it was asked at."""

    def __init__(self, before: str) -> None:
        self._shown = 0
        sys.stdout.write(before)

    def __call__(self, text: str) -> None:
        sys.stdout.write(text[self._shown :])
        sys.stdout.flush()
        self._shown = max(self._shown, len(text))


def print_line(now: float, answer: StreamAnswer, stream: Stream) -> None:
    """One answer as one line of JSON."""
    document = {
        "seconds": now,
        "text": answer.text,
        "frames": list(answer.seconds),
        "evidence": list(answer.evidence),
        "first_token": answer.first_token,
        "total": answer.total,
        "remembered_bytes": stream.memory.num_bytes,
    }
    print(json.dumps(document), flush=True)


def clock(seconds: float) -> str:
    """A time of a source.

    Example:
        >>> clock(3725.5)
        '1:02:05'
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
