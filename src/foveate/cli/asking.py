"""The `ask` command: streams the answer and prints what it took."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from foveate._wording import count, duration
from foveate.checkpoints import (
    EMBEDDED,
    AnsweringScorer,
    AskingScorer,
    embedded_folder,
    load_companion,
    load_model,
    open_clip,
)
from foveate.cli.options import checked_dtype
from foveate.cli.output import facts, out, print_json, recipe_line, stage_table
from foveate.cli.stages import Stages, clock, stages
from foveate.core import Recipe
from foveate.core.timeline import TIMED_STAGES
from foveate.models.companion import Companion
from foveate.models.scorer import Scorer
from foveate.video import Clip
from foveate.view.answer import Answer, ask
from foveate.view.html import check_destination, save_report
from foveate.view.thinking import Thought, think

#: What tells how well frames fit the question.
SCORERS = ("auto", "self", "answer", "companion")


@dataclass(frozen=True)
class Asking:
    """The options of one call, checked and run."""

    video: Path
    question: str
    model: str
    recipe: str
    budget: dict[str, Any]
    frames: int
    max_new_tokens: int
    device: str
    dtype: str
    compare: bool
    output: Path | None
    as_json: bool
    scorer: str = "auto"
    companion: str | None = None
    isolate: bool = False
    overlap: bool | None = None
    chunk: int = 16
    parts: int | None = None

    def run(self) -> None:
        """Answer the question.

        Raises:
            ValueError: an option is out of range.
        """
        dtype = checked_dtype(self.dtype)
        if self.output is not None:
            check_destination(self.output)
        self._check_scorer()
        made = Recipe.of(self.recipe)
        if self.model == EMBEDDED:
            embedded_folder()  # Says what to do where it is missing.
        clip = open_clip(self.video, isolate=self.isolate)
        if self.model == EMBEDDED and min(self.frames, len(clip)) == 1:
            raise ValueError(
                "the embedded model was trained on clips and cannot look at a single picture "
                "or frame; give it a clip, or name another checkpoint with --model."
            )
        with stages(not self.as_json) as tell:
            tell("load", 0, 1)
            model, processor = load_model(self.model, device=self.device, dtype=dtype)
            companion = self._companion(processor, dtype)
            tell("load", 1, 1)
        scorer = self._scorer(model, processor, companion)

        def answer(recipe: Recipe | None, title: str) -> tuple[Answer, Stages]:
            self._print_title(title)
            with stages(not self.as_json) as tell:
                tell.position = lambda: clip.position
                options = {
                    "frames": self.frames,
                    "max_new_tokens": self.max_new_tokens,
                    "on_text": self._writer(tell),
                    "companion": companion,
                    "scorer": scorer,
                    "progress": tell,
                    "overlap": self.overlap,
                    "chunk": self.chunk,
                    # Only the page draws it, and it takes time before the first token.
                    "evidence": self.output is not None,
                    **(self.budget if recipe is not None else {}),
                }
                asked = (model, processor, clip, self.question, recipe)
                if self.parts is None:
                    found = ask(*asked, **options)
                else:
                    options |= {"parts": self.parts, "on_thought": self._thinker(tell)}
                    found = think(*asked, **options)
            if not self.as_json:
                print("\n", flush=True)
            return found, tell

        untouched = answer(None, "untouched") if self.compare else None
        reduced = answer(made, str(made) if self.compare else "")
        report = reduced[0].report
        if self.model == EMBEDDED:
            shown = reduced[1].totals["decode"]
            report.notes += embedded_notes(processor.tokenizer, self.question, shown)
        if self.output is not None:
            save_report(report, self.output, title=f"{self.video.name}: {self.question}")
        if self.as_json:
            self._print_json(reduced, untouched)
        else:
            self._print_figures(made, clip, reduced, untouched)

    def _check_scorer(self) -> None:
        if self.scorer not in SCORERS:
            raise ValueError(f"--scorer is one of {', '.join(SCORERS)}, got {self.scorer!r}.")
        if self.scorer == "companion" and self.companion is None:
            raise ValueError(
                "--scorer companion needs one: name a CLIP-like checkpoint with --companion."
            )

    def _companion(self, processor: Any, dtype: Any) -> Companion | None:
        if self.companion is None:
            return None
        return load_companion(self.companion, processor, device=self.device, dtype=dtype)

    def _scorer(self, model: Any, processor: Any, companion: Companion | None) -> Scorer | None:
        """None leaves it to `ask`: the companion, else the model itself."""
        if self.scorer == "self":
            takes_images = getattr(processor, "image_token", None) is not None
            return AskingScorer(model, processor, kind="image" if takes_images else "video")
        if self.scorer == "answer":
            return AnsweringScorer(model, processor)
        return companion

    def _writer(self, tell: Stages) -> Callable[[str], None] | None:
        """Writes the answer as it comes, in place of the stages."""

        def write(text: str) -> None:
            tell.stop()
            sys.stdout.write(text)
            sys.stdout.flush()

        return None if self.as_json else write

    def _thinker(self, tell: Stages) -> Callable[[Thought], None] | None:
        """Writes what a part shows as soon as it is known."""

        def write(thought: Thought) -> None:
            span = f"{clock(thought.start)} to {clock(thought.end)}"
            with tell.paused():
                out().print(f"[dim]{span}: {escape(thought.text)}[/]")

        return None if self.as_json else write

    def _print_title(self, title: str) -> None:
        if title and not self.as_json:
            out().print(f"[dim]{escape(title)}:[/]")

    def _print_json(
        self, reduced: tuple[Answer, Stages], untouched: tuple[Answer, Stages] | None
    ) -> None:
        document = reduced[0].as_dict()
        items = reduced[0].report.items
        document["frames"] = frames_of(reduced[1])
        document["frames"]["seconds"] = items[0].seconds if len(items) == 1 else None
        document["html"] = None if self.output is None else str(self.output)
        if untouched is not None:
            document["untouched"] = untouched[0].as_dict()
            document["untouched"].pop("report")
        print_json(document)

    def _print_figures(
        self,
        made: Recipe,
        clip: Clip,
        reduced: tuple[Answer, Stages],
        untouched: tuple[Answer, Stages] | None,
    ) -> None:
        console, report = out(), reduced[0].report
        console.print(recipe_line(made, report))
        if report.stages:
            console.print(stage_table(report))
        console.print()
        console.print(_figures([reduced] if untouched is None else [reduced, untouched]))
        console.print(facts(report))
        if len(report.items) == 1 and report.items[0].seconds:
            # Where to look for oneself.
            times = [clock(seconds) for seconds in report.items[0].seconds]
            most = times if len(times) <= 32 else [*times[:31], "..."]
            console.print(
                f"[dim]frames shown, of {clock(clip.info.duration)}:[/] {', '.join(most)}"
            )
        for note in report.notes:
            console.print(f"[dim]note: {escape(note)}[/]")
        if self.output is not None:
            console.print(f"\nwrote [bold]{escape(str(self.output))}[/]")


def frames_of(told: Stages) -> dict[str, Any]:
    """Frames that were looked at to choose, and frames that the model was shown."""
    return {"looked_at": told.totals.get("choose", 0), "shown": told.totals["decode"]}


def embedded_notes(tokenizer: Any, question: str, frames: int) -> list[str]:
    """What the embedded model does not know about a question and a clip of so many frames."""
    notes = []
    size = json.loads((embedded_folder() / "card.json").read_text(encoding="utf-8"))["size"]
    if frames != size["frames"]:
        notes.append(f"the embedded model was trained on {size['frames']} frames; it got {frames}")
    read = tokenizer(question, return_offsets_mapping=True)
    spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
    unknown = [question[a:b] for token, (a, b) in spans if token == tokenizer.unk_token_id]
    if unknown:
        words = ", ".join(dict.fromkeys(unknown))
        notes.append(
            f"the embedded model does not know: {words} (`foveate world` asks what it can)"
        )
    return notes


def _figures(answers: list[tuple[Answer, Stages]]) -> Table:
    """Seconds per stage, frames, tokens and memory: one column for each answer."""
    compared = len(answers) > 1
    table = Table(box=None, show_header=compared, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", style="dim")
    for name in ("reduced", "untouched")[: len(answers)]:
        table.add_column(name, justify="right")
    spent = [answer.timeline.seconds() for answer, _ in answers]
    for stage in TIMED_STAGES:
        if any(stage in seconds for seconds in spent):
            cells = (duration(each[stage]) if stage in each else "" for each in spent)
            table.add_row(f"time to {stage}", *cells)
    frames = [frames_of(told) for _, told in answers]
    if any(each["looked_at"] for each in frames):
        table.add_row("frames looked at", *(count(each["looked_at"]) for each in frames))
    table.add_row("frames shown", *(count(each["shown"]) for each in frames))
    found = [answer for answer, _ in answers]
    table.add_row("time to first token", *(duration(a.file_to_first_token) for a in found))
    table.add_row("tokens per second", *(f"{a.tokens_per_second:.1f}" for a in found))
    table.add_row("tokens of the answer", *(count(a.new_tokens) for a in found))
    memory = (f"{a.peak_memory / 2**30:.2f} GiB" if a.peak_memory else "unknown" for a in found)
    table.add_row("peak memory", *memory)
    return table
