"""One image or video of a report as HTML: its time line and its frames with their overlays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from foveate._wording import count, plural
from foveate.core.report import ItemReport, Report
from foveate.view.draw import item_pictures, plane_label
from foveate.view.evidence import evidence_layers, evidence_tools
from foveate.view.layout import ItemView, view_item
from foveate.view.pictures import Thumbnail, packed_alive, packed_groups, thumbnails

#: Planes of one item that are drawn; of longer videos every k-th is.
MAX_PLANES = 160


def item_section(item: ItemReport, number: int, report: Report, frames: Any, budget: int) -> str:
    """The section of one item.

    Args:
        item: what to draw.
        number: its place in the report.
        report: the report.
        frames: uint8 [T, 3, h, w] to draw on; None takes the item's own pixels.
        budget: bytes that its pictures may take as text.
    """
    view = view_item(item)
    step = -(-len(view.planes) // MAX_PLANES)
    shown = range(0, len(view.planes), step)
    pictures = item_pictures(item, len(view.planes), frames)
    # Without a time line there is room to show a picture untouched beside what was kept.
    twin = item.modality == "image" and len(view.planes) == 1 and pictures[0] is not None
    thumbs = thumbnails(view, pictures, shown, budget // 2 if twin else budget)
    several = len({entry.sample for entry in report.items}) > 1
    name = item.modality.capitalize() + (f" {number + 1}" if len(report.items) > 1 else "")
    name += f", sample {item.sample + 1}" if several else ""
    name = item.name or name
    cards = _untouched(view, thumbs[0]) if twin else ""
    cards += "".join(
        _card(view, plane, thumb, number) for plane, thumb in zip(shown, thumbs, strict=True)
    )
    aspect = thumbs[0].width / thumbs[0].height
    wide = round(min(max(210 * aspect**0.5, 170), 330)) if len(shown) > 2 else 460
    many = " many" if len(shown) > 64 else ""
    data = (
        f' data-groups="{packed_groups(view)}" data-tokens="{view.num_groups}"'
        f' data-wide="{int(view.num_groups >= 2**16 - 1)}" data-alive="{packed_alive(view)}"'
    )
    return (
        f'<section class="item" aria-label="{escape(name, quote=True)}"{data}>'
        f"<header><h2>{escape(name)}</h2><p>{_summary(item, view, step)}</p></header>"
        f"{_axis(view, number) if len(view.planes) > 1 else ''}{_bands(item, view)}"
        f"{_depth(view, number)}{evidence_tools(evidence_layers(item, shown), number)}"
        f'<div class="frames{many}" style="--wide:{wide}px">{cards}</div></section>'
    )


def _summary(item: ItemReport, view: ItemView, step: int) -> str:
    patches = sum(plane.num_patches for plane in view.planes)
    dropped = sum(plane.num_dropped for plane in view.planes)
    merged = sum(plane.num_merged for plane in view.planes)
    parts = [
        f"{count(item.after)} of {count(item.before)} tokens",
        f"{count(patches - dropped - merged)} patches kept as they are",
    ]
    if merged:
        parts.append(f"{count(merged)} merged into {count(view.num_colours)} tokens")
    if dropped:
        parts.append(f"{count(dropped)} dropped")
    for name, kept, before in view.specials:
        parts.append(f"{count(kept)} of {count(before)} {name} tokens")
    if view.segments:
        parts.append(f"{count(len(view.segments))} {view.segment_name}")
    if item.reduction is not None and item.reduction.kind == "synthesise":
        parts.append(f"{count(item.after)} new tokens that stand for no single patch")
    if step > 1:
        parts.append(f"one frame in {step} shown")
    return escape(" · ".join(parts))


def _axis(view: ItemView, number: int) -> str:
    """Tokens per frame over time, with the segments below; every bar leads to its frame."""
    starts, end = _spans(view)
    most = max(max(plane.num_tokens for plane in view.planes), 1)
    edges = [*starts, end]
    span = (end - starts[0]) or 1.0
    step = -(-len(view.planes) // MAX_PLANES)
    parts = []
    for plane, entry in enumerate(view.planes):
        left = 100 * (starts[plane] - starts[0]) / span
        width = 100 * (edges[plane + 1] - edges[plane]) / span
        label = f"{plane_label(view, plane)}: {entry.num_tokens} tokens"
        style, card = _segment_style(view, plane), f"#f{number}-{plane // step * step}"
        parts.append(
            f'<a class="col {style}" href="{card}" '
            f'style="left:{left:.3f}%;width:{width:.3f}%" aria-label="{label}" title="{label}">'
            f'<i style="height:{max(100 * entry.num_tokens / most, 1.5):.1f}%"></i></a>'
        )
    parts.append(_runs(view, view.segments, view.segment_name))
    for plane in sorted({0, len(starts) // 4, len(starts) // 2, 3 * len(starts) // 4}):
        left = 100 * (starts[plane] - starts[0]) / span
        parts.append(_time(left, plane_label(view, plane), "" if plane else " first"))
    unit = f"{end:.2f} s" if view.seconds is not None else f"{len(starts)} frames"
    parts.append(_time(100, unit, " last"))
    return (
        f'<div class="axis" role="group" aria-label="Tokens per frame over time, at most {most}">'
        f"{''.join(parts)}</div>"
    )


def _runs(view: ItemView, runs: Sequence[tuple[int, int]], name: str) -> str:
    """Runs of frames as bars along the time line."""
    starts, end = _spans(view)
    edges, span = [*starts, end], (end - starts[0]) or 1.0
    parts = []
    for index, (first, last) in enumerate(runs):
        left = 100 * (edges[first] - starts[0]) / span
        width = 100 * (edges[last + 1] - edges[first]) / span
        label = f"{name} {index + 1}: {plane_label(view, first)} to {plane_label(view, last)}"
        parts.append(
            f'<span class="seg {"ab"[index % 2]}" title="{escape(label, quote=True)}" '
            f'style="left:{left:.3f}%;width:calc({width:.3f}% - 2px)"></span>'
        )
    return "".join(parts)


def _bands(item: ItemReport, view: ItemView) -> str:
    """Further runs of frames that methods noted, below the time line, which has the first."""
    noted = [entry for entry in item.evidence if entry.kind == "frames"]
    return "".join(
        f'<div class="band"><p>{escape(f"{entry.method}: {entry.name}")}</p>'
        f'<div class="runs">{_runs(view, entry.value, entry.name)}</div></div>'
        for entry in noted[1:]
        if len(view.planes) > 1
    )


def _time(left: float, text: str, style: str = "") -> str:
    return f'<span class="time{style}" style="left:{left:.2f}%">{escape(text)}</span>'


def _spans(view: ItemView) -> tuple[list[float], float]:
    """Start of every plane and end of the last, in seconds or in frames when times are unknown."""
    starts = list(view.seconds or range(len(view.planes)))
    rising = all(a < b for a, b in itertools.pairwise(starts))
    if not rising:
        starts = [float(plane) for plane in range(len(view.planes))]
    gap = (starts[-1] - starts[0]) / max(len(starts) - 1, 1)
    return starts, starts[-1] + (gap or 1.0)


def _segment_style(view: ItemView, plane: int) -> str:
    for index, (first, last) in enumerate(view.segments):
        if first <= plane <= last:
            return "ab"[index % 2]
    return ""


def _depth(view: ItemView, number: int) -> str:
    """A slider through the decoder layers that removed tokens."""
    if not view.alive:
        return ""
    labels = [f"{count(view.num_groups)} tokens enter the language model"]
    labels += [
        f"{count(alive_M.sum())} left from decoder layer {layer} on"
        for layer, alive_M in view.alive
    ]
    data = escape(json.dumps(labels), quote=True)
    layers = json.dumps([layer for layer, _ in view.alive])
    return (
        f'<div class="depth"><label for="depth{number}">inside the decoder</label>'
        f'<input type="range" id="depth{number}" min="0" max="{len(view.alive)}" value="0" '
        f'data-labels="{data}" data-layers="{layers}">'
        f'<output for="depth{number}">{escape(labels[0])}</output></div>'
    )


def _card(view: ItemView, plane: int, thumb: Thumbnail, number: int) -> str:
    entry, when = view.planes[plane], plane_label(view, plane)
    rows, columns = entry.group_HW.shape
    single = entry.num_patches - entry.num_dropped - entry.num_merged
    words = (
        f"{when}: of {entry.num_patches} patches {single} kept as they are, {entry.num_merged} "
        f"merged, {entry.num_dropped} dropped"
    )
    photo = f'<img src="{thumb.photo}" alt="" decoding="sync">' if thumb.photo else ""
    strip = f'<span class="strip {_segment_style(view, plane)}"></span>'
    return (
        f'<figure class="frame" id="f{number}-{plane}">{strip if len(view.planes) > 1 else ""}'
        f'<div class="view" tabindex="0" role="img" aria-label="{words}" data-when="{when}" '
        f'data-plane="{plane}" data-first="{entry.first}" '
        f'data-rows="{rows}" data-columns="{columns}" '
        f'style="aspect-ratio:{thumb.width}/{thumb.height}">{photo}'
        f'<img class="overlay" src="{thumb.overlay}" alt="" decoding="sync"></div>'
        f"<figcaption><b>{when if len(view.planes) > 1 else 'reduced'}</b>"
        f"<span>{plural(entry.num_tokens, 'token')}</span></figcaption>"
        "</figure>"
    )


def _untouched(view: ItemView, thumb: Thumbnail) -> str:
    return (
        '<figure class="frame"><div class="plain" style="aspect-ratio:'
        f'{thumb.width}/{thumb.height}"><img src="{thumb.photo}" alt="untouched"></div>'
        f"<figcaption><b>untouched</b><span>{_patches(view.planes[0].num_patches)}</span>"
        "</figcaption></figure>"
    )


def _patches(number: int) -> str:
    return f"{count(number)} patch{'' if number == 1 else 'es'}"
