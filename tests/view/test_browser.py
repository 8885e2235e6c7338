"""The report in a real browser, where there is one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from reports import bright_frames, small_report, with_evidence

from foveate.view import render_report
from headless import DARK, LIGHT, needs_browser, screenshot

pytestmark = needs_browser
# Reports where every frame is drawn, without which a screenshot could not be checked by place.
PROBE = """
<script>addEventListener("load", () => setTimeout(() => {
  %s
  const boxes = [...document.querySelectorAll(".view")].map((v) => {
    const r = v.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; });
  console.log("BOXES " + JSON.stringify({boxes, say: document.getElementById("say").textContent,
    width: document.documentElement.scrollWidth}));
}, 50))</script>
"""


def shoot(
    folder: Path, html: str, *, scheme: int = LIGHT, size: tuple[int, int] = (1000, 1200)
) -> tuple[np.ndarray, str]:
    """A screenshot of a page as an array, and what the browser logged."""
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    return screenshot(page, scheme, size)


def probed(html: str, script: str = "") -> str:
    return html.replace("</body>", PROBE % script + "</body>")


def measured(log: str) -> tuple[list[list[float]], str, int]:
    found = re.search(r'BOXES (\{.*?\})"', log)
    assert found, log[-2000:]
    import json

    data = json.loads(found.group(1).replace('\\"', '"'))
    return data["boxes"], data["say"], data["width"]


def complaints(log: str) -> list[str]:
    lines = [line for line in log.splitlines() if "CONSOLE" in line and "BOXES" not in line]
    return lines + re.findall(r"Refused to \w+.*|net::ERR_\w+", log)


def cell(image: np.ndarray, box: list[float], row: int, column: int) -> np.ndarray:
    """Mean colour inside a patch of the 4 x 6 grid, away from outlines and dots."""
    left, top, width, height = box
    y, x = top + height * (row + 0.25) / 4, left + width * (column + 0.25) / 6
    return image[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].reshape(-1, 3).mean(0)


def test_frames_are_dimmed_clear_and_coloured_where_they_should_be(tmp_path: Path) -> None:
    image, log = shoot(tmp_path, probed(render_report(small_report())))
    boxes, _, width = measured(log)
    assert not complaints(log)
    assert image.std() > 15 and width <= 1000
    assert len(boxes) == 4
    for box in boxes:
        kept, merged, dropped = (cell(image, box, *at) for at in ((0, 3), (2, 1), (2, 5)))
        assert np.abs(kept - 220).max() < 6
        assert dropped.max() < 110
        assert 110 < merged.mean() < 215 and merged.max() - merged.min() > 20
    # One token over time has one colour.
    assert np.abs(cell(image, boxes[0], 2, 1) - cell(image, boxes[3], 2, 1)).max() < 4


def test_pointing_at_a_patch_lights_its_group_in_all_frames(tmp_path: Path) -> None:
    script = """
      const v = document.querySelector(".view"), r = v.getBoundingClientRect();
      v.dispatchEvent(new MouseEvent("click", {bubbles: true,
        clientX: r.left + r.width * 1.3 / 6, clientY: r.top + r.height * 2.3 / 4}));
    """
    plain, log = shoot(tmp_path, probed(render_report(small_report())))
    boxes, _, _ = measured(log)
    image, log = shoot(tmp_path, probed(render_report(small_report()), script))
    assert not complaints(log)
    assert measured(log)[1] == "Token 0 stands for 48 patches in 4 frames, 0.00 s to 1.50 s"
    for box in boxes:
        before, after = (cell(picture, box, 2, 1) for picture in (plain, image))
        assert np.abs(before - after).max() < 4
        assert cell(image, box, 0, 3).mean() < 0.6 * cell(plain, box, 0, 3).mean()


def test_depth_slider_dims_what_the_decoder_drops(tmp_path: Path) -> None:
    script = """
      const slider = document.querySelector(".depth input");
      slider.value = 2; slider.dispatchEvent(new Event("input"));
    """
    image, log = shoot(tmp_path, probed(render_report(small_report()), script))
    boxes, _, _ = measured(log)
    assert not complaints(log)
    assert cell(image, boxes[0], 0, 3).max() < 110  # token 1, gone from layer 3 on
    assert cell(image, boxes[0], 2, 1).mean() > 110  # token 0, still there


def test_untouched_frames_come_back_with_the_switch(tmp_path: Path) -> None:
    script = 'document.getElementById("plain").click();'
    image, log = shoot(tmp_path, probed(render_report(small_report()), script))
    boxes, _, _ = measured(log)
    assert np.abs(cell(image, boxes[0], 2, 5) - 220).max() < 6


@pytest.mark.parametrize(("scheme", "dark"), [(LIGHT, False), (DARK, True)])
def test_it_follows_the_colour_scheme_and_fits_a_phone(
    tmp_path: Path, scheme: int, dark: bool
) -> None:
    html = probed(render_report(small_report(8), frames=bright_frames(8)))
    image, log = shoot(tmp_path, html, scheme=scheme, size=(500, 1600))
    assert not complaints(log)
    assert measured(log)[2] <= 500  # nothing sticks out sideways
    page = image[3:8, 3:8].mean()
    assert page < 40 if dark else page > 230


CHOOSE = """{
  const choice = document.querySelector(".seen select");
  choice.value = %r; choice.dispatchEvent(new Event("change"));
}"""


def test_evidence_is_painted_over_the_frames(tmp_path: Path) -> None:
    html = render_report(with_evidence())
    image, log = shoot(tmp_path, probed(html, CHOOSE % "0"))
    boxes, _, _ = measured(log)
    assert not complaints(log)
    dark, bright = (cell(image, boxes[0], *at) for at in ((0, 1), (3, 4)))
    assert bright.mean() > dark.mean() + 60
    # Frame 1 has nothing noted: neither heat nor the overlay of what was dropped.
    assert np.abs(cell(image, boxes[1], 2, 5) - 220).max() < 20
    image, log = shoot(tmp_path, probed(html, CHOOSE % "1"))
    assert not complaints(log)
    label, other = (cell(image, measured(log)[0][0], *at) for at in ((0, 1), (0, 3)))
    assert np.abs(label - other).max() > 15


def test_evidence_answers_to_the_pointer_and_goes_again(tmp_path: Path) -> None:
    html = render_report(with_evidence())
    point = """
      const v = document.querySelector(".view"), r = v.getBoundingClientRect();
      v.dispatchEvent(new MouseEvent("click", {bubbles: true,
        clientX: r.left + r.width * 1.3 / 6, clientY: r.top + r.height * 2.3 / 4}));
    """
    _, log = shoot(tmp_path, probed(html, CHOOSE % "0" + point))
    assert not complaints(log)
    assert measured(log)[1].endswith("0.00 s to 1.50 s · saliency 13")
    plain, _ = shoot(tmp_path, probed(html))
    image, log = shoot(tmp_path, probed(html, CHOOSE % "2" + CHOOSE % ""))
    assert not complaints(log)
    assert np.abs(image - plain).mean() < 1
