"""The timeline of a call: one lane per stage, chunks beside each other, and what it says in words.

Seconds from the beginning of the call.
"""

from __future__ import annotations

from html import escape

from foveate._wording import duration
from foveate.core.timeline import TIMED_STAGES, Span, Timeline
from foveate.view.charts import PART_CLASSES

_WIDTH, _LEFT, _RIGHT, _TOP = 960, 84, 92, 8
_LANE, _BAR = 34, 22
#: Bars narrower than this, in pixels, are drawn so wide all the same, to be seen.
_THIN = 1.2
#: Chunk numbers are written into bars at least so wide.
_WIDE = 16
#: Bars of a lane beyond which neighbours are joined.
_MANY = 400


def timeline_chart(timeline: Timeline | None) -> str:
    """A Gantt chart as inline SVG with its caption; "" where nothing was noted."""
    if timeline is None or not timeline.spans or timeline.total() <= 0:
        return ""
    total = timeline.total()
    stages = [stage for stage in TIMED_STAGES if stage in timeline.seconds()]
    scale = (_WIDTH - _LEFT - _RIGHT) / total
    bottom = _TOP + len(stages) * _LANE
    parts = [_axis(total, scale, bottom)]
    for lane, stage in enumerate(stages):
        parts.append(_lane(timeline, stage, lane, scale))
    words = describe_timeline(timeline)
    return (
        f'<svg class="chart timeline" viewBox="0 0 {_WIDTH} {bottom + 26}" role="img" '
        f'aria-label="{escape("Timeline. " + words, quote=True)}">{"".join(parts)}</svg>'
        f'<p class="timeline-words">{escape(words)}</p>'
    )


def describe_timeline(timeline: Timeline) -> str:
    """What a timeline says, in sentences.

    Example:
        >>> line = Timeline()
        >>> line.add("decode", 0.0, 2.0, part=0)
        >>> line.add("encode", 1.5, 3.0, part=0)
        >>> print(describe_timeline(line))
        3.00 s in all; the stages were at work for 3.50 s, 500 ms of it side by side.
    """
    total, saved = timeline.total(), timeline.overlap()
    chunks = {span.part for span in timeline.spans if span.part >= 0}
    words = f"{duration(total)} in all"
    if saved > 1e-3 * total:
        words += f"; the stages were at work for {duration(sum(timeline.seconds().values()))}"
        words += f", {duration(saved)} of it side by side"
    elif len(timeline.seconds()) > 1:
        words += ", one stage after another"
    if len(chunks) > 1:
        words += f"; the clip was read in {len(chunks)} chunks"
    return words + "."


def _axis(total: float, scale: float, bottom: float) -> str:
    parts = []
    for seconds in _ticks(total):
        x = _LEFT + seconds * scale
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{_seconds(seconds, total)}</text>"
        )
    return "".join(parts)


def _lane(timeline: Timeline, stage: str, lane: int, scale: float) -> str:
    y = _TOP + lane * _LANE + (_LANE - _BAR) / 2
    text = y + _BAR * 0.72
    spans = _joined([span for span in timeline.spans if span.stage == stage], 1 / scale)
    bars = "".join(_bar(span, y, scale) for span in spans)
    right = _LEFT + max(span.stop for span in spans) * scale
    colour = PART_CLASSES[TIMED_STAGES.index(stage)]
    return (
        f'<text class="label" x="{_LEFT - 10}" y="{text:.1f}" text-anchor="end">{stage}</text>'
        f'<g class="{colour}">{bars}</g>'
        f'<text class="tick" x="{right + 6:.1f}" y="{text:.1f}">'
        f"{escape(duration(timeline.seconds()[stage]))}</text>"
    )


def _bar(span: Span, y: float, scale: float) -> str:
    x, width = _LEFT + span.start * scale, max(_THIN, (span.stop - span.start) * scale - 0.6)
    what = f"{span.stage}, chunk {span.part + 1}" if span.part >= 0 else span.stage
    title = f"{what}: {duration(span.stop - span.start)} from {duration(span.start)}"
    bar = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" rx="2">'
        f"<title>{escape(title)}</title></rect>"
    )
    if span.part < 0 or width < _WIDE:
        return bar
    return bar + (
        f'<text class="chunk" x="{x + width / 2:.1f}" y="{y + _BAR * 0.7:.1f}" '
        f'text-anchor="middle">{span.part + 1}</text>'
    )


def _joined(spans: list[Span], pixel: float) -> list[Span]:
    """The spans of a lane; where there are very many, those less than a pixel apart as one."""
    if len(spans) <= _MANY:
        return spans
    found = [spans[0]]
    for span in spans[1:]:
        last = found[-1]
        if span.start - last.stop < pixel and span.stop - last.start < 4 * pixel:
            found[-1] = Span(last.start, max(last.stop, span.stop), span.stage, -1)
        else:
            found.append(span)
    return found


def _ticks(total: float) -> list[float]:
    """Round seconds, about six of them."""
    step = 10.0**-6
    while total / step > 7:
        for factor in (2, 2.5, 2):
            step *= factor
            if total / step <= 7:
                break
    return [number * step for number in range(int(total / step) + 1)]


def _seconds(value: float, total: float) -> str:
    if total < 0.5:
        return f"{1e3 * value:g} ms"
    return f"{value:.4g} s"
