"""The results as GitHub tables, for documentation."""

from __future__ import annotations

from collections.abc import Sequence

from foveate._wording import plural
from foveate.bench import report_text as text
from foveate.bench.cells import Cell
from foveate.bench.plan import BASELINES
from foveate.bench.report_tables import nearest, ratio
from foveate.bench.results import BenchResult, Standing
from foveate.bench.stats import Interval
from foveate.bench.store import UNTOUCHED
from foveate.core.timeline import TIMED_STAGES


def render_markdown(results: BenchResult) -> str:
    """Accuracy at every budget, accuracy by task at one, failures, and how it was measured."""
    shown = nearest(results.budgets, 0.1)
    parts = []
    if shown is not None:
        parts.append(_overall(results, shown))
        parts.append(by_task(results, shown))
        parts.append(stage_table(results, shown))
    for name, where, why in results.failures:
        at = ", ".join(map(text.budget, where))
        parts.append(f"`{cell_text(name)}` could not run at {at}: {cell_text(why)}")
    if results.missing:
        parts.append(f"{plural(len(results.missing), 'cell')} without a result yet.")
    parts.append(_provenance(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _overall(results: BenchResult, shown: float) -> str:
    at = text.budget(shown)
    heads = ["recipe", *map(text.budget, results.budgets)]
    heads += [f"FLOPs at {at}", f"first token at {at}", f"below at {at}"]
    best = {b: rows[0].accuracy for b in results.budgets if (rows := results.standings(b))}
    below = {row.cell.recipe: _below(row) for row in results.standings(shown)}
    rows = []
    if results.untouched is not None:
        # The same at every budget, so that each column can be read on its own.
        figures = [accuracy_figure(results.untouched, None)] * len(results.budgets)
        times = ratio(results.untouched)
        rows.append([UNTOUCHED, *figures, "100.0 %", times, ""])
    for name in ordered(results, shown):
        cells = {cell.retain: cell for cell in results.of(name)}
        figures = [accuracy_figure(cells.get(b), best.get(b)) for b in results.budgets]
        cell = cells.get(shown)
        share = cell.flops_fraction if cell else None
        spent = text.DASH if share is None else f"{text.percent(share)} %"
        times = ratio(cell) if cell else text.DASH
        rows.append([shown_name(name), *figures, spent, times, below.get(name, "")])
    return (
        "Accuracy in %, ± half the 95 % interval, by fraction of visual tokens kept; the best of "
        "each column is bold, baselines are italic. Time to the first token is in multiples of the "
        f"untouched model's. The last column names baselines with a higher accuracy at {at}, in "
        "brackets where the 95 % interval of the paired difference includes zero.\n\n"
        + table(heads, rows)
    )


def _below(row: Standing) -> str:
    return ", ".join(name if sure else f"({name})" for name, sure in row.below)


def by_task(results: BenchResult, shown: float) -> str:
    """Accuracy of every task at one budget; "" without tasks."""
    if not results.tasks:
        return ""
    rows = []
    if results.untouched is not None:
        rows.append([UNTOUCHED, *task_figures(results, results.untouched)])
    for name in ordered(results, shown):
        cell = results.cell(name, shown)
        if cell is not None:
            rows.append([shown_name(name), *task_figures(results, cell)])
    return f"Accuracy in % by task, {text.budget(shown)} of the visual tokens kept.\n\n" + table(
        ["recipe", *results.tasks], rows
    )


def stage_table(results: BenchResult, shown: float) -> str:
    """Where the time of a question goes at one budget; "" where no cell was timed by stage."""
    cells = [results.cell(name, shown) for name in ordered(results, shown)]
    timed = [cell for cell in [results.untouched, *cells] if cell and cell.stage_seconds]
    if not timed:
        return ""
    rows = [
        [UNTOUCHED if cell.recipe == UNTOUCHED else shown_name(cell.recipe), *timed_figures(cell)]
        for cell in timed
    ]
    return (
        f"Time per question by stage, {text.budget(shown)} of the visual tokens kept: median over "
        "the timed questions, each with a clip that was opened anew.\n\n"
        + table(["recipe", *TIMED_HEADS], rows)
    )


#: Heads of `timed_figures`.
TIMED_HEADS = ("sum", "to the first token", *TIMED_STAGES)


def timed_figures(cell: Cell) -> list[str]:
    """The sum, what lies before the first token, and every stage, in one unit."""
    whole, *stages = stage_figures(cell)
    return [
        whole,
        text.duration(cell.file_to_first_token, sum(cell.stage_seconds.values())),
        *stages,
    ]


def stage_figures(cell: Cell) -> list[str]:
    """The sum and every stage, in one unit."""
    seconds = cell.stage_seconds
    whole = sum(seconds.values())
    return [text.duration(whole)] + [
        text.duration(seconds[stage], whole) if seconds.get(stage) else text.DASH
        for stage in TIMED_STAGES
    ]


def ordered(results: BenchResult, shown: float) -> list[str]:
    """Recipes by accuracy at one budget; those without a result there come last."""
    first = [cell.recipe for cell in results.at(shown)]
    return first + [name for name in results.recipes if name not in first]


def accuracy_figure(cell: Cell | None, best: Interval | None) -> str:
    """Accuracy and half its interval, bold where it is the best."""
    figure = cell and cell.accuracy
    if figure is None:
        return text.DASH
    value = text.percent(figure.value)
    if best is not None and figure.value == best.value:
        value = f"**{value}**"
    return f"{value} ± {text.percent(figure.half)}" if figure.known else value


def task_figures(results: BenchResult, cell: Cell) -> list[str]:
    """Percent right of every task."""
    return [text.percent(cell.task_share(task), 0) for task in results.tasks]


def shown_name(recipe: str) -> str:
    """A recipe as code, a baseline in italics."""
    return f"*{recipe}*" if recipe in BASELINES else f"`{cell_text(recipe)}`"


def cell_text(words: str) -> str:
    """Text that breaks neither out of a cell nor out of its code marks."""
    return " ".join(words.split()).replace("|", "\\|").replace("`", "'")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table, all but the first column to the right."""
    lines = [
        "| " + " | ".join(map(cell_text, heads)) + " |",
        "|" + "|".join([" :-- ", *([" --: "] * (len(heads) - 1))]) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _provenance(results: BenchResult) -> str:
    run = results.run
    told = [
        f"{run['items']:,} questions" if run.get("items") else "",
        f"suite {run['suite']}" if run.get("suite") else "",
        f"model {run['model']}" if run.get("model") else "",
        str(run.get("model_id") or ""),
        str(run.get("hardware") or ""),
        " ".join(str(run[k]) for k in ("device", "dtype") if run.get(k)),
        f"foveate {run['foveate']}" if run.get("foveate") else "",
        f"torch {run['torch']}" if run.get("torch") else "",
        f"transformers {run['transformers']}" if run.get("transformers") else "",
        str(run.get("date") or "")[:10],
    ]
    line = ", ".join(cell_text(part) for part in told if part)
    command = str(run.get("command") or "").strip()
    fence = f"\n\n```console\n$ {command}\n```" if command else ""
    return f"{line}.{fence}" if line else fence.strip()
