"""Charts of encoder_quality.py: a panel per source, a line per method, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: A colour and a mark per method, told apart without colour too.
COLOURS = (
    "#0072b2",
    "#56b4e9",
    "#d55e00",
    "#e69f00",
    "#009e73",
    "#8c6d31",
    "#cc79a7",
    "#7b3294",
    "#777777",
)
MARKS = ("circle", "square", "up", "down", "diamond")
WIDTH, TOP, HIGH, LEFT, GAP = 900, 56, 270, 62, 26
#: Cosines that get a line; those of a panel lie evenly by their distance from 1.
COSINES = (0.9999, 0.9995, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4)


def chart(
    panels: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str, names: Sequence[str]
) -> str:
    """One SVG: the figure `key` over the share of FLOPs.

    Args:
        panels: heading -> rows with "method", "retain", "flops" and the figure.
        key: "same", a share, or a cosine, whose distance from 1 is drawn on a logarithmic scale.
        title: of the chart.
        names: of all methods, in the order of their colours.
    """
    rows = [row for found in panels.values() for row in found]
    if not rows:
        raise ValueError("there is nothing to draw: measure something first.")
    wide = (WIDTH - LEFT - 16 - GAP * (len(panels) - 1)) / len(panels)
    height, ticks = _scale([row[key] for row in rows], key)
    low = min(row["flops"] for row in rows) - 0.01
    high = max(1.0, *(row["flops"] for row in rows)) + 0.01
    bottom = TOP + HIGH
    parts = [f'<text x="{LEFT}" y="20" font-size="15" fill="#222">{title}</text>']
    for number, (heading, found) in enumerate(panels.items()):
        left = LEFT + number * (wide + GAP)

        def across(share: float, left: float = left) -> float:
            return left + (share - low) / (high - low) * wide

        parts.append(
            f'<text x="{left}" y="{TOP - 12}" fill="#222" font-weight="600">{heading}</text>'
        )
        for value, text in ticks:
            y = TOP + HIGH * (1 - height(value))
            parts.append(
                f'<line x1="{left}" x2="{left + wide:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                'stroke="#ddd"/>'
            )
            if number == 0:
                parts.append(_text(left - 7, y + 4, text, "end"))
        for percent in range(10 * math.ceil(10 * low), round(100 * high) + 1, 10):
            parts.append(_text(across(percent / 100), bottom + 17, f"{percent} %"))
        whole = across(1.0)
        parts.append(
            f'<line x1="{whole:.1f}" x2="{whole:.1f}" y1="{TOP}" y2="{bottom}" '
            'stroke="#999" stroke-dasharray="2 3"/>'
        )
        for name in names:
            mine = sorted((r for r in found if r["method"] == name), key=lambda r: -r["retain"])
            points = [(across(r["flops"]), TOP + HIGH * (1 - height(r[key]))) for r in mine]
            parts += _line(points, names.index(name))
    parts.append(_text(WIDTH / 2, bottom + 38, "FLOPs of the encoder, as a share of the untouched"))
    parts += _legend(names, bottom + 62)
    tall = bottom + 62 + 22 * -(-len(names) // 5)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" role="img" '
        f'font-family="sans-serif" font-size="13"><title>{title}</title>'
        f'<rect width="{WIDTH}" height="{tall}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _scale(
    values: Sequence[float], key: str
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Height of a value in a panel, 0 to 1, and the values that get a line, with their text."""
    if key == "same":
        low = math.floor(10 * min(values)) / 10
        steps = range(round(10 * low), 11)
        return lambda v: (v - low) / (1 - low), [(s / 10, f"{10 * s} %") for s in steps]
    far, near = (math.log10(1 - value) for value in (min(values), max(values)))
    room = 0.05 * (far - near)

    def height(value: float) -> float:
        return (far + room - math.log10(1 - value)) / (far - near + 2 * room)

    return height, [(v, f"{v:g}") for v in COSINES if 0 <= height(v) <= 1]


def _line(points: Sequence[tuple[float, float]], number: int) -> list[str]:
    colour, dashes = COLOURS[number], ' stroke-dasharray="6 4"' if number == 8 else ""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>',
        *(_mark(x, y, number) for x, y in points),
    ]


def _mark(x: float, y: float, number: int) -> str:
    colour, kind, r = COLOURS[number], MARKS[number % len(MARKS)], 4.5
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r - 0.5}" fill="{colour}"/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "up": ((-1, 0.9), (1, 0.9), (0, -1.1)),
        "down": ((-1, -0.9), (1, -0.9), (0, 1.1)),
        "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
    }[kind]
    spots = " ".join(f"{x + 0.9 * r * i:.1f},{y + 0.9 * r * j:.1f}" for i, j in corners)
    return f'<polygon points="{spots}" fill="{colour}"/>'


def _legend(names: Sequence[str], top: float) -> list[str]:
    parts, step = [], (WIDTH - LEFT) / 5
    for number, name in enumerate(names):
        x, y = LEFT + number % 5 * step, top + 22 * (number // 5)
        parts += _line([(x, y), (x + 26, y)], number)[:1]
        parts += [_mark(x + 13, y, number), _text(x + 33, y + 4, name, "start", "#222")]
    return parts


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
