"""What methods noted, packed small enough to be drawn in the page: one entry to choose, per kind.

Values of all shown patches travel as base64 bytes and are painted on a canvas by `evidence.js`, so
that a layer of evidence costs about as much as one thumbnail, however many frames it covers.

Legend: N tokens of an item, Q patches of the shown planes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from foveate.core.evidence import Evidence
from foveate.core.grid import Grid, TokenKind
from foveate.core.report import ItemReport
from foveate.view.palette import MARK_COLOURS, NUM_LABEL_COLOURS, group_colours, heat_colours

#: Bytes of text that the evidence of one item may take; of many layers, every k-th is drawn then.
EVIDENCE_BYTES = 700_000

_NOTHING = 255
_MARKS = len(MARK_COLOURS)  # as many as a byte has bits
# Attention has long tails: one patch would darken all others.
_TAIL = 1.0
_STRETCH = 0.25


def patch_index(grid: Grid, planes: Iterable[int]) -> np.ndarray:
    """Tokens of an item that are patches of the given planes, int64 [Q]."""
    patch_N = np.flatnonzero(grid.kinds().numpy() == TokenKind.PATCH)
    sizes = [plane.num_patches for plane in grid.planes]
    parts = np.split(patch_N, np.cumsum(sizes)[:-1])
    return np.concatenate([parts[plane] for plane in planes])


def value_range(value: np.ndarray) -> tuple[float, float]:
    """What is drawn darkest and brightest: the extremes, but for long tails of many values.

    A tail beyond the 1st or 99th percentile that would take a quarter more of the scale is cut.

    Example:
        >>> value_range(np.array([3.0, np.nan, 1.0]))
        (1.0, 3.0)
    """
    seen = value[np.isfinite(value)]
    if seen.size == 0:
        return 0.0, 0.0
    least, most = float(seen.min()), float(seen.max())
    if seen.size < 100:
        return least, most
    low, high = map(float, np.percentile(seen, [_TAIL, 100 - _TAIL]))
    room = _STRETCH * (high - low)
    if room == 0:
        return least, most
    return low if low - least > room else least, high if most - high > room else most


def shades(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as steps of the colour scale, uint8 0 to 254; 255 is nothing."""
    share = np.full(value.shape, 0.5) if high <= low else (value - low) / (high - low)
    steps = np.rint(np.clip(np.nan_to_num(share), 0, 1) * (_NOTHING - 1))
    return np.where(np.isfinite(value), steps, _NOTHING).astype(np.uint8)


def evidence_layers(item: ItemReport, shown: Sequence[int]) -> list[dict[str, Any]]:
    """The evidence of an item as plain data: one entry per thing to look at.

    The layers of one thing are the `steps` of an entry; marks of one method and stage are one
    entry, each a bit. Runs of frames belong to the time line and are left out.
    """
    index_Q = patch_index(item.grid, shown)
    groups: dict[tuple, list[Evidence]] = {}
    for noted in item.evidence:
        if noted.kind != "frames" and not noted.is_blank:
            name = "" if noted.kind == "mark" else noted.name
            key = (noted.stage, noted.method, noted.kind, name)
            groups.setdefault(key, []).append(noted)
    entries = [_entry(group, index_Q, shown) for group in groups.values()]
    return _thinned(entries)


def _entry(group: list[Evidence], index_Q: np.ndarray, shown: Sequence[int]) -> dict[str, Any]:
    first = group[0]
    names = list(dict.fromkeys(noted.name for noted in group))[:_MARKS]
    by_layer: dict[Any, list[Evidence]] = {}
    for noted in group:
        by_layer.setdefault(noted.layer, []).append(noted)
    captions = dict.fromkeys(noted.caption for noted in group if noted.caption)
    steps = []
    for layer, found in by_layer.items():
        if first.kind == "boxes":
            boxes = [box for box in found[-1].value if box[0] in shown]
            steps.append({"layer": layer, "boxes": boxes})
        else:
            steps.append({"layer": layer, **_packed(found, names, index_Q)})
    return {
        "name": ", ".join(names),
        "method": first.method,
        "stage": first.stage or "",
        "kind": first.kind,
        "caption": "; ".join(captions),
        "names": names if first.kind == "mark" else [],
        "steps": sorted(steps, key=lambda step: -1 if step["layer"] is None else step["layer"]),
    }


def _packed(found: list[Evidence], names: list[str], index_Q: np.ndarray) -> dict[str, Any]:
    """The values of one entry at one layer."""
    kind, value_Q = found[-1].kind, found[-1].value.numpy()[index_Q]
    if kind == "heat":
        low, high = value_range(value_Q)
        seen = value_Q[np.isfinite(value_Q)]
        clipped = (bool((seen < low).any()), bool((seen > high).any()))
        return {
            "data": _base64(shades(value_Q, low, high)),
            "low": ("≤ " if clipped[0] else "") + f"{low:.3g}",
            "high": ("≥ " if clipped[1] else "") + f"{high:.3g}",
        }
    if kind == "mark":
        bits_Q = np.zeros(len(index_Q), dtype=np.uint8)
        for noted in found:
            if noted.name in names:
                bits_Q |= noted.value.numpy()[index_Q].astype(np.uint8) << names.index(noted.name)
        counts = [int((bits_Q >> bit & 1).sum()) for bit in range(len(names))]
        return {"data": _base64(bits_Q), "counts": counts}
    # Numbered by first appearance: neighbours get neighbouring numbers, and so colours far apart.
    labels, first, number_Q = np.unique(value_Q, return_index=True, return_inverse=True)
    is_label = labels >= 0
    rank = np.full(len(labels), 0xFFFF)
    rank[np.flatnonzero(is_label)[np.argsort(first[is_label])]] = np.arange(is_label.sum())
    data = _base64(rank[number_Q.reshape(-1)].astype("<u2"))
    return {"data": data, "count": int(is_label.sum())}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _thinned(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every k-th layer of each entry, with the smallest k at which all fit."""
    every = 1
    most = max((len(entry["steps"]) for entry in entries), default=1)
    while every < most and sum(_size(entry, every) for entry in entries) > EVIDENCE_BYTES:
        every += 1
    for entry in entries:
        if every > 1 and len(entry["steps"]) > 1:
            entry["steps"] = entry["steps"][::every]
            entry["caption"] = "; ".join(
                filter(None, [entry["caption"], f"one layer in {every} shown"])
            )
    return entries


def _size(entry: dict[str, Any], every: int) -> int:
    return sum(len(step.get("data", "")) for step in entry["steps"][::every])


# -- HTML -----------------------------------------------------------------------------------------


def evidence_tools(entries: list[dict[str, Any]], number: int) -> str:
    """What chooses an item's evidence, and its values; "" without any."""
    if not entries:
        return ""
    groups: dict[str, list[str]] = {}
    for index, entry in enumerate(entries):
        option = f'<option value="{index}">{escape(entry["name"])}</option>'
        groups.setdefault(f"{entry['method']}, {entry['stage']}", []).append(option)
    options = "".join(
        f'<optgroup label="{escape(name, quote=True)}">{"".join(made)}</optgroup>'
        for name, made in groups.items()
    )
    data = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="seen"><label for="seen{number}">what the method saw</label>'
        f'<select id="seen{number}"><option value="">nothing: what was kept</option>{options}'
        f'</select><span class="layers" hidden><label for="layer{number}">layer</label>'
        f'<input type="range" id="layer{number}" min="0" max="0" value="0">'
        f'<output for="layer{number}"></output></span>'
        '<span class="scale" role="note" aria-live="polite"></span>'
        f'<script type="application/json">{data}</script></div>'
    )


def colour_tables() -> str:
    """The colours of evidence as a line of script, once per page."""
    tables = {
        "heat": _base64(heat_colours(_NOTHING)),
        "label": _base64(group_colours(NUM_LABEL_COLOURS)),
        "mark": MARK_COLOURS,
    }
    return f"const colours = {json.dumps(tables)};\n"
