"""The `ask` command: streams the answer and prints what it took."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from foveate._wording import count, duration
from foveate.checkpoints import (
    EMBEDDED,
    embedded_folder,
    load_model,
    open_clip,
    sample_frames,
)
from foveate.cli.options import checked_dtype
from foveate.cli.output import facts, out, print_json, progress, recipe_line, stage_table
from foveate.core import Recipe
from foveate.view.answer import Answer, ask
from foveate.view.html import check_destination, save_report


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

    def run(self) -> None:
        """Answer the question.

        Raises:
            ValueError: an option is out of range.
        """
        dtype = checked_dtype(self.dtype)
        if self.output is not None:
            check_destination(self.output)
        made = Recipe.of(self.recipe)
        with progress(not self.as_json) as tell:
            tell("decode the clip", 0, 1)
            if self.model == EMBEDDED:
                embedded_folder()  # Says what to do where it is missing.
            clip = open_clip(self.video)
            taken = sample_frames(clip, self.frames)
            if self.model == EMBEDDED and len(taken) == 1:
                raise ValueError(
                    "the embedded model was trained on clips and cannot look at a single picture "
                    "or frame; give it a clip, or name another checkpoint with --model."
                )
            tell("load the model", 0, 1)
            model, processor = load_model(self.model, device=self.device, dtype=dtype)

        def answer(recipe: Recipe | None, title: str) -> Answer:
            chooses = recipe is not None and bool(recipe.at("frames"))
            budget = self.budget if recipe is not None else {}
            self._print_title(title)
            found = ask(
                model,
                processor,
                clip if chooses else taken,
                self.question,
                recipe,
                frames=self.frames,
                max_new_tokens=self.max_new_tokens,
                on_text=None if self.as_json else _write,
                **budget,
            )
            if not self.as_json:
                print("\n", flush=True)
            return found

        untouched = answer(None, "untouched") if self.compare else None
        reduced = answer(made, str(made) if self.compare else "")
        if self.model == EMBEDDED:
            reduced.report.notes += embedded_notes(processor.tokenizer, self.question, len(taken))
        if self.output is not None:
            title = f"{self.video.name}: {self.question}"
            save_report(reduced.report, self.output, title=title)
        if self.as_json:
            self._print_json(reduced, untouched)
        else:
            self._print_figures(made, reduced, untouched)

    def _print_title(self, title: str) -> None:
        if title and not self.as_json:
            out().print(f"[dim]{escape(title)}:[/]")

    def _print_json(self, reduced: Answer, untouched: Answer | None) -> None:
        document = reduced.as_dict()
        document["html"] = None if self.output is None else str(self.output)
        if untouched is not None:
            document["untouched"] = untouched.as_dict()
            document["untouched"].pop("report")
        print_json(document)

    def _print_figures(self, made: Recipe, reduced: Answer, untouched: Answer | None) -> None:
        console = out()
        console.print(recipe_line(made, reduced.report))
        console.print(stage_table(reduced.report))
        console.print()
        console.print(_figures(reduced, untouched))
        console.print(facts(reduced.report))
        for note in reduced.report.notes:
            console.print(f"[dim]note: {escape(note)}[/]")
        if self.output is not None:
            console.print(f"\nwrote [bold]{escape(str(self.output))}[/]")


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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _figures(reduced: Answer, untouched: Answer | None) -> Table:
    table = Table(box=None, show_header=untouched is not None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", style="dim")
    table.add_column("reduced", justify="right")
    answers = [reduced]
    if untouched is not None:
        table.add_column("untouched", justify="right")
        answers.append(untouched)
    table.add_row("time to first token", *(duration(a.first_token) for a in answers))
    table.add_row("tokens per second", *(f"{a.tokens_per_second:.1f}" for a in answers))
    table.add_row("tokens of the answer", *(count(a.new_tokens) for a in answers))
    memory = (f"{a.peak_memory / 2**30:.2f} GiB" if a.peak_memory else "unknown" for a in answers)
    table.add_row("peak memory", *memory)
    return table
