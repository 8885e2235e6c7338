"""The timeline of a call, drawn and in words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from foveate.core import Report
from foveate.core.timeline import Timeline
from foveate.view import render_report
from foveate.view.timeline import describe_timeline, timeline_chart


def overlapping() -> Timeline:
    line = Timeline()
    for part in range(3):
        line.add("decode", part, part + 1.0, part)
        line.add("encode", part + 1, part + 1.8, part)
        line.add("prefill", part + 1.8, part + 2.4, part)
    line.add("answer", 4.4, 4.5)
    return line


def svg(text: str) -> ET.Element:
    return ET.fromstring(text[: text.index("</svg>") + 6])


def test_one_lane_per_stage_and_one_bar_per_chunk() -> None:
    root = svg(timeline_chart(overlapping()))
    lanes = [t.text for t in root.findall("text") if t.get("class") == "label"]
    assert lanes == ["decode", "encode", "prefill", "answer"]
    groups = root.findall("g")
    assert [len(group.findall("rect")) for group in groups] == [3, 3, 3, 1]
    assert len({group.get("class") for group in groups}) == 4, "a colour each"
    numbers = [t.text for t in groups[0].findall("text")]
    assert numbers == ["1", "2", "3"]
    titles = [rect.findtext("title") for rect in groups[1].findall("rect")]
    assert titles[1] == "encode, chunk 2: 800 ms from 2.00 s"


def test_bars_stand_where_their_spans_are() -> None:
    root = svg(timeline_chart(overlapping()))
    width = float(root.get("viewBox", "").split()[2])
    for group in root.findall("g"):
        for rect in group.findall("rect"):
            left, wide = float(rect.get("x", "")), float(rect.get("width", ""))
            assert 0 < left < left + wide < width
    decode, encode = (root.findall("g")[n].findall("rect") for n in (0, 1))
    second = [float(rects[1].get("x", "")) for rects in (decode, encode)]
    first_encode = float(encode[0].get("x", ""))
    assert second[0] == pytest.approx(first_encode, abs=0.11), "both begin at 1 s"
    assert second[1] > second[0]


def test_what_it_says() -> None:
    assert describe_timeline(overlapping()) == (
        "4.50 s in all; the stages were at work for 7.30 s, 2.80 s of it side by side; "
        "the clip was read in 3 chunks."
    )
    line = Timeline()
    line.add("decode", 0.0, 1.0)
    line.add("encode", 1.0, 3.0)
    assert describe_timeline(line) == "3.00 s in all, one stage after another."


def test_it_is_read_out() -> None:
    label = svg(timeline_chart(overlapping())).get("aria-label", "")
    assert label.startswith("Timeline. 4.50 s in all")


def test_thousands_of_chunks_stay_small_and_cover_the_same_time() -> None:
    line = Timeline()
    for part in range(5000):
        line.add("decode", part * 0.1, part * 0.1 + 0.1, part)
    text = timeline_chart(line)
    rects = svg(text).findall("g")[0].findall("rect")
    assert len(rects) < 1000 and len(text) < 300_000
    covered = sum(float(rect.get("width", "")) for rect in rects)
    assert covered > 0.7 * (960 - 84 - 92)


@pytest.mark.parametrize("total", [1e-6, 0.004, 0.3, 1.0, 7.9, 63.0, 1234.0, 86400.0])
def test_ticks_are_few_and_round(total: float) -> None:
    line = Timeline()
    line.add("decode", 0.0, total)
    root = svg(timeline_chart(line))
    ticks = [t.text for t in root.findall("text") if re.fullmatch(r"[\d.e+-]+ m?s", t.text or "")]
    assert 2 <= len(ticks) <= 10


def test_reports_with_and_without_a_timeline() -> None:
    assert "Timeline" not in render_report(Report(recipe="holitom"))
    assert "Timeline" not in render_report(Report(recipe="holitom", timeline=Timeline()))
    text = render_report(Report(recipe="holitom", timeline=overlapping()))
    assert "<h2>Timeline</h2>" in text and "side by side" in text
