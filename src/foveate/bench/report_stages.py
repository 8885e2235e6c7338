"""Where the time of a question goes, from the file to the answer: bars.

Legend: nothing here is a tensor; times are seconds.
"""

from __future__ import annotations

from html import escape

from foveate.bench import report_text as text
from foveate.bench.cells import Cell
from foveate.bench.report_markdown import TIMED_HEADS, timed_figures
from foveate.bench.report_tables import Styles, heads, html_table, per_budget, who
from foveate.bench.results import BenchResult
from foveate.core.timeline import TIMED_STAGES

_WIDTH, _HEIGHT = 300, 12


def stage_bars(results: BenchResult, styles: Styles) -> str:
    """A stacked bar for every recipe, budget by budget; "" where no cell was timed by stage."""
    if not any(cell.stage_seconds for cell in results.cells):
        return ""
    return _key() + per_budget(results, "time", lambda budget: _bars_at(results, styles, budget))


def _key() -> str:
    signs = "".join(
        f'<span><svg class="sign" aria-hidden="true"><rect class="stage{number}" width="14" '
        f'height="14"/></svg>{stage}</span>'
        for number, stage in enumerate(TIMED_STAGES)
    )
    return f'<p class="stages">{signs}</p>'


def _bars_at(results: BenchResult, styles: Styles, budget: float) -> str:
    untouched = results.untouched
    cells = ([untouched] if untouched else []) + results.at(budget)
    timed = [cell for cell in cells if cell.stage_seconds]
    if not timed:
        return f"<p>{text.DASH}</p>"
    longest = max(sum(cell.stage_seconds.values()) for cell in timed)
    rows = []
    for cell in sorted(timed, key=lambda cell: sum(cell.stage_seconds.values())):
        style = styles.get(cell.recipe)
        number = f' class="s{style.number}"' if style else ' class="base"'
        figures = "".join(f"<td>{figure}</td>" for figure in timed_figures(cell))
        rows.append(
            f"<tr{number}>{who(cell.recipe, style)}<td>{_bar(cell, longest)}</td>{figures}</tr>"
        )
    return html_table(heads("<recipe", "<", *TIMED_HEADS), "".join(rows))


def _bar(cell: Cell, longest: float) -> str:
    """The stages of one recipe side by side; the longest bar of a sheet fills the width."""
    parts, left = [], 0.0
    for number, stage in enumerate(TIMED_STAGES):
        seconds = cell.stage_seconds.get(stage, 0.0)
        width = _WIDTH * seconds / longest if longest else 0.0
        if width > 0:
            told = escape(f"{stage} {text.duration(seconds)}")
            parts.append(
                f'<rect class="stage{number}" x="{left:.1f}" y="0" width="{width:.1f}" '
                f'height="{_HEIGHT}"><title>{told}</title></rect>'
            )
        left += width
    said = ", ".join(f"{stage} {text.duration(s)}" for stage, s in cell.stage_seconds.items() if s)
    return (
        f'<svg class="bar" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{text.attribute(said)}">{"".join(parts)}</svg>'
    )
