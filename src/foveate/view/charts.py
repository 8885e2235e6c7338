"""Small inline SVG charts: no script, no font, readable by a screen reader.

Colours come from CSS classes, so that one drawing serves light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from foveate._wording import count, duration, flops

_WIDTH, _LEFT, _RIGHT = 520, 56, 14
PART_CLASSES = ("p0", "p1", "p2", "p3", "p4", "p5")


def steps_chart(series: Sequence[tuple[str, str, Sequence[float]]], title: str, axis: str) -> str:
    """Step lines over layers.

    Args:
        series: (name, CSS class, one value per layer).
        title: read out in place of the picture.
        axis: what the horizontal axis counts.
    """
    series = [entry for entry in series if len(entry[2])]
    height, top, bottom = 190, 12, 34
    most = max(max(values) for _, _, values in series) or 1
    layers = max(len(values) for _, _, values in series)
    span_x, span_y = _WIDTH - _LEFT - _RIGHT, height - top - bottom
    parts = []
    for share in (0, 0.5, 1):
        y = top + span_y * (1 - share)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(_LEFT - 8, y + 4, count(most * share), "end"))
    for name, style, values in series:
        points = []
        for layer, value in enumerate(values):
            y = top + span_y * (1 - value / most)
            x0, x1 = (_LEFT + span_x * edge / layers for edge in (layer, layer + 1))
            points.append(f"{x0:.1f},{y:.1f} {x1:.1f},{y:.1f}")
        line = " ".join(points)
        if style == "area":
            base, end = top + span_y, _LEFT + span_x * len(values) / layers
            parts.append(f'<polygon class="area" points="{_LEFT},{base} {line} {end:.1f},{base}"/>')
        parts.append(
            f'<polyline class="line {style}" points="{line}"><title>{escape(name)}</title>'
            "</polyline>"
        )
    parts.append(_text(_LEFT, height - 14, "0"))
    parts.append(_text(_WIDTH - _RIGHT, height - 14, str(layers - 1), "end"))
    parts.append(_text(_LEFT + span_x / 2, height - 14, axis, "middle"))
    return _svg(parts, height, title)


def bars_chart(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], title: str, parts: Sequence[str]
) -> str:
    """Horizontal stacked bars.

    Args:
        rows: (label, [(part, value)], text behind the bar).
        title: read out in place of the picture.
        parts: names of all parts, in the order of their colours.
    """
    left, right, step = 124, 116, 34
    most = max((sum(value for _, value in values) for _, values, _ in rows), default=0) or 1
    scale = (_WIDTH - left - right) / most
    drawn = []
    for number, (label, values, text) in enumerate(rows):
        y, x = number * step + 8, float(left)
        drawn.append(_text(left - 10, y + 16, label, "end", "label"))
        for part, value in values:
            style = PART_CLASSES[parts.index(part) % len(PART_CLASSES)]
            drawn.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y}" width="{value * scale:.1f}" '
                f'height="22"><title>{escape(part)}</title></rect>'
            )
            x += value * scale
        drawn.append(_text(x + 8, y + 16, text))
    return _svg(drawn, len(rows) * step + 10, title)


def legend(parts: Sequence[str]) -> str:
    """Names beside the colours of `bars_chart`."""
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 12 12" aria-hidden="true"><rect width="12" height="12" '
        f'rx="3" class="{PART_CLASSES[number % len(PART_CLASSES)]}"/></svg>{escape(part)}</li>'
        for number, part in enumerate(parts)
    )
    return f'<ul class="keys">{keys}</ul>'


def flops_chart(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Untouched against reduced FLOPs, stacked by part; "" when nothing was counted."""
    untouched, reduced = figures.get("untouched", {}), figures.get("reduced", {})
    parts = [p for p in untouched if p != "total" and (untouched[p] or reduced.get(p))]
    if not parts:
        return ""
    rows = [
        (name, [(part, values.get(part, 0.0)) for part in parts], flops(_total(values, parts)))
        for name, values in (("untouched", untouched), ("reduced", reduced))
    ]
    return bars_chart(rows, "FLOPs, untouched and reduced, by part", parts) + legend(parts)


def seconds_chart(figures: Mapping[str, float]) -> str:
    """One bar per stage, in seconds; "" when nothing was timed."""
    if not figures:
        return ""
    rows = [(name, [(name, value)], duration(value)) for name, value in figures.items()]
    # One colour: the labels stand beside the bars already.
    one = [(label, [("time", value)], text) for label, [(_, value)], text in rows]
    return bars_chart(one, "Seconds by stage", ["time"])


def layers_chart(layer_lengths: Any, cache_lengths: Any) -> str:
    """Tokens in every decoder layer, and keys left in its cache, of one sample."""
    series = []
    if len(layer_lengths):
        series.append(("tokens in the layer", "area", layer_lengths))
    if len(cache_lengths) and list(cache_lengths) != list(layer_lengths):
        series.append(("keys in its cache", "dashed", cache_lengths))
    if not series:
        return ""
    return steps_chart(series, "Tokens in every decoder layer during prefill", "decoder layer")


def blocks_chart(block_lengths: Sequence[int]) -> str:
    """Tokens in front of every block of an encoder; "" when they were not counted."""
    if not len(block_lengths):
        return ""
    series = [("tokens in front of the block", "area", block_lengths)]
    return steps_chart(series, "Tokens in front of every encoder block", "encoder block")


def _total(values: Mapping[str, float], parts: Sequence[str]) -> float:
    return values.get("total") or sum(values.get(part, 0.0) for part in parts)


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'
    )
