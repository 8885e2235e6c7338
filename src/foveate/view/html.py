"""The report as one HTML file that needs no network: what was kept, drawn on the frames."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from foveate._wording import count, duration, flops, plural
from foveate.core.report import ItemReport, Report, merge_layers
from foveate.view.charts import blocks_chart, flops_chart, layers_chart, seconds_chart
from foveate.view.evidence import colour_tables
from foveate.view.item import item_section
from foveate.view.timeline import timeline_chart

#: Bytes that all pictures of a report may take as text; a report of any length stays below 3 MB.
PICTURE_BYTES = 2_100_000

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
        item_section(item, number, report, pixels, budget)
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
        f'</main>\n<div id="say" role="status"></div>\n'
        f"<script>{colour_tables()}{_asset('report.js')}{_asset('evidence.js')}</script>\n"
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
        words = [plural(videos, "video"), plural(images, "image")]
        entries.append(
            (
                "visual tokens kept",
                f"{100 * report.retained:.1f}<small> %</small>",
                " and ".join(word for word in words if not word.startswith("0 ")),
            )
        )
        entries.append(
            (
                f"tokens {whither(report)}",
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
                _compared(total["untouched"], total["reduced"]),
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


def _compared(untouched: float, reduced: float) -> str:
    share = f"{100 * reduced / untouched:.1f} % of the untouched"
    if reduced > untouched:
        return f"{share}: more, not less"
    return f"{share}, {untouched / reduced:.2f} times less"


def whither(report: Report) -> str:
    """Where the tokens of a report's items went."""
    alone = report.stages and all(stage.stage == "encoder" for stage in report.stages)
    return "out of the encoder" if alone else "into the language model"


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


# -- figures below --------------------------------------------------------------------------------


def _panels(report: Report) -> str:
    panels = [_panel("Timeline", timeline_chart(report.timeline), "wide")]
    if report.stages:
        panels.append(_panel("Tokens by stage", _stage_table(report), "wide"))
    name = "Tokens in front of every encoder block"
    panels.append(_panel(name, blocks_chart(report.block_lengths)))
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


def _version() -> str:
    from foveate import __version__

    return __version__
