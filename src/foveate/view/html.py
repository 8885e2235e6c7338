"""The report as one HTML file that needs no network: what was kept, drawn on the frames."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from foveate.core.report import ItemReport, Report, merge_layers
from foveate.view.charts import count, duration, flops, flops_chart, layers_chart, seconds_chart
from foveate.view.draw import item_pictures, plane_label
from foveate.view.layout import ItemView, view_item
from foveate.view.pictures import Thumbnail, packed_alive, packed_groups, thumbnails

#: Bytes that all pictures of a report may take as text; a report of any length stays below 3 MB.
PICTURE_BYTES = 2_100_000
#: Planes of one item that are drawn; of longer videos every k-th is.
MAX_PLANES = 160

# The browser itself refuses whatever is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LEGEND = (
    ("kept", "kept as it is"),
    ("merge", "merged: one colour, one token"),
    ("dot", "the place of a merged token"),
    ("drop", "dropped"),
)


def save_report(
    report: Report, path: str | Path, *, frames: Any = None, title: str | None = None
) -> Path:
    """Write a report as one HTML file; nothing is left behind when it fails.

    Args:
        report: the account of a call.
        path: where to write; its directory must exist.
        frames: uint8 [T, 3, h, w] to draw on, or a list with one such entry per item; by default
            each item's own pixels, and bare grids where it has none.
        title: heading; default the recipe.

    Returns:
        The path.

    Raises:
        ValueError: the directory does not exist, or the frames do not fit the items.

    Example:
        >>> import tempfile
        >>> from foveate.core import Grid, ItemReport, Report
        >>> report = Report(items=[ItemReport(0, "video", Grid.video(2, 3, 4))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_report(report, Path(folder) / "kept.html").name
        'kept.html'
    """
    path = check_destination(path)
    write_atomically(path, render_report(report, frames=frames, title=title))
    return path


def check_destination(path: str | Path) -> Path:
    """The path as a `Path`, if a file can be written there.

    Raises:
        ValueError: its directory does not exist or cannot be written to, or it is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory; name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the directory {path.parent} does not exist.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write to {path.parent}.")
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a whole text file or nothing: to a temporary neighbour, then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes private files; a report gets what any new file of this user gets.
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render_report(report: Report, *, frames: Any = None, title: str | None = None) -> str:
    """The HTML document of `save_report` as text.

    Raises:
        ValueError: the frames do not fit the items.
    """
    title = title or f"{report.recipe or 'visual tokens'}: what was kept"
    per_item = _frames_per_item(report.items, frames)
    budget = PICTURE_BYTES // max(len(report.items), 1)
    items = "".join(
        _item(item, number, report, pixels, budget)
        for number, (item, pixels) in enumerate(zip(report.items, per_item, strict=True))
    )
    tools = _tools() if report.items else "<p>No visual tokens in this call.</p>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_asset('report.css')}</style>\n</head>\n<body>\n"
        f'<header class="page"><h1>{escape(title)}</h1>{_facts(report)}{_figures(report)}</header>'
        f'\n<main>{tools}{items}<div class="panels">{_panels(report)}</div>'
        f"<footer>Drawn by foveate {escape(_version())}. This file needs no network.</footer>"
        f'</main>\n<div id="say" role="status"></div>\n<script>{_asset("report.js")}</script>\n'
        "</body>\n</html>\n"
    )


# -- head -----------------------------------------------------------------------------------------


def _facts(report: Report) -> str:
    facts = (("recipe", report.recipe), ("budget", report.budget), ("model", report.model))
    return (
        '<p class="facts">'
        + "".join(f"<span>{name} <b>{escape(text)}</b></span>" for name, text in facts if text)
        + "</p>"
    )


def _figures(report: Report) -> str:
    entries = []
    if report.items:
        videos = sum(item.modality == "video" for item in report.items)
        images = len(report.items) - videos
        words = [_plural(videos, "video"), _plural(images, "image")]
        entries.append(
            (
                "visual tokens kept",
                f"{100 * report.retained:.1f}<small> %</small>",
                " and ".join(word for word in words if not word.startswith("0 ")),
            )
        )
        entries.append(
            (
                "tokens into the language model",
                f"{count(report.visual_after)} <small>of {count(report.visual_before)}</small>",
                f"{count(report.visual_before - report.visual_after)} fewer",
            )
        )
    total = {name: parts.get("total", 0.0) for name, parts in report.flops.items()}
    if total.get("untouched") and total.get("reduced"):
        number, unit = flops(total["reduced"]).split(" ", 1)
        scaled = any("reference" in part for part in report.flops["reduced"])
        entries.append(
            (
                "compute, with a reference LLM" if scaled else "compute",
                f"{number}<small> {unit} of {flops(total['untouched']).split(' ', 1)[0]}"
                f"{_other_unit(total)}</small>",
                f"{total['untouched'] / total['reduced']:.2f} times less",
            )
        )
    if report.seconds:
        slowest = max(report.seconds, key=lambda name: report.seconds[name])
        number, unit = duration(sum(report.seconds.values())).split(" ", 1)
        share = f"most of it: {slowest}" if len(report.seconds) > 1 else slowest
        entries.append(("time measured", f"{number}<small> {unit}</small>", share))
    body = "".join(
        f'<li class="{"first" if not number else ""}"><div class="name">{name}</div>'
        f'<div class="value">{value}</div><div class="note">{escape(note)}</div></li>'
        for number, (name, value, note) in enumerate(entries)
    )
    return f'<ul class="figures">{body}</ul>'


def _other_unit(total: dict[str, float]) -> str:
    reduced, untouched = (flops(total[name]).split(" ", 1)[1] for name in ("reduced", "untouched"))
    return "" if reduced == untouched else f" {untouched}"


def _tools() -> str:
    keys = "".join(
        f'<li><span class="key {style}" aria-hidden="true"></span>{text}</li>'
        for style, text in _LEGEND
    )
    return (
        f'<div class="bar-tools"><ul class="keys" aria-label="Colours">{keys}</ul>'
        '<label class="switch"><input type="checkbox" id="plain"> show the frames untouched</label>'
        "</div>"
    )


# -- one item -------------------------------------------------------------------------------------


def _item(item: ItemReport, number: int, report: Report, frames: Any, budget: int) -> str:
    view = view_item(item)
    step = -(-len(view.planes) // MAX_PLANES)
    shown = range(0, len(view.planes), step)
    pictures = item_pictures(item, len(view.planes), frames)
    thumbs = thumbnails(view, pictures, shown, budget)
    several = len({entry.sample for entry in report.items}) > 1
    name = item.modality.capitalize() + (f" {number + 1}" if len(report.items) > 1 else "")
    name += f", sample {item.sample + 1}" if several else ""
    cards = "".join(
        _card(view, plane, thumb, number) for plane, thumb in zip(shown, thumbs, strict=True)
    )
    aspect = thumbs[0].width / thumbs[0].height
    wide = round(min(max(210 * aspect**0.5, 170), 330)) if len(shown) > 2 else 460
    data = (
        f' data-groups="{packed_groups(view)}" data-tokens="{view.num_groups}"'
        f' data-wide="{int(view.num_groups >= 2**16 - 1)}" data-alive="{packed_alive(view)}"'
    )
    return (
        f'<section class="item" aria-label="{escape(name, quote=True)}"{data}>'
        f"<header><h2>{escape(name)}</h2><p>{_summary(item, view, step)}</p></header>"
        f"{_axis(view, number) if len(view.planes) > 1 else ''}{_depth(view, number)}"
        f'<div class="frames" style="--wide:{wide}px">{cards}</div></section>'
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
        parts.append(_plural(len(view.segments), "segment"))
    if item.reduction is not None and item.reduction.kind == "synthesise":
        parts.append(f"{count(item.after)} new tokens that stand for no single patch")
    if step > 1:
        parts.append(f"every {step}th frame shown")
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
    for index, (first, last) in enumerate(view.segments):
        left = 100 * (edges[first] - starts[0]) / span
        width = 100 * (edges[last + 1] - edges[first]) / span
        label = f"segment {index + 1}: {plane_label(view, first)} to {plane_label(view, last)}"
        parts.append(
            f'<span class="seg {"ab"[index % 2]}" title="{label}" '
            f'style="left:{left:.3f}%;width:calc({width:.3f}% - 2px)"></span>'
        )
    for plane in sorted({0, len(starts) // 4, len(starts) // 2, 3 * len(starts) // 4}):
        left = 100 * (starts[plane] - starts[0]) / span
        parts.append(_time(left, plane_label(view, plane), "" if plane else " first"))
    unit = f"{end:.2f} s" if view.seconds is not None else f"{len(starts)} frames"
    parts.append(_time(100, unit, " last"))
    return (
        f'<div class="axis" role="group" aria-label="Tokens per frame over time, at most {most}">'
        f"{''.join(parts)}</div>"
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
    return (
        f'<div class="depth"><label for="depth{number}">inside the decoder</label>'
        f'<input type="range" id="depth{number}" min="0" max="{len(view.alive)}" value="0" '
        f'data-labels="{data}"><output for="depth{number}">{escape(labels[0])}</output></div>'
    )


def _card(view: ItemView, plane: int, thumb: Thumbnail, number: int) -> str:
    entry, when = view.planes[plane], plane_label(view, plane)
    rows, columns = entry.group_HW.shape
    single = entry.num_patches - entry.num_dropped - entry.num_merged
    words = (
        f"{when}: of {entry.num_patches} patches {single} kept as they are, {entry.num_merged} "
        f"merged, {entry.num_dropped} dropped"
    )
    photo = f'<img src="{thumb.photo}" alt="" decoding="async">' if thumb.photo else ""
    return (
        f'<figure class="frame" id="f{number}-{plane}">'
        f'<span class="strip {_segment_style(view, plane)}"></span>'
        f'<div class="view" tabindex="0" role="img" aria-label="{words}" data-when="{when}" '
        f'data-first="{entry.first}" data-rows="{rows}" data-columns="{columns}" '
        f'style="aspect-ratio:{thumb.width}/{thumb.height}">{photo}'
        f'<img class="overlay" src="{thumb.overlay}" alt="" decoding="async"></div>'
        f"<figcaption><b>{when}</b><span>{_plural(entry.num_tokens, 'token')}</span></figcaption>"
        "</figure>"
    )


# -- figures below --------------------------------------------------------------------------------


def _panels(report: Report) -> str:
    panels = []
    if report.stages:
        panels.append(_panel("Tokens by stage", _stage_table(report), "wide"))
    for sample, lengths in enumerate(report.layer_lengths):
        cache = report.cache_lengths[sample] if sample < len(report.cache_lengths) else []
        name = "Tokens in every decoder layer"
        name += f", sample {sample + 1}" if len(report.layer_lengths) > 1 else ""
        panels.append(_panel(name, layers_chart(lengths, cache)))
    panels.append(_panel("Compute", flops_chart(report.flops)))
    panels.append(_panel("Time", seconds_chart(report.seconds)))
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    panels.append(_panel("Notes", f'<ul class="notes">{notes}</ul>' if notes else "", "wide"))
    return "".join(panels)


def _panel(name: str, body: str, style: str = "") -> str:
    if not body:
        return ""
    return f'<section class="panel {style}"><h2>{escape(name)}</h2>{body}</section>'


def _stage_table(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(row['stage'])}</td><td>{escape(row['method'])}</td>"
        f"<td>{count(row['before'])}</td><td>{count(row['after'])}</td>"
        f"<td>{100 * row['retained']:.1f} %</td>"
        f'<td class="bar"><span><i style="width:{min(100 * row["retained"], 100):.1f}%"></i></span>'
        "</td></tr>"
        for row in merge_layers(report.stages)
    )
    return (
        "<table><thead><tr><th>stage</th><th>method</th><th>before</th><th>after</th><th>kept</th>"
        f"<th></th></tr></thead><tbody>{rows}</tbody></table>"
    )


# -- helpers --------------------------------------------------------------------------------------


def _frames_per_item(items: Sequence[ItemReport], frames: Any) -> list[Any]:
    if frames is None:
        return [None] * len(items)
    is_one = hasattr(frames, "pixels") or getattr(frames, "ndim", 0) == 4
    if is_one:
        frames = [frames]
    if len(frames) != len(items):
        raise ValueError(
            f"The report has {len(items)} items, but frames for {len(frames)} were given: pass "
            "uint8 [T, 3, h, w] for one item, or a list with one such entry (or None) per item."
        )
    return list(frames)


def _asset(name: str) -> str:
    return (files("foveate.view") / "assets" / name).read_text(encoding="utf-8")


def _plural(number: int, word: str) -> str:
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def _version() -> str:
    from foveate import __version__

    return __version__
