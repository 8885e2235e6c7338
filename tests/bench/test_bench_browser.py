"""The bench page in a real browser, where there is one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from bench_runs import large, write_run

from foveate.bench.report import render_report
from foveate.bench.results import read_result
from headless import DARK, LIGHT, needs_browser, screenshot

pytestmark = needs_browser
# The page itself allows no script, so the copy that is measured goes without that rule.
PROBE = """
<script>addEventListener("load", () => setTimeout(() => {
  const seen = (name) => [...document.querySelectorAll(name)].filter((n) => n.offsetHeight).length;
  const sheets = () => seen("#rank0 ~ .sheet");
  const before = sheets();
  document.getElementById("rank0").click();
  const first = document.querySelector("#rank0 ~ .sheet.n0").offsetHeight > 0;
  const group = (n) => document.querySelector(`.curves .s${n}`);
  const opacity = (n) => Number(getComputedStyle(group(n)).opacity);
  const plain = [opacity(0), opacity(3)];
  document.querySelectorAll(".series").forEach((n) => { n.style.transition = "none"; });
  document.getElementById("pick3").click();
  const hits = [...document.querySelectorAll(".curves")].map((chart) => {
    const boxes = [...chart.querySelectorAll(".name")].map((n) => n.getBoundingClientRect());
    const box = chart.getBoundingClientRect();
    boxes.sort((a, b) => a.top - b.top);
    return [boxes.every((b) => b.right <= box.right + 1 && b.bottom <= box.bottom + 1),
      Math.min(...boxes.slice(1).map((b, n) => (b.top - boxes[n].top) / b.height))];
  });
  console.log("MEASURED " + JSON.stringify({width: document.documentElement.scrollWidth, before,
    after: sheets(), first, plain, picked: [opacity(0), opacity(3)], hits}));
}, 50))</script></body>
"""


@pytest.mark.parametrize(
    ("width", "scheme"), [(1300, LIGHT), (420, DARK)], ids=["desktop light", "phone dark"]
)
def test_the_page_fits_follows_the_scheme_and_works_without_scripts(
    tmp_path: Path, width: int, scheme: int
) -> None:
    write_run(tmp_path, recipes=large(), clips=10)
    html = render_report(read_result(tmp_path))
    open_html = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", PROBE)
    (tmp_path / "inner.html").write_text(open_html, encoding="utf-8")
    # A browser window has a least width; a frame has none.
    frame = f'<iframe src="inner.html" style="border:0;width:{width}px;height:1600px"></iframe>'
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><body style="margin:0">{frame}</body>')
    image, log = screenshot(page, scheme, (max(width, 500), 1600))
    measured = re.search(r'MEASURED (\{.*?\})"', log)
    assert measured, log[-2000:]
    found = json.loads(measured[1].replace('\\"', '"'))
    assert not re.findall(r"Refused to \w+.*|net::ERR_\w+", log)
    assert found["width"] <= width  # wide tables scroll by themselves
    assert found["before"] == found["after"] == 1 and found["first"]
    assert found["plain"] == [1, 1]
    assert found["picked"][1] == 1 and found["picked"][0] < 0.3
    for inside, step in found["hits"]:
        assert inside and step > 0.85
    corner = image[3:8, 3:8].mean()
    assert corner < 40 if scheme == DARK else corner > 230


def test_the_page_as_it_is_raises_no_complaint(tmp_path: Path) -> None:
    write_run(tmp_path, clips=10)
    page = tmp_path / "report.html"
    page.write_text(render_report(read_result(tmp_path)), encoding="utf-8")
    image, log = screenshot(page, LIGHT, (1000, 1400))
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    assert not re.findall(r"Refused to \w+.*|net::ERR_\w+", log)
    colours = image.reshape(-1, 3)
    # The first two recipes' colours are on the page.
    for colour in ((0x25, 0x5C, 0xCF), (0xF3, 0x62, 0x02)):
        assert (np.abs(colours - colour).max(1) < 6).sum() > 100
