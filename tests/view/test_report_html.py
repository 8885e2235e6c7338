from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reports import bright_frames, small_report

from foveate.core import Grid, ItemReport, Plane, Reduction, Report
from foveate.view import draw_item, draw_kept, render_report, save_report
from foveate.view.layout import frame_of_plane, view_item
from foveate.view.palette import group_colours


class Elements(HTMLParser):
    """All start tags with their attributes, and whether every element was closed in order."""

    VOID = frozenset({"meta", "link", "img", "input", "line", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.broken: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def of(self, tag: str, style: str | None = None) -> list[dict[str, str]]:
        return [
            attributes
            for name, attributes in self.found
            if name == tag and (style is None or style in attributes.get("class", "").split())
        ]


def image_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_the_document_is_well_formed_and_loads_nothing() -> None:
    html = render_report(small_report())
    page = Elements(html)
    assert not page.broken and not page.open
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", html)
    links = [a.get("src", "") for _, a in page.found] + [a.get("href", "") for _, a in page.found]
    assert all(link == "" or link.startswith(("data:", "#")) for link in links)
    policy = next(a["content"] for a in page.of("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_every_frame_has_its_time_and_its_counts_in_words() -> None:
    page = Elements(render_report(small_report()))
    views = page.of("div", "view")
    assert [view["data-when"] for view in views] == ["0.00 s", "0.50 s", "1.00 s", "1.50 s"]
    assert views[1]["aria-label"] == (
        "0.50 s: of 24 patches 1 kept as they are, 12 merged, 11 dropped"
    )
    assert len(page.of("a", "col")) == 4
    targets = {a["id"] for a in page.of("figure", "frame")}
    assert {a["href"][1:] for a in page.of("a", "col")} == targets
    segments = page.of("span", "seg")
    assert [a["title"] for a in segments] == [
        "segments 1: 0.00 s to 0.50 s",
        "segments 2: 1.00 s to 1.50 s",
    ]


def test_figures_stages_and_notes_are_there() -> None:
    html = render_report(small_report())
    text = re.sub(r"<[^>]+>", " ", html)
    for phrase in (
        "6.2  %",  # 6 of 97
        "6  of 97",
        "1 of 1 newline tokens",
        "2 segments",
        "3.33 times less",
        "a remark",
        "6 tokens enter the language model",
    ):
        assert phrase in text, phrase
    assert [len(Elements(html).of("svg", "chart"))] == [3]  # layers, FLOPs, seconds


def test_groups_in_the_page_are_the_groups_of_the_report() -> None:
    report = small_report()
    section = Elements(render_report(report)).of("section", "item")[0]
    packed = np.frombuffer(base64.b64decode(section["data-groups"]), "<u2").astype(int)
    packed[packed == 0xFFFF] = -1
    reduction = report.items[0].reduction
    assert reduction is not None
    assert packed.tolist() == reduction.groups_BN[0, :-1].tolist()
    bits = np.frombuffer(base64.b64decode(section["data-alive"]), np.uint8)
    assert bits.tolist() == [0b11, 0b01]


def test_text_from_outside_is_escaped() -> None:
    report = small_report()
    report.recipe = "<script>alert(1)</script>"
    report.notes = ['<img src="x">']
    html = render_report(report, title='A "title" & <b>bold</b>')
    page = Elements(html)
    assert len(page.of("script")) == 1
    assert not [a for a in page.of("img") if a.get("src") == "x"]
    assert "A &quot;title&quot; &amp; &lt;b&gt;bold&lt;/b&gt;" in html


def test_overlay_dims_what_was_dropped_and_only_that() -> None:
    page = Elements(render_report(small_report()))
    over = image_of(page.of("img", "overlay")[0]["src"])
    photo = image_of(page.of("img")[0]["src"])
    assert over.shape[:2] == photo.shape[:2]
    rows, columns = over.shape[0] // 4, over.shape[1] // 6

    def middle(row: int, column: int) -> np.ndarray:
        # off the centre, where a merged token's own place has its dot
        return over[row * rows + rows // 4, column * columns + columns // 4]

    assert middle(2, 5)[3] > 150 and middle(2, 5)[:3].max() < 30
    assert middle(0, 3)[3] == 0
    assert 0 < middle(2, 1)[3] < 150


def test_merged_patches_have_one_colour_over_time() -> None:
    page = Elements(render_report(small_report()))
    overlays = [image_of(a["src"]) for a in page.of("img", "overlay")]
    picked = {tuple(over[over.shape[0] // 2 + 3, over.shape[1] // 12 + 5]) for over in overlays}
    assert len(picked) == 1


def test_bare_grid_when_there_are_no_pixels() -> None:
    page = Elements(render_report(small_report(with_pixels=False)))
    assert len(page.of("img")) == len(page.of("img", "overlay")) == 4


def test_frames_given_are_drawn_on_instead() -> None:
    report = small_report(with_pixels=False)
    page = Elements(render_report(report, frames=bright_frames(4)))
    assert len(page.of("img")) == 8
    with pytest.raises(ValueError, match=r"1 items, but frames for 2"):
        render_report(report, frames=[bright_frames(4)] * 2)


def test_temporal_patches_show_their_first_frame() -> None:
    frames = bright_frames(4)
    frames[2] = 10
    item = ItemReport(0, "video", Grid.video(2, 2, 2), pixels=lambda: frames)
    page = Elements(render_report(Report(items=[item])))
    photos = [image_of(a["src"]) for a in page.of("img") if a.get("class") != "overlay"]
    assert photos[0].mean() > 200 and photos[1].mean() < 30
    assert [frame_of_plane(p, 4, 7) for p in range(4)] == [0, 2, 4, 6]


@pytest.mark.parametrize("kind", ["none", "synthesised", "all dropped", "tiles"])
def test_unusual_items_are_drawn(kind: str) -> None:
    item = ItemReport(0, "image", Grid((Plane(2, 3, row_newline=True), Plane(4, 4, prefix=1))))
    n = item.grid.num_tokens
    if kind == "synthesised":
        item.reduction = Reduction.synthesise(torch.randn(3, 8), num_in=n)
    elif kind == "all dropped":
        item.reduction = Reduction.select(torch.empty(1, 0, dtype=torch.long), n)
    elif kind == "tiles":
        item.reduction = Reduction.select(torch.arange(0, n, 2), n)
    html = render_report(Report(items=[item]))
    assert html.count('class="view"') == 2
    assert draw_item(item).size[0] > 0
    view = view_item(item)
    assert {name for name, _, _ in view.specials} == {"newline", "[CLS]"}


def test_a_picture_stands_untouched_beside_what_was_kept() -> None:
    item = ItemReport(
        0, "image", Grid.image(2, 3), Reduction.merge(torch.tensor([[0, 0, 1, -1, 2, 2]]), 3)
    )
    assert "untouched</b>" not in render_report(Report(items=[item]))  # without pixels: no twin
    item.pixels, item.name = (lambda: bright_frames(1)), "cat & dog.png"
    html = render_report(Report(items=[item]))
    page = Elements(html)
    assert not page.broken and "<h2>cat &amp; dog.png</h2>" in html and "6 patches" in html
    twin, photo, over = page.of("img")
    assert twin["src"] == photo["src"] and over["class"] == "overlay"
    assert len(page.of("div", "view")) == len(page.of("div", "plain")) == 1
    assert "0.00 s" not in html and not page.of("span", "strip")


def test_reduction_of_another_item_is_refused() -> None:
    item = ItemReport(0, "image", Grid.image(2, 2), Reduction.identity(5))
    with pytest.raises(ValueError, match="4 tokens, its reduction is for 1 x 5"):
        render_report(Report(items=[item]))


def test_empty_report_says_so() -> None:
    html = render_report(Report())
    assert "No visual tokens" in html and not Elements(html).broken


def test_several_samples_and_items_are_told_apart() -> None:
    report = small_report()
    other = small_report().items[0]
    other.sample = 1
    report.items = [*report.items, other]
    names = [a["aria-label"] for a in Elements(render_report(report)).of("section", "item")]
    assert names == ["Video 1, sample 1", "Video 2, sample 2"]


def noisy(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (frames, 3, height // 4, width // 4), generator=generator)
    return coarse.byte().repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("frames", [32, 200])
def test_size_stays_below_three_megabytes(tmp_path: Path, frames: int) -> None:
    grid = Grid.video(frames, 14, 14)
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(-1, 900, (grid.num_tokens,), generator=generator)
    groups[:900] = torch.arange(900)
    pixels = noisy(frames, 180, 320)
    item = ItemReport(0, "video", grid, Reduction.merge(groups, 900), pixels=lambda: pixels)
    path = save_report(Report(items=[item]), tmp_path / "kept.html")
    assert path.stat().st_size < 3_000_000
    if frames == 200:
        assert "one frame in 2 shown" in path.read_text()


def test_saving_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        save_report(small_report(), tmp_path / "missing" / "kept.html")
    with pytest.raises(ValueError, match="is a directory"):
        save_report(small_report(), tmp_path)
    broken = small_report()
    broken.items[0].pixels = lambda: torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    target = tmp_path / "kept.html"
    target.write_text("before")
    with pytest.raises(ValueError, match=r"uint8 \[3, height, width\]"):
        save_report(broken, target)
    assert target.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["kept.html"]
    save_report(small_report(), target)
    assert target.read_text().startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.html"]


def test_report_save_writes_html_and_json(tmp_path: Path) -> None:
    report = small_report()
    report.save(tmp_path / "kept.html", title="mine")
    report.save(tmp_path / "kept.json")
    assert "<h1>mine</h1>" in (tmp_path / "kept.html").read_text()
    assert json.loads((tmp_path / "kept.json").read_text())["visual_after"] == 6


def test_draw_kept_dims_and_desaturates() -> None:
    frame = torch.zeros(3, 60, 90, dtype=torch.uint8)
    frame[0] = 250
    picture = np.asarray(draw_kept(frame, Plane(2, 3), [0, -1, 1, 1, -1, 2], size=180)).astype(int)
    assert picture.shape == (120, 180, 3)
    kept, dropped = picture[30, 30], picture[30, 90]
    assert kept.tolist() == [250, 0, 0]
    assert dropped.max() < 60 and dropped.max() - dropped.min() < 15


def test_draw_kept_refuses_what_does_not_fit() -> None:
    frame = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="needs 4 groups, got 3"):
        draw_kept(frame, (2, 2), [0, 1, 2])
    with pytest.raises(ValueError, match="-1 for dropped, got -2"):
        draw_kept(frame, (2, 2), [0, 1, 2, -2])
    with pytest.raises(ValueError, match="uint8"):
        draw_kept(frame.float(), (2, 2), [0, 1, 2, 3])


def test_contact_sheet_holds_every_plane() -> None:
    item = small_report(frames=6).items[0]
    sheet = draw_item(item, columns=3, size=90)
    assert sheet.size == (3 * (90 + 8) + 8, 2 * (60 + 20 + 8) + 8)


def test_colours_are_far_apart() -> None:
    colours = group_colours(12).astype(float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distance[~np.eye(12, dtype=bool)].min() > 25
