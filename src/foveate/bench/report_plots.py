"""Charts of a run: which cells go on which curve, and how recipes look on all of them.

Legend: nothing here is a tensor; shares and accuracies are fractions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from foveate._wording import plural, shorten
from foveate.bench import report_text as text
from foveate.bench.cells import Cell
from foveate.bench.plan import BASELINES
from foveate.bench.report_axes import Frame, Scale, accuracy_scale, share_range, share_ticks
from foveate.bench.report_curves import (
    LEADERS,
    Point,
    Series,
    Style,
    curve_chart,
    mark,
    small_chart,
)
from foveate.bench.report_tables import nearest
from foveate.bench.results import BenchResult
from foveate.bench.stats import Interval

Styles = Mapping[str, Style]
_STAGES = ("frames", "patches", "encoder", "projector", "decoder", "cache")


def styles_of(results: BenchResult) -> dict[str, Style]:
    """The look of every recipe: colours and marks by rank, baselines in grey."""
    styles: dict[str, Style] = {}
    for number, name in enumerate(results.methods):
        # With the shape shifted by one each round, 32 pairs of colour and shape are distinct.
        shape = (number + number // LEADERS) % 4
        leads = number < LEADERS or len(results.methods) <= LEADERS + 2
        styles[name] = Style(number, f"c{number % LEADERS}", shape, leads)
    present = [name for name in BASELINES if name in results.recipes]
    for name in present:
        place = BASELINES.index(name)
        styles[name] = Style(len(results.methods) + place, f"b{place}", place, True)
    return styles


def legend(results: BenchResult, styles: Styles) -> str:
    """Recipes with a checkbox each, grouped by the stages at which they act."""
    groups: dict[str, list[str]] = {}
    for name in results.methods:
        groups.setdefault(_acts_at(results.of(name)), []).append(name)
    groups = dict(sorted(groups.items(), key=lambda group: _order_of(group[0])))
    groups["baselines"] = [name for name in BASELINES if name in results.recipes]
    rows = []
    for group, names in groups.items():
        labels = "".join(
            f'<label class="key{styles[name].number}"><input type="checkbox" class="pick" '
            f'id="pick{styles[name].number}"/>{mark(styles[name])}{escape(name)}</label>'
            for name in names
        )
        if labels:
            rows.append(f'<div><span class="group">{escape(group)}</span><div>{labels}</div></div>')
    return f'<fieldset class="legend" aria-label="Recipes">{"".join(rows)}</fieldset>'


def _acts_at(cells: list[Cell]) -> str:
    seen = {s["stage"] for cell in cells for s in cell.figures.get("stages") or []}
    return " + ".join(stage for stage in _STAGES if stage in seen) or "other"


def _order_of(group: str) -> list[int]:
    """Groups in the order in which data flows, those of several stages behind their first."""
    return [_STAGES.index(stage) if stage in _STAGES else 9 for stage in group.split(" + ")]


def _told(cell: Cell, accuracy: Interval, where: str) -> str:
    between = f" ({text.span(accuracy)})" if text.span(accuracy) else ""
    return f"{cell.recipe} at {where}: {text.percent(accuracy.value)} %{between}"


def _series(results: BenchResult, styles: Styles) -> list[Series]:
    """Recipes over tokens kept, best first and baselines last."""
    return [
        Series(
            name,
            styles[name],
            [
                Point(cell.retain, figure, _told(cell, figure, text.budget(cell.retain)))
                for cell in results.of(name)
                if (figure := cell.accuracy)
            ],
        )
        for name in _drawing_order(results)
    ]


def _drawing_order(results: BenchResult) -> list[str]:
    return [*results.methods, *(name for name in BASELINES if name in results.recipes)]


def _scale(results: BenchResult) -> Scale:
    cells = [cell for name in results.recipes for cell in results.of(name)]
    cells += [results.untouched] if results.untouched else []
    return accuracy_scale([cell.accuracy for cell in cells if cell.accuracy])


def stylesheet(name: str) -> str:
    """The rules for "chart" or "report"."""
    return (files("foveate.bench") / "assets" / f"{name}.css").read_text(encoding="utf-8")


def picture(results: BenchResult, width: float = 760) -> str:
    """Accuracy against tokens kept as an SVG file of its own, light and dark.

    It has its own ground, so that it can be read on a page whose scheme is not the viewer's.
    """
    chart = retained_chart(results, styles_of(results), width)
    head, _, body = chart.partition(">")
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', head)
    assert size is not None
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif'
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg" width="{size[1]}" height="{size[2]}">'
        f"<style>{stylesheet('chart')}text {{ font-family: {font}; }} "
        ".ground { fill: var(--card); }</style>"
        f'<rect class="ground" width="{size[1]}" height="{size[2]}" rx="10"/>{body}\n'
    )


def retained_chart(results: BenchResult, styles: Styles, width: float = 1080) -> str:
    """Accuracy against the fraction of visual tokens kept."""
    low, high = share_range(results.budgets)
    # A single budget has the whole width for its recipes.
    most, gap = (11.0, 2.2) if len(results.budgets) > 1 else (330.0, 16.0)
    frame = Frame(low, high, _scale(results), width, ticks=results.budgets)
    return curve_chart(
        frame,
        _series(results, styles),
        untouched=results.untouched.accuracy if results.untouched else None,
        title="Accuracy against the fraction of visual tokens kept, one line per recipe",
        axis="visual tokens kept (log scale), fewer →",
        dodge=min(most, gap * (len(results.recipes) - 1)),
    )


def flops_chart(results: BenchResult, styles: Styles) -> str:
    """Accuracy against FLOPs as a fraction of the untouched model's."""
    series = []
    for name in _drawing_order(results):
        points = []
        for cell in results.of(name):
            share, figure = cell.flops_fraction, cell.accuracy
            if share and figure:
                where = f"{text.percent(share)} % of the FLOPs, {text.budget(cell.retain)} kept"
                points.append(Point(share, figure, _told(cell, figure, where)))
        series.append(Series(name, styles[name], sorted(points, key=lambda p: -p.x)))
    shares = [point.x for entry in series for point in entry.points]
    if not shares:
        return "<p>No FLOPs were counted in this run.</p>"
    low, high = share_range(shares)
    return curve_chart(
        Frame(low, high, _scale(results), ticks=share_ticks(low, high)),
        series,
        untouched=results.untouched.accuracy if results.untouched else None,
        title="Accuracy against FLOPs as a fraction of the untouched model's, one line per recipe",
        axis="FLOPs of the whole call, untouched = 100 % (log scale), fewer →",
    )


def multiples(results: BenchResult, styles: Styles) -> str:
    """One small chart per task, all with the same axes; "" when that would repeat the whole."""
    if len(results.tasks) < 2:
        return ""
    by_task = {task: _task_series(results, styles, task) for task in results.tasks}
    untouched = {task: _untouched_on(results, task) for task in by_task}
    every = [p.accuracy for rows in by_task.values() for row in rows for p in row.points]
    every += [figure for figure in untouched.values() if figure is not None]
    scale = accuracy_scale(every, most=5)
    low, high = share_range(results.budgets)
    numbers = results.run.get("tasks") or {}
    figures = []
    for task, series in by_task.items():
        frame = Frame(low, high, scale, 250, 178, (8, 10, 24, 32), results.budgets)
        told = plural(numbers[task], "question") if numbers.get(task) else ""
        figures.append(
            f"<figure><figcaption><h3>{escape(task)}</h3><span>{told}</span></figcaption>"
            f"{small_chart(frame, series, untouched[task], f'Accuracy on {task} by tokens kept')}"
            f'<p class="under">{_task_note(series, untouched[task], results.budgets)}</p></figure>'
        )
    return f'<div class="multiples">{"".join(figures)}</div>' if figures else ""


def _task_series(results: BenchResult, styles: Styles, task: str) -> list[Series]:
    rows = []
    for name in _drawing_order(results):
        points = []
        for cell in results.of(name):
            share = cell.task_share(task)
            if share is not None:
                where = f"{text.budget(cell.retain)}, {task}"
                figure = Interval(share)
                points.append(Point(cell.retain, figure, _told(cell, figure, where)))
        rows.append(Series(name, styles[name], points))
    return rows


def _untouched_on(results: BenchResult, task: str) -> Interval | None:
    share = results.untouched.task_share(task) if results.untouched else None
    return None if share is None else Interval(share)


def _task_note(
    series: Sequence[Series], untouched: Interval | None, budgets: Sequence[float]
) -> str:
    budget = nearest(budgets, 0.1)
    found = [(p.accuracy.value, row.name) for row in series for p in row.points if p.x == budget]
    notes = [f"untouched {text.percent(untouched.value, 0)}"] if untouched else []
    if found and budget is not None:
        best = max(value for value, _ in found)
        names = [name for value, name in found if value == best]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(
            f"best at {text.budget(budget)}: {text.percent(best, 0)}, "
            f"{escape(shorten(names[0], 26))}{more}"
        )
    return " · ".join(notes)
