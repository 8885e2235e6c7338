"""Evidence in the report: packed for the page, and drawn as pictures."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from reports import bright_frames, small_report, with_evidence

from foveate.core import Evidence, Grid, ItemReport
from foveate.view import draw_evidence, render_report
from foveate.view.evidence import evidence_layers, shades, value_range
from foveate.view.palette import heat_colours


def entries(html: str) -> list[dict]:
    found = re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def unpacked(step: dict, kind: str = "u1") -> list[int]:
    return np.frombuffer(base64.b64decode(step["data"]), dtype=kind).tolist()


def test_the_page_offers_every_piece_of_evidence() -> None:
    html = render_report(with_evidence())
    heat, label, marks, boxes = entries(html)
    assert [step["layer"] for step in heat["steps"]] == [None]
    values = unpacked(heat["steps"][0])
    assert len(values) == 4 * 24 and values[:24] == [round(254 * k / 23) for k in range(24)]
    assert set(values[24:]) == {255}  # NaN
    assert (heat["steps"][0]["low"], heat["steps"][0]["high"]) == ("0", "23")
    assert [step["layer"] for step in label["steps"]] == [2, 3]
    assert unpacked(label["steps"][0], "<u2")[:4] == [0, 0, 0xFFFF, 1]
    assert label["steps"][0]["count"] == 2
    assert marks["names"] == ["anchors", "buffers"] and marks["steps"][0]["counts"] == [1, 2]
    assert unpacked(marks["steps"][0])[:3] == [1, 2, 2]
    assert boxes["steps"][0]["boxes"] == [[1, 0, 1, 3, 4]]
    for words in (
        "saliency",
        "segment of place",
        "anchors, buffers",
        "optgroup",
        "what the method",
    ):
        assert words in html
    assert '<div class="band"><p>thin: scenes</p>' in html  # runs of frames beyond the first


def test_a_report_without_evidence_has_no_tools_for_it() -> None:
    html = render_report(small_report())
    assert 'class="seen"' not in html and "application/json" not in html


def test_words_from_outside_cannot_end_the_data() -> None:
    report = small_report()
    report.items[0].evidence.append(
        Evidence("</script><b>", "heat", torch.arange(97.0), "</script>", "x", "projector")
    )
    html = render_report(report)
    assert html.count("</script>") == html.count("<script")
    assert entries(html)[0]["name"] == "</script><b>"


def test_many_layers_stay_within_the_budget(monkeypatch) -> None:
    item = ItemReport(0, "video", Grid.video(10, 10, 10))
    item.evidence = [
        Evidence("key norms", "heat", torch.rand(1000), "norms", "x", "cache", layer)
        for layer in range(28)
    ]
    (whole,) = evidence_layers(item, range(10))
    assert len(whole["steps"]) == 28
    monkeypatch.setattr("foveate.view.evidence.EVIDENCE_BYTES", 14_000)
    (thinned,) = evidence_layers(item, range(10))
    assert sum(len(step["data"]) for step in thinned["steps"]) <= 14_000
    assert [step["layer"] for step in thinned["steps"]] == list(range(0, 28, 3))
    assert thinned["caption"] == "norms; one layer in 3 shown"


def test_only_shown_planes_are_packed() -> None:
    item = ItemReport(0, "video", Grid.video(4, 1, 2, row_newline=True))
    item.evidence = [Evidence("x", "mark", torch.arange(12) % 3 == 1, "", "x", "projector")]
    (entry,) = evidence_layers(item, [0, 2])
    assert unpacked(entry["steps"][0]) == [0, 1, 0, 1]


def test_ranges_cut_long_tails_only() -> None:
    even = np.arange(1000.0)
    assert value_range(even) == (0.0, 999.0)
    spiked = np.append(even, 1e6)
    low, high = value_range(spiked)
    assert low == 0.0 and 900 < high < 1000
    assert value_range(np.full(5, np.nan)) == (0.0, 0.0)
    assert shades(np.array([5.0, 5.0, np.nan]), 5.0, 5.0).tolist() == [127, 127, 255]


def test_the_heat_scale_rises_evenly() -> None:
    linear = (heat_colours(256) / 255.0) ** 2.2
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(np.cbrt(luminance)) > -0.004).all() and np.cbrt(luminance)[-1] > 0.9


@pytest.mark.parametrize("name", ["saliency", "segment of place", "box"])
def test_pictures_are_drawn_per_kind(name: str) -> None:
    (item,) = with_evidence().items
    noted = next(entry for entry in item.evidence if entry.name == name)
    picture = np.asarray(draw_evidence(item, noted, bright_frames(4), columns=2, size=120))
    plain = np.asarray(
        draw_evidence(item, Evidence("x", "boxes", ()), bright_frames(4), columns=2, size=120)
    )
    assert picture.shape == plain.shape
    changed = (picture != plain).any(-1)
    assert changed.any() and not changed[:8].any()
    if name == "saliency":  # frames 1 to 3 have nothing
        assert changed[8:88, 8:128].mean() > 0.9 and not changed[110:, :].any()


def test_marks_are_drawn_together_and_kinds_are_not() -> None:
    (item,) = with_evidence().items
    marks = [entry for entry in item.evidence if entry.kind == "mark"]
    assert draw_evidence(item, marks, planes=[0]).mode == "RGB"
    heat, frames = item.evidence[1], item.evidence[0]
    for wrong in ([], frames, [heat, *marks]):
        with pytest.raises(ValueError, match="draw_evidence takes one piece of evidence"):
            draw_evidence(item, wrong)
