"""`run_bench`: every recipe at every budget on one model and one suite."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.attach import Attachment, reduce
from foveate.bench.generation import Generator, Tally, UntouchedCosts, plans_of
from foveate.bench.identity import run_identity, scorer_name
from foveate.bench.inputs import CACHE_BYTES, Prompt, Prompts
from foveate.bench.matching import is_correct
from foveate.bench.measure import measure_times, peak_memory
from foveate.bench.plan import PlannedCell, plan_cells
from foveate.bench.results import BenchResult, read_result
from foveate.bench.stage_times import stage_seconds
from foveate.bench.store import RunFolder, cell_key
from foveate.bench.suite import Suite, WorldSuite
from foveate.checkpoints import EMBEDDED, frame_side, load_model, own_scorer
from foveate.core import Recipe
from foveate.models.companion import Companion
from foveate.models.scorer import Scorer

#: Questions that are timed, each about another clip.
TIMED = 2
#: Tokens that a reply may have beyond the longest answer.
LEAD_IN = 8
#: Called with what is being done, steps done and steps in all.
Progress = Callable[[str, int, int], None]


def run_bench(
    recipes: str | Iterable[str | Recipe],
    retain: float | Iterable[float],
    suite: Suite | None = None,
    *,
    out: str | Path,
    model: nn.Module | str | Path = EMBEDDED,
    processor: Any = None,
    model_name: str | None = None,
    frames: int = 16,
    batch: int = 16,
    max_new_tokens: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    baselines: bool = True,
    scorer: Scorer | None = None,
    companion: Companion | None = None,
    retry_failed: bool = False,
    cache_bytes: int = CACHE_BYTES,
    progress: Progress = lambda what, done, total: None,
    on_cell: Callable[[Mapping[str, Any]], None] = lambda cell: None,
) -> BenchResult:
    """Measure accuracy, tokens, FLOPs, time and memory of recipes against the untouched model.

    Results go to a folder as they are ready; a run that was stopped goes on where it was, and more
    recipes or budgets may be added to it later. A recipe that cannot act on the model becomes a
    cell with an error, and the run goes on.

    Args:
        recipes: as in `foveate.reduce`; a text may name several between commas; "all" is every
            registered method.
        retain: fractions of visual tokens kept, in (0, 1].
        suite: the questions: `WorldSuite` (the default), `FolderSuite`, or your own `Suite`.
        out: folder of the results.
        model: "embedded", a folder, a hub id, or a loaded model (then with `processor`).
        processor: of a loaded model.
        model_name: how the results call it; None: the given name, or the class.
        frames: frames taken evenly from every clip, at most all.
        batch: questions answered together; halved where a GPU's memory is too small.
        max_new_tokens: longest reply, in tokens; None: the longest option or answer of the suite
            and room for a lead-in such as "The answer is".
        repeats: turns of the time measurement; 0 leaves time out.
        seed: for methods that draw at random.
        device, dtype: of a model given by name; as in `foveate.checkpoints.load_model`.
        baselines: always add random, uniform and pool, and even_frames where a recipe chooses
            frames.
        scorer: tells recipes that choose frames how well they fit the question, as in
            `foveate.choose_frames`; default: the companion, else the model itself is asked.
        companion: as in `foveate.reduce`.
        retry_failed: measure cells of an earlier call again that ended in an error.
        cache_bytes: most memory for preprocessed clips, see `Prompts`.
        progress: told what is being done.
        on_cell: called with every cell's line once it is written.

    Returns:
        The figures of all cells in the folder.

    Raises:
        UnknownMethodError: a recipe names no method; nothing has been loaded by then.
        ValueError: a value is out of range, no question can be asked, or `out` holds something
            else or a different run.

    Example:
        >>> from foveate.bench import FolderSuite, run_bench
        >>> suite = FolderSuite("clips/")                                   # doctest: +SKIP
        >>> result = run_bench("holitom", [0.1, 0.5], suite, out="report")  # doctest: +SKIP
        >>> print(result)                                                   # doctest: +SKIP
    """
    for name, value in (("frames", frames), ("batch", batch), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    cells = plan_cells(recipes, retain, baselines)
    told = scorer or companion
    folder = RunFolder(out)
    if isinstance(model, nn.Module):
        if processor is None:
            raise ValueError(
                "a loaded model needs its processor; foveate.checkpoints.load_model gives both."
            )
        name, loaded = model_name or type(model).__name__, model
    else:
        progress("load the model", 0, 1)
        loaded, processor = load_model(model, device=device, dtype=dtype)
        name = model_name or str(model)
    prompts = Prompts(
        loaded,
        processor,
        (suite or WorldSuite(frames=frames, seed=seed)).sized_for(frame_side(processor)),
        frames,
        cache_bytes=cache_bytes,
        scorer=told or own_scorer(loaded, processor),
        progress=lambda clips, items: progress(f"read the clips ({clips})", 0, 1),
    )
    max_new_tokens = max_new_tokens or prompts.longest_answer + LEAD_IN
    settings: dict[str, Any] = {"frames": frames, "seed": seed, "max_new_tokens": max_new_tokens}
    # The model itself goes without saying, and older runs do not say it.
    settings["scorer"] = None if told is None else scorer_name(told)
    run = {**run_identity(loaded, name, prompts), **settings, "batch": batch}
    with folder:
        planned = [cell.key for cell in cells]
        finished = {cell_key(line) for line in folder.start(run, planned, retry_failed)}
        left = [cell for cell in cells if cell.key not in finished]
        runner = Runner(loaded, prompts, batch, max_new_tokens, repeats, seed, progress, companion)
        try:
            for number, cell in enumerate(left):
                progress(f"{cell.name} at {cell.retain:g}", number, len(left))
                line, answers = runner.run(cell, (number, len(left)))
                folder.finish(line, answers)
                on_cell(line)
        finally:
            # What is there after Ctrl-C is worth a page, too.
            _write_report(folder.path)
    return read_result(folder.path)


class Runner:
    """Runs cells of one run.

    Args:
        model: without an attachment.
        prompts: the questions.
        batch, max_new_tokens, repeats, seed, progress, companion: as in `run_bench`.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        batch: int,
        max_new_tokens: int,
        repeats: int,
        seed: int,
        progress: Progress,
        companion: Companion | None = None,
    ) -> None:
        self.model, self.prompts, self.seed = model, prompts, seed
        self.batch, self.companion = batch, companion
        self.repeats, self.progress = repeats, progress
        self.generator = Generator(model, prompts, max_new_tokens)
        self.costs = UntouchedCosts(self.generator)

    def run(
        self, cell: PlannedCell, place: tuple[int, int] = (0, 1)
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The cell's line and its answers; a recipe that fails gives a line with an error.

        Raises:
            Exception: whatever the untouched model fails with: nothing could be compared to it.
        """
        named = {"recipe": cell.name, "retain": cell.retain}
        try:
            return self._run(cell, named, place)
        except Exception as error:
            if cell.recipe is None:
                raise
            # Whatever a method fails with must not end a run of hours; the line says what it was.
            text = " ".join(str(error).split())
            return {
                **named,
                "items": 0,
                "correct": 0,
                "error": f"{type(error).__name__}: {text}",
            }, []

    def _attach(self, cell: PlannedCell) -> AbstractContextManager[Attachment | None]:
        if cell.recipe is None:
            return nullcontext()
        return reduce(
            self.model, cell.recipe, retain=cell.retain, seed=self.seed, companion=self.companion
        )

    def _questions(self, cell: PlannedCell, tell: Callable[[int, int], None]) -> list[Prompt]:
        """The questions with the frames that the cell shows."""
        if cell.recipe is None or not cell.recipe.at("frames"):
            return self.prompts.prompts
        return self.prompts.chosen(cell.recipe, cell.retain, self.seed, tell)

    def _run(
        self, cell: PlannedCell, named: dict[str, Any], place: tuple[int, int]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        begin = time.perf_counter()
        tally, rows = Tally(self.costs), []
        number, total = place
        what = f"{cell.name} at {cell.retain:g}"

        def tell(stage: str, done: int, steps: int) -> None:
            self.progress(stage, number * steps + done, total * steps)

        questions = self._questions(cell, lambda *n: tell(f"{what}: choose frames", *n))
        batches = self.prompts.batches(self.batch, questions)
        for done, batch in enumerate(batches, 1):
            # A new attachment per batch costs milliseconds and cannot carry anything over.
            with self._attach(cell) as run:
                replies = self.generator.answer(batch, run, tally)
            rows += [self._row(named, *pair) for pair in zip(batch, replies, strict=True)]
            tell(what, done, len(batches))
        seconds = time.perf_counter() - begin
        tasks: dict[str, list[int]] = {}
        for row in rows:
            right, asked = tasks.get(row["task"], (0, 0))
            tasks[row["task"]] = [right + row["correct"], asked + 1]
        line = {
            **named,
            "seconds": seconds,
            "items": len(rows),
            "correct": sum(row["correct"] for row in rows),
            "tasks": tasks,
            **tally.means(),
            **self._measure(cell, questions),
            "error": None,
        }
        return line, rows

    def _row(self, named: dict[str, Any], prompt: Prompt, reply: str) -> dict[str, Any]:
        item = prompt.item
        lettered = self.prompts.lettered and bool(item.options)
        return {
            **named,
            "id": item.id,
            "clip": item.clip_id,
            "task": item.task,
            "answer": item.answer,
            "predicted": reply,
            "correct": is_correct(reply, item.answer, item.options, lettered),
        }

    def _measure(self, cell: PlannedCell, questions: Sequence[Prompt]) -> dict[str, Any]:
        plain, mine = (_first_of_clips(some)[:TIMED] for some in (self.prompts.prompts, questions))
        inputs = [self.prompts.collate([prompt]) for prompt in plain]
        chosen = None
        if any(prompt.plan is not None for prompt in mine):
            chosen = [(self.prompts.collate([prompt]), prompt.plan) for prompt in mine]
        times = measure_times(
            self.generator,
            inputs,
            None if cell.recipe is None else lambda: self._attach(cell),
            nullcontext,
            self.repeats,
            chosen,
        )
        times["stage_seconds"] = stage_seconds(
            self.generator,
            [prompt.item for prompt in plain],
            cell.recipe,
            cell.retain,
            lambda: self._attach(cell),
            self.repeats,
            seed=self.seed,
            chooses=chosen is not None,
        )
        with self._attach(cell) as run:
            if run is not None:
                run.plans = plans_of(mine[:1])
            first = inputs[0] if chosen is None else chosen[0][0]
            memory = peak_memory(self.model, lambda: self.generator.generate(first, 1))
        return {**times, "peak_memory": memory}


def _first_of_clips(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first question about every clip."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.item.clip_id, prompt)
    return list(first.values())


def _write_report(folder: Path) -> None:
    importlib.import_module("foveate.bench.report").write_report(folder)
