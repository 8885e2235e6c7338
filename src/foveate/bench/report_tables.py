"""Tables of the bench page: ranking, costs, losses, failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from foveate._wording import digits, shorten
from foveate.bench import report_text as text
from foveate.bench.cells import Cell
from foveate.bench.plan import BASELINES
from foveate.bench.report_axes import accuracy_scale
from foveate.bench.report_curves import Style, interval_bar, mark
from foveate.bench.results import BenchResult, Standing
from foveate.bench.stats import Interval
from foveate.bench.store import UNTOUCHED

Styles = Mapping[str, Style]
_LEFT = ' class="left"'


def ranking(results: BenchResult, styles: Styles) -> str:
    """Recipes at each budget with what separates them from the untouched model and baselines."""
    return per_budget(results, "rank", lambda budget: _ranking_at(results, styles, budget))


def costs(results: BenchResult, styles: Styles) -> str:
    """Tokens, FLOPs, times and memory at each budget."""
    return per_budget(results, "cost", lambda budget: _costs_at(results, styles, budget))


def losses(results: BenchResult, styles: Styles) -> str:
    """A heat table of questions lost against the untouched model; "" where it has none to lose."""
    untouched = results.untouched
    if untouched is None or not any(a.correct for a in untouched.answers.values()):
        return ""
    return per_budget(results, "loss", lambda budget: _losses_at(results, styles, budget))


def failures(results: BenchResult) -> str:
    """Recipes that could not run, and why; "" when all could."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="left">{", ".join(map(text.budget, where))}</td>'
        f'<td class="wrap">{escape(why)}</td></tr>'
        for name, where, why in results.failures
    )
    if not rows:
        return ""
    return html_table(heads("<recipe", "<budgets", "<reason"), rows)


def left_out(results: BenchResult, most: int = 20) -> str:
    """Questions that were not asked and clips that were read in part; "" without any."""
    told = [
        f"{key}: {line}" for key in ("skipped", "damaged") for line in results.run.get(key) or []
    ]
    rows = "".join(f"<li>{escape(line)}</li>" for line in told[:most])
    if len(told) > most:
        rows += f"<li>and {len(told) - most} more, all of them in run.json</li>"
    return f'<ul class="notes">{rows}</ul>' if rows else ""


# -- ranking --------------------------------------------------------------------------------------


def _ranking_at(results: BenchResult, styles: Styles, budget: float) -> str:
    standings = results.standings(budget)
    untouched = results.untouched.accuracy if results.untouched else None
    figures = [row.accuracy for row in standings] + ([untouched] if untouched else [])
    bounds = accuracy_scale(figures).bounds
    # The ranking is in order, so the first baseline in it is the best.
    rival = next((row for row in standings if row.cell.recipe in BASELINES), None)
    hurdle = rival.accuracy.value if rival else None
    best = f"{rival.cell.recipe}, the best baseline" if rival else "the best baseline"

    def bar(interval: Interval, style: Style | None) -> str:
        return interval_bar(
            interval, bounds, untouched=untouched, best_baseline=hurdle, style=style
        )

    rows = []
    if untouched:
        rows.append(
            f'<tr class="base"><td></td>{who(UNTOUCHED, None)}<td>{bar(untouched, None)}</td>'
            f"{_accuracy(untouched)}<td></td><td></td><td></td></tr>"
        )
    for place, row in enumerate(standings, 1):
        name = row.cell.recipe
        rows.append(
            f'<tr class="s{styles[name].number}"><td>{place}</td>{who(name, styles[name])}'
            f"<td>{bar(row.accuracy, styles[name])}</td>{_accuracy(row.accuracy)}"
            f"{_difference(row.cell.difference)}{_difference(row.to_baseline)}"
            f'<td class="left">{_verdict(row)}</td></tr>'
        )
    scale = "".join(f"<span>{text.percent(bound, 0)} %</span>" for bound in bounds)
    columns = (
        f'{heads("#", "<recipe")}<th scope="col"><span class="ends">{scale}</span></th>'
        f"{heads('accuracy %', 'against untouched', f'against {best}', '<')}"
    )
    return html_table(columns, "".join(rows))


def _accuracy(interval: Interval) -> str:
    between = text.span(interval)
    small = f' <small class="i">{between}</small>' if between else ""
    return f"<td><b>{text.percent(interval.value)}</b>{small}</td>"


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return f'<td class="unsure">{text.DASH}</td>'
    style = "" if interval.excludes_zero else ' class="unsure"'
    between = text.span(interval, sign=True)
    small = f' <small class="i">{between}</small>' if between else ""
    return f"<td{style}>{text.percent(interval.value, sign=True)}{small}</td>"


def _verdict(row: Standing) -> str:
    chips = []
    for sure in (True, False):
        names = [name for name, excludes in row.below if excludes is sure]
        if names:
            word = "excludes" if sure else "includes"
            style = "chip sure" if sure else "chip"
            chips.append(
                f'<span class="{style}" title="95 % interval of the paired difference {word} 0">'
                f"below {escape(', '.join(names))} · {word} 0</span>"
            )
    return "<br/>".join(chips)


# -- costs ----------------------------------------------------------------------------------------


def _costs_at(results: BenchResult, styles: Styles, budget: float) -> str:
    untouched = results.untouched
    cells = ([untouched] if untouched else []) + results.at(budget)
    rows = "".join(_cost_row(cell, styles.get(cell.recipe)) for cell in cells)
    columns = heads(
        "<recipe",
        "<tokens by stage",
        "into the LLM",
        "per LLM layer",
        "FLOPs",
        "first token",
        "times untouched",
        "decode tokens/s",
        "peak memory",
        "<overhead",
    )
    return html_table(columns, rows)


def _cost_row(cell: Cell, style: Style | None) -> str:
    data = cell.figures
    number = f' class="s{style.number}"' if style else ' class="base"'
    timing = data.get("first_token") or {}
    between = ""
    if timing.get("low") is not None and timing.get("high") is not None:
        low, high = (text.duration(timing[end], cell.first_token) for end in ("low", "high"))
        between = f" <small>{low.rsplit(' ', 1)[0]} to {high.rsplit(' ', 1)[0]}</small>"
    flops, share = data.get("flops") or {}, ""
    if cell.flops_fraction is not None:
        share = f' <small class="p">{text.percent(cell.flops_fraction)} %</small>'
    rate = data.get("decode_tokens_per_second")
    overhead = data.get("overhead") or {}
    return (
        f"<tr{number}>{who(cell.recipe, style)}"
        f'<td class="left">{_stages(cell)}</td>'
        f"<td>{text.tokens(data.get('visual_after'))} "
        f"<small>of {text.tokens(data.get('visual_before'))}</small></td>"
        f"<td>{text.tokens(cell.visual_per_layer)}</td>"
        f"<td>{text.flops(flops.get('reduced'), flops.get('untouched'))}{share}</td>"
        f"<td>{text.duration(cell.first_token)}{between}</td>"
        f"<td>{ratio(cell)}</td>"
        f"<td>{text.DASH if rate is None else f'{digits(rate)}'}</td>"
        f"<td>{text.memory(data.get('peak_memory'))}</td>"
        f'<td class="left">{_overhead(overhead)}</td></tr>'
    )


def ratio(cell: Cell) -> str:
    """Time to the first token as a multiple of the untouched model's."""
    found = cell.first_token_ratio
    return text.DASH if found is None else f"{found:.2f}{text.TIMES}"


def _stages(cell: Cell) -> str:
    rows = cell.stage_rows()
    return (
        "<br/>".join(
            f"{escape(row['stage'])}: {text.tokens(row['before'])} → {text.tokens(row['after'])}"
            f" <small>{text.percent(row['retained'], 0)} %</small>"
            for row in rows
        )
        or text.DASH
    )


def _overhead(seconds: Mapping[str, float]) -> str:
    entries = [
        f"<small>{escape(stage)}</small> {text.duration(took)}" for stage, took in seconds.items()
    ]
    return "<br/>".join(entries) or text.DASH


# -- losses ---------------------------------------------------------------------------------------


def _losses_at(results: BenchResult, styles: Styles, budget: float) -> str:
    tasks = results.tasks
    rows = []
    for cell in results.at(budget):
        name = cell.recipe
        shares = "".join(_loss(cell, task) for task in (None, *tasks))
        rows.append(f'<tr class="s{styles[name].number}">{who(name, styles[name])}{shares}</tr>')
    columns = heads("<recipe", "all", *tasks)
    return html_table(columns, "".join(rows), "heat") + _hardest(results, budget)


def _loss(cell: Cell, task: str | None) -> str:
    found = cell.losses(task)
    if found is None or found.share is None:
        return f'<td class="h" style="--w:0%">{text.DASH}</td>'
    told = (
        f"lost {found.lost} of {found.held} that untouched answers, "
        f"gained {found.gained} of {found.missed} that it does not"
    )
    # Deeper than this, text on it could not be read in dark mode.
    weight = min(75, round(100 * found.share))
    return f'<td class="h" style="--w:{weight}%" title="{told}">{text.percent(found.share, 0)}</td>'


def _hardest(results: BenchResult, budget: float) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(answer.id)}</th><td class="left">{escape(answer.task)}</td>'
        f'<td class="left">{escape(shorten(answer.text, 60))}</td>'
        f"<td>{lost} of {number}</td></tr>"
        for answer, lost, number in results.hardest(budget)
    )
    if not rows:
        return ""
    return (
        '<p class="more lead">Questions that the untouched model answers and most recipes lose:</p>'
        + html_table(heads("<question", "<task", "<right answer", "lost by"), rows, "short")
    )


# -- helpers --------------------------------------------------------------------------------------


def who(name: str, style: Style | None) -> str:
    """The cell that says which recipe a row is about."""
    sign = mark(style) if style else ""
    shown = escape(name).replace("@", "<wbr/>@")
    return f'<th scope="row"><span class="who">{sign}<span>{shown}</span></span></th>'


def heads(*names: str) -> str:
    """Column heads; a name that starts with "<" stands to the left."""
    return "".join(
        f'<th scope="col"{_LEFT if name.startswith("<") else ""}>'
        f"{escape(name.removeprefix('<'))}</th>"
        for name in names
    )


def html_table(columns: str, rows: str, style: str = "") -> str:
    """A table that scrolls where it is too wide."""
    named = f' class="{style}"' if style else ""
    return (
        f'<div class="scroll" tabindex="0"><table{named}><thead><tr>{columns}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def per_budget(results: BenchResult, name: str, sheet: Callable[[float], str]) -> str:
    """One sheet per budget behind radio buttons, which need no script; all of them in print."""
    budgets: Sequence[float] = results.budgets
    shown = nearest(budgets, 0.1)
    switches, sheets = [], []
    for number, budget in enumerate(budgets):
        checked = ' checked="checked"' if budget == shown else ""
        switches.append(
            f'<input type="radio" class="t{number}" name="{name}" id="{name}{number}"{checked}/>'
            f'<label for="{name}{number}">{text.budget(budget)}</label>'
        )
        sheets.append(
            f'<section class="sheet n{number}"><h3>{text.budget(budget)} kept</h3>'
            f"{sheet(budget)}</section>"
        )
    return f'<div class="tabs">{"".join(switches)}{"".join(sheets)}</div>'


def nearest(budgets: Sequence[float], wanted: float) -> float | None:
    """The budget closest to a wanted one; None when there is none."""
    return min(budgets, key=lambda b: (abs(b - wanted), b), default=None)
