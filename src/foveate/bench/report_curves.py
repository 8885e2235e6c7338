"""Accuracy curves as inline SVG: no script, no font; colours come from CSS classes.

Legend: x and y are in units of the drawing; accuracies and shares are fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from foveate._wording import shorten
from foveate.bench.report_axes import Frame, spread
from foveate.bench.report_text import attribute, percent, span
from foveate.bench.stats import Interval

#: Recipes beyond these are drawn thinner until they are pointed at.
LEADERS = 8
_LABEL_STEP = 15.5
# Corners of the marks around their middle, in radii; the first is a circle.
_CORNERS = (
    (),
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
)


@dataclass(frozen=True)
class Point:
    """One cell on a curve: where it lies, how sure it is, and what is said about it."""

    x: float
    accuracy: Interval
    title: str


@dataclass(frozen=True)
class Series:
    """One recipe: its points in drawing order and its look."""

    name: str
    style: Style
    points: Sequence[Point]


@dataclass(frozen=True)
class Style:
    """The look of a recipe in every chart of a page.

    Args:
        number: of its classes "s3" and its checkbox "pick3".
        colour: class "c0" to "c7" for recipes, "b0" to "b3" for baselines.
        shape: of its marks.
        leads: whether it is drawn at full strength.
    """

    number: int
    colour: str
    shape: int
    leads: bool

    @property
    def classes(self) -> str:
        strength = "" if self.leads else " faint"
        return f"series s{self.number} {self.colour}{strength}"


def curve_chart(
    frame: Frame,
    series: Sequence[Series],
    *,
    untouched: Interval | None,
    title: str,
    axis: str,
    dodge: float = 0.0,
) -> str:
    """Curves with whiskers and a label at the end of every line.

    Args:
        frame: plot area; made higher when the labels need it.
        series: one entry per recipe, best first.
        untouched: the horizontal line, with its interval as a band.
        title: read out in place of the picture.
        axis: what the horizontal axis shows.
        dodge: how far points are moved to either side, so that whiskers at one budget do not
            hide each other.
    """
    shown = [entry for entry in series if entry.points]
    room = len(shown) * _LABEL_STEP + frame.margins[0] + frame.margins[2]
    frame.height = max(frame.height, room)
    shifts = _shifts(len(shown), dodge)
    ends = [frame.y(entry.points[-1].accuracy.value) for entry in shown]
    order = sorted(range(len(shown)), key=lambda n: (ends[n], n))
    places = spread(
        [ends[n] for n in order], _LABEL_STEP, frame.margins[0] + 4, frame.height - frame.margins[2]
    )
    place_of = dict(zip(order, places, strict=True))
    drawn = [
        _series(frame, entry, shifts[n], place_of[n], whiskers=True)
        for n, entry in enumerate(shown)
    ]
    # The best are drawn last, on top.
    body = _grid(frame, axis) + _untouched(frame, untouched) + "".join(reversed(drawn))
    return _svg(frame, body, title, "chart curves")


def small_chart(
    frame: Frame, series: Sequence[Series], untouched: Interval | None, title: str
) -> str:
    """Curves without labels or whiskers, for a row of charts with the same axes."""
    drawn = [_series(frame, entry, 0.0, None, whiskers=False) for entry in series if entry.points]
    body = _grid(frame, "") + _untouched(frame, untouched, named=False) + "".join(reversed(drawn))
    return _svg(frame, body, title, "chart small")


def mark(style: Style) -> str:
    """The sign of a recipe for legends and tables."""
    line = '<line class="stroke" x1="1" x2="23" y1="7" y2="7"/>'
    return (
        f'<svg class="sign {style.colour}" viewBox="0 0 24 14" aria-hidden="true">{line}'
        f"{_symbol(style.shape, 12, 7, 4.2)}</svg>"
    )


def interval_bar(
    interval: Interval,
    bounds: tuple[float, float],
    *,
    untouched: Interval | None,
    best_baseline: float | None,
    style: Style | None,
) -> str:
    """One row of a ranking: the figure and its interval on an axis that all rows share."""
    width, height = 170.0, 20.0
    low, high = bounds

    def x(value: float) -> float:
        return 6 + (width - 12) * (value - low) / (high - low)

    parts = []
    if untouched is not None:
        if untouched.known:
            parts.append(
                f'<rect class="band" x="{x(untouched.low):.1f}" y="0" '
                f'width="{x(untouched.high) - x(untouched.low):.1f}" height="{height:.0f}"/>'
            )
        parts.append(_line("reference", x(untouched.value), x(untouched.value), 0, height))
    if best_baseline is not None:
        parts.append(_line("hurdle", x(best_baseline), x(best_baseline), 0, height))
    inner = ""
    if interval.known:
        inner += _line("stroke", x(interval.low), x(interval.high), height / 2, height / 2)
    inner += _symbol(style.shape if style else 0, x(interval.value), height / 2, 4.6)
    parts.append(f'<g class="{style.colour if style else "ink"}">{inner}</g>')
    return (
        f'<svg class="interval" viewBox="0 0 {width:.0f} {height:.0f}" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


# -- parts ----------------------------------------------------------------------------------------


def _shifts(count: int, reach: float) -> list[float]:
    return [reach * (2 * n / (count - 1) - 1) if count > 1 else 0.0 for n in range(count)]


def _grid(frame: Frame, axis: str) -> str:
    parts = []
    small = not axis
    base = frame.height - frame.margins[2]
    for level in frame.scale.levels:
        y = frame.y(level)
        unit = " %" if level == frame.scale.levels[-1] and not small else ""
        parts.append(_line("rule", frame.left, frame.right, y, y))
        parts.append(_text(frame.left - 8, y + 4, percent(level, 0) + unit, "end"))
    for tick in frame.ticks:
        x = frame.x(tick)
        parts.append(_line("rule tick", x, x, base, base + 5))
        parts.append(
            _text(
                x, base + 18, f"{100 * tick:.4g} %" if not small else f"{100 * tick:.4g}", "middle"
            )
        )
    if axis:
        middle = (frame.left + frame.right) / 2
        parts.append(_text(middle, base + 40, axis, "middle", "axis"))
    return f'<g class="grid">{"".join(parts)}</g>'


def _untouched(frame: Frame, untouched: Interval | None, named: bool = True) -> str:
    if untouched is None:
        return ""
    y = frame.y(untouched.value)
    text = f"untouched {percent(untouched.value)} %"
    between = f" ({span(untouched)})" if span(untouched) else ""
    parts = [f"<title>{escape(text + between)}</title>"]
    if untouched.known:
        top, bottom = frame.y(untouched.high), frame.y(untouched.low)
        parts.append(
            f'<rect class="band" x="{frame.left:.1f}" y="{top:.1f}" '
            f'width="{frame.right - frame.left:.1f}" height="{bottom - top:.1f}"/>'
        )
    parts.append(_line("reference", frame.left, frame.right, y, y))
    if named:
        parts.append(_text(frame.left + 6, y - 6, text, "start", "label halo"))
    return f'<g class="untouched">{"".join(parts)}</g>'


def _series(
    frame: Frame, entry: Series, shift: float, label_y: float | None, *, whiskers: bool
) -> str:
    places = [(frame.x(p.x) + shift, frame.y(p.accuracy.value), p) for p in entry.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    parts = []
    if len(places) > 1:
        # A wide invisible line beneath, so that a thin one can be pointed at.
        parts.append(f'<polyline class="touch" points="{line}"/>')
        parts.append(f'<polyline class="stroke" points="{line}"/>')
    if whiskers:
        for x, _, p in places:
            if p.accuracy.known:
                low, high = frame.y(p.accuracy.low), frame.y(p.accuracy.high)
                parts.append(_line("whisker", x, x, low, high))
    radius = 4.4 if whiskers else 3.2
    parts += [
        f"<g>{_symbol(entry.style.shape, x, y, radius)}<title>{escape(p.title)}</title></g>"
        for x, y, p in places
    ]
    if label_y is not None:
        x, y, last = places[-1]
        start = frame.right + 26
        parts.append(
            f'<polyline class="leader" points="{x + 6:.1f},{y:.1f} '
            f'{start - 10:.1f},{label_y:.1f} {start - 5:.1f},{label_y:.1f}"/>'
        )
        parts.append(_symbol(entry.style.shape, start + 2, label_y, 3.8))
        value = percent(last.accuracy.value)
        parts.append(
            f'<text class="name" x="{start + 12:.1f}" y="{label_y + 4:.1f}">'
            f"{escape(shorten(entry.name, 22))} <tspan>{value}</tspan>"
            f"<title>{escape(last.title)}</title></text>"
        )
    return (
        f'<g class="{entry.style.classes}" data-recipe="{attribute(entry.name)}">'
        f"{''.join(parts)}</g>"
    )


def _symbol(shape: int, x: float, y: float, r: float) -> str:
    points = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in _CORNERS[shape % 4])
    if points:
        return f'<polygon class="dot" points="{points}"/>'
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'


def _line(style: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(frame: Frame, body: str, title: str, style: str) -> str:
    return (
        f'<svg class="{style}" viewBox="0 0 {frame.width:.0f} {frame.height:.0f}" role="img" '
        f'aria-label="{attribute(title)}">{body}</svg>'
    )
