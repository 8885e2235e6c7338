"""The page and the table of a bench run, read back and compared with the files of the run."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import bench_runs
import numpy as np
import pytest
from bench_runs import BASELINES, BUDGETS, TASKS, write_run
from hypothesis import given
from hypothesis import strategies as st

from foveate.bench import stats
from foveate.bench.report import markdown_table, render_report, write_report
from foveate.bench.report_axes import accuracy_scale, share_ticks, spread
from foveate.bench.report_plots import styles_of
from foveate.bench.report_text import DASH
from foveate.bench.results import read_result

NUMBER = r"([+\u2212]?\d+\.\d)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), failing=("quickvideo",))


@pytest.fixture(scope="module")
def page(run: Path) -> ET.Element:
    return parsed(render_report(read_result(run)))


def parsed(html: str) -> ET.Element:
    """The page as XML, which it is but for its first line; raises where it is not well-formed."""
    assert html.startswith("<!doctype html>\n")
    return ET.fromstring(html.partition("\n")[2])


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def answers_of(folder: Path) -> dict[tuple[str, float], dict[str, dict]]:
    table: dict[tuple[str, float], dict[str, dict]] = defaultdict(dict)
    for row in rows_of(folder, "answers.jsonl"):
        table[row["recipe"], row["retain"]][row["id"]] = row
    return table


def words(node: ET.Element) -> str:
    return re.sub(r"\s+", " ", "".join(node.itertext())).strip()


def of_class(root: ET.Element, name: str) -> list[ET.Element]:
    return [node for node in root.iter() if name in node.get("class", "").split()]


def panel(page: ET.Element, title: str) -> ET.Element:
    return next(p for p in of_class(page, "panel") if words(p.find("h2")) == title)  # type: ignore[arg-type]


def sheet(page: ET.Element, title: str, budget: float) -> ET.Element:
    heading = f"{100 * budget:g} % kept"
    return next(s for s in of_class(panel(page, title), "sheet") if words(s[0]) == heading)


def table_rows(sheet: ET.Element) -> dict[str, list[str]]:
    """Cells of the first table by recipe."""
    body = next(sheet.iter("tbody"))
    return {words(row.find("th")): [words(cell) for cell in row] for row in body}  # type: ignore[arg-type]


def figures(cell: str) -> list[float]:
    return [float(n.replace("\u2212", "-")) for n in re.findall(NUMBER, cell)]


# -- the document ---------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_and_runs_nothing(run: Path, page: ET.Element) -> None:
    html = render_report(read_result(run))
    assert not re.search(r"https?:|url\(|@import|<script|javascript:|\son\w+=", html)
    for node in page.iter():
        assert node.get("href", "data:").startswith("data:") and node.get("src") is None
    policy = next(n for n in page.iter("meta") if n.get("http-equiv"))
    assert "default-src 'none'" in policy.get("content", "") and "script" not in policy.get(
        "content", ""
    )
    ids = [node.get("id") for node in page.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert {n.get("for") for n in page.iter("label") if n.get("for")} <= set(ids)


def test_the_head_says_what_was_run(page: ET.Element) -> None:
    head = words(next(page.iter("header")))
    for phrase in (
        "of class LlavaOnevision",
        "model models/embedded",
        "world (clips 40, seed 0)",
        "200 about 40 clips in 10 tasks",
        "2 cores",
    ):
        assert phrase in head
    for phrase in ("cpu float32", "2026-03-14 09:26", "torch 2.13.0", "--retain 0.05,0.1"):
        assert phrase in head


def test_the_page_names_data_that_was_left_out(page: ET.Element) -> None:
    assert 'skipped: questions.jsonl:7: no "answer"' in words(panel(page, "Left out"))


def test_nothing_from_outside_is_taken_for_markup(tmp_path: Path) -> None:
    evil = 'x" onload="a(1)"><b>&amp;|`'
    write_run(tmp_path, recipes=((evil, "projector", 1.0, 0.8),), tasks=("<i>t", "u"), clips=8)
    run = json.loads((tmp_path / "run.json").read_text())
    run |= {"model": "<u>m</u>", "command": "</pre><b>", "hardware": "&nbsp;"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    page = parsed(render_report(read_result(tmp_path)))
    assert not [n for n in page.iter() if n.tag in ("i", "u")]
    assert not [n for n in page.iter() if n.get("onload")]
    assert [words(n) for n in page.iter("pre")] == ["</pre><b>"]
    assert evil in table_rows(sheet(page, "Ranking", 0.1))
    lines = markdown_table(tmp_path).splitlines()
    heads = next(line for line in lines if line.startswith("| recipe"))
    row = next(line for line in lines if line.startswith("| `x"))
    assert len(re.findall(r"(?<!\\)\|", row)) == heads.count("|") and row.count("`") == 2


# -- curves ---------------------------------------------------------------------------------------


def points(group: ET.Element) -> list[tuple[float, float]]:
    line = next(n for n in group if n.tag == "polyline" and n.get("class") == "stroke")
    return [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]  # type: ignore[misc]


def test_every_recipe_that_ran_is_on_every_chart(page: ET.Element) -> None:
    ran = {name for name, *_ in bench_runs.SMALL} - {"quickvideo"} | set(BASELINES)
    charts = of_class(page, "chart")
    assert len(of_class(page, "curves")) == 2 and len(of_class(page, "small")) == len(TASKS)
    for chart in charts:
        assert {g.get("data-recipe") for g in of_class(chart, "series")} == ran
        assert len(of_class(chart, "series")) == len(ran)


def test_points_lie_where_the_figures_are(run: Path, page: ET.Element) -> None:
    cells = {(c["recipe"], c["retain"]): c for c in rows_of(run, "cells.jsonl")}
    for chart, log_x in (
        (of_class(page, "curves")[0], lambda c: math.log(c["retain"])),
        (
            of_class(page, "curves")[1],
            lambda c: math.log(c["flops"]["reduced"] / c["flops"]["untouched"]),
        ),
    ):
        drawn, wanted = [], []
        for group in of_class(chart, "series"):
            found = points(group)
            offset = np.mean([x for x, _ in found])
            mine = [cells[group.get("data-recipe"), b] for b in sorted(BUDGETS, reverse=True)]  # type: ignore[index]
            middle = np.mean([log_x(c) for c in mine])
            for (x, y), cell in zip(found, mine, strict=True):
                # Recipes are shifted sideways, each as a whole.
                drawn.append((x - offset, y))
                wanted.append((log_x(cell) - middle, cell["correct"] / cell["items"]))
        for axis in (0, 1):
            one, other = np.array(wanted)[:, axis], np.array(drawn)[:, axis]
            slope, start = np.polyfit(one, other, 1)
            assert slope < 0  # fewer tokens to the right, higher accuracy higher up
            assert np.abs(slope * one + start - other).max() < 0.3


def test_whiskers_and_the_band_are_the_intervals(run: Path, page: ET.Element) -> None:
    chart = of_class(page, "curves")[0]
    table = answers_of(run)
    rules = [n for n in of_class(chart, "rule") if n.get("y1") == n.get("y2")]
    ticks = [n for n in of_class(chart, "tick") if n.get("text-anchor") == "end"]
    levels = [float(words(n).rstrip(" %")) / 100 for n in ticks]
    slope, start = np.polyfit([float(n.get("y1", "")) for n in rules], levels, 1)
    group = next(g for g in of_class(chart, "series") if g.get("data-recipe") == "holitom")
    for node, budget in zip(of_class(group, "whisker"), sorted(BUDGETS, reverse=True), strict=True):
        rows = list(table["holitom", budget].values())
        found = stats.accuracy([r["correct"] for r in rows], [r["clip"] for r in rows])
        ends = sorted(slope * float(node.get(end, "")) + start for end in ("y1", "y2"))
        assert ends == pytest.approx([found.low, found.high], abs=1e-3)
    rows = list(table["untouched", 1.0].values())
    found = stats.accuracy([r["correct"] for r in rows], [r["clip"] for r in rows])
    band = of_class(of_class(chart, "untouched")[0], "band")[0]
    top = slope * float(band.get("y", "")) + start
    assert top == pytest.approx(found.high, abs=1e-3)
    height = -slope * float(band.get("height", ""))
    assert height == pytest.approx(found.high - found.low, abs=1e-3)


def test_marks_say_their_figures_when_pointed_at(run: Path, page: ET.Element) -> None:
    cell = next(
        c for c in rows_of(run, "cells.jsonl") if (c["recipe"], c["retain"]) == ("pool", 0.05)
    )
    share = 100 * cell["correct"] / cell["items"]
    titles = [words(n) for n in of_class(page, "curves")[0].iter("title")]
    assert any(t.startswith(f"pool at 5 %: {share:.1f} % (") for t in titles)


def test_thirty_recipes_have_labels_that_do_not_touch_and_looks_of_their_own(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, recipes=bench_runs.large(), clips=10)
    results = read_result(tmp_path)
    page = parsed(render_report(results))
    for chart in of_class(page, "curves"):
        _, _, width, height = map(float, chart.get("viewBox", "").split())
        labels = of_class(chart, "name")
        assert len(labels) == 33
        heights = sorted(float(n.get("y", "")) for n in labels)
        assert min(np.diff(heights)) >= 13
        assert heights[0] > 0 and heights[-1] <= height
        assert all(float(n.get("x", "")) < width - 150 for n in labels)
    styles = styles_of(results)
    assert len({(s.colour, s.shape) for s in styles.values()}) == 33
    assert sum(s.leads for s in styles.values()) == 8 + 3
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 33 * 4 + 1


def test_baselines_are_a_dashed_grey_family(page: ET.Element) -> None:
    for chart in of_class(page, "chart"):
        for group in of_class(chart, "series"):
            is_grey = bool({"b0", "b1", "b2"} & set(group.get("class", "").split()))
            assert is_grey == (group.get("data-recipe") in BASELINES)
    css = words(next(page.iter("style")))
    for number in range(3):
        assert re.search(rf"\.b{number} \.stroke \{{ stroke-dasharray", css)


# -- ranking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_ranking_is_what_the_answers_say(run: Path, page: ET.Element, budget: float) -> None:
    table = answers_of(run)
    untouched = table["untouched", 1.0]
    cells = {name: rows for (name, b), rows in table.items() if b == budget}

    def share(rows: dict[str, dict]) -> float:
        return sum(row["correct"] for row in rows.values()) / len(rows)

    def paired(one: dict[str, dict], other: dict[str, dict]) -> stats.Interval:
        both = [(one[key]["correct"], other[key]["correct"], one[key]["clip"]) for key in one]
        return stats.difference(*map(list, zip(*both, strict=True)))  # type: ignore[arg-type]

    best = max(BASELINES, key=lambda name: share(cells[name]))
    shown = table_rows(sheet(page, "Ranking", budget))
    order = list(shown)
    assert order[0] == "untouched" and set(order[1:]) == set(cells)
    assert [share(cells[n]) for n in order[1:]] == sorted(map(share, cells.values()), reverse=True)
    heads = [words(n) for n in sheet(page, "Ranking", budget).iter("th") if n.get("scope") == "col"]
    assert f"against {best}, the best baseline" in heads
    for place, name in enumerate(order[1:], 1):
        number, _, _, accuracy, to_untouched, to_best, verdict = shown[name]
        rows = list(cells[name].values())
        found = stats.accuracy([r["correct"] for r in rows], [r["clip"] for r in rows])
        assert int(number) == place
        assert figures(accuracy) == pytest.approx([100 * f for f in found.as_list()], abs=0.051)
        wanted = paired(cells[name], untouched).as_list()
        assert figures(to_untouched) == pytest.approx([100 * f for f in wanted], abs=0.051)
        if name in BASELINES:
            assert to_best == DASH and verdict == ""
            continue
        wanted = paired(cells[name], cells[best]).as_list()
        assert figures(to_best) == pytest.approx([100 * f for f in wanted], abs=0.051)
        for rival in BASELINES:
            gap = paired(cells[name], cells[rival])
            marked = re.search(rf"below ([\w, ]*)\b{rival}\b[\w, ]* · (ex|in)cludes 0", verdict)
            assert bool(marked) == (gap.value < 0)
            if marked:
                assert (marked[2] == "ex") == (gap.high < 0)


def test_a_recipe_below_a_baseline_is_marked_with_and_without_certainty(tmp_path: Path) -> None:
    # Too few clips for certainty about the near ones, enough for the far one.
    recipes = (("close", "projector", 1.4, 0.8), ("bad", "projector", 3.0, 0.8))
    write_run(tmp_path, recipes=recipes, budgets=(0.1,), clips=25, seed=3)
    shown = table_rows(sheet(parsed(render_report(read_result(tmp_path))), "Ranking", 0.1))
    assert "excludes 0" in shown["bad"][-1] and "pool" in shown["bad"][-1]
    assert "excludes 0" not in shown["close"][-1] and "includes 0" in shown["close"][-1]


# -- losses and costs -----------------------------------------------------------------------------


def test_lost_questions_are_counted_against_the_untouched_model(
    run: Path, page: ET.Element
) -> None:
    table = answers_of(run)
    untouched = table["untouched", 1.0]
    found = sheet(page, "What is lost", 0.05)
    heads = [words(n) for n in next(found.iter("thead")).iter("th")]
    assert heads == ["recipe", "all", *TASKS]
    for name, cells in table_rows(found).items():
        mine = table[name, 0.05]
        for task, cell in zip((None, *TASKS), cells[1:], strict=True):
            held = [k for k, r in untouched.items() if r["correct"] and task in (None, r["task"])]
            lost = sum(not mine[key]["correct"] for key in held)
            assert float(cell) == pytest.approx(100 * lost / len(held), abs=0.51)
    lost_by_all = words(list(found.iter("table"))[1])
    question = re.search(r"test/\d+/\d+", lost_by_all)
    assert question and "7 of 7" in lost_by_all
    assert not any(table[name, 0.05][question[0]]["correct"] for name in table_rows(found))


def test_costs_are_those_of_the_cells(run: Path, page: ET.Element) -> None:
    cells = {(c["recipe"], c["retain"]): c for c in rows_of(run, "cells.jsonl")}
    base = cells["untouched", 1.0]
    shown = table_rows(sheet(page, "Costs", 0.1))
    for name, (
        _,
        stages,
        tokens,
        layers,
        flops,
        first,
        times,
        rate,
        memory,
        spent,
    ) in shown.items():
        cell = cells[name, 1.0 if name == "untouched" else 0.1]
        assert tokens == f"{cell['visual_after']} of 256"
        assert float(layers) == cell["visual_after"]
        share = 100 * cell["flops"]["reduced"] / cell["flops"]["untouched"]
        assert flops.endswith(f"{share:.1f} %")
        assert float(flops.split()[0]) == pytest.approx(cell["flops"]["reduced"] / 1e9, rel=6e-3)
        median = cell["first_token"]["median"]
        assert float(first.split()[0]) == pytest.approx(1e3 * median, rel=6e-3)
        assert times == f"{median / base['first_token']['median']:.2f}\u00d7"
        assert float(rate) == pytest.approx(cell["decode_tokens_per_second"], rel=6e-3)
        assert memory == DASH
        if name != "untouched":
            assert "4.20 ms" in spent and stages != DASH
    assert "encoder 1-2: 1,024 → 614 60 %" in shown["tome(retain=0.6)@encoder + holitom"][1]


def test_recipes_that_could_not_run_are_named_with_the_reason(page: ET.Element) -> None:
    told = words(panel(page, "Could not run"))
    assert "quickvideo" in told and "5 %, 10 %, 20 %, 50 %" in told
    assert "needs encoder.cls_attention, which this tower <lacks>" in told
    for budget in BUDGETS:
        assert "quickvideo" not in table_rows(sheet(page, "Ranking", budget))


# -- runs that are not whole ----------------------------------------------------------------------


def test_cells_without_timing_show_dashes(tmp_path: Path) -> None:
    page = parsed(render_report(read_result(write_run(tmp_path, timed=False, clips=8))))
    for cells in table_rows(sheet(page, "Costs", 0.1)).values():
        assert cells[5:10] == [DASH] * 5
    assert DASH in markdown_table(tmp_path).split("`holitom`")[1].splitlines()[0]


def test_times_are_compared_within_the_same_minutes(tmp_path: Path) -> None:
    write_run(tmp_path, clips=8)
    cells = rows_of(tmp_path, "cells.jsonl")
    for cell in cells:
        # The machine was half as fast while this cell was measured, with and without the recipe.
        cell["first_token_untouched"] = {"median": 0.42, "low": 0.4, "high": 0.5, "repeats": 5}
        cell["first_token"] = {"median": 0.105, "low": 0.1, "high": 0.2, "repeats": 5}
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    shown = table_rows(sheet(parsed(render_report(read_result(tmp_path))), "Costs", 0.1))
    assert shown["holitom"][6] == "0.25\u00d7"


def test_one_budget_one_task_and_no_untouched_cell(tmp_path: Path) -> None:
    write_run(tmp_path, budgets=(0.1,), tasks=("what",), untouched=False, clips=8)
    page = parsed(render_report(read_result(tmp_path)))
    assert "untouched model has no result yet" in words(of_class(page, "banner")[0])
    titles = [words(p.find("h2")) for p in of_class(page, "panel")]  # type: ignore[arg-type]
    assert "By task" not in titles and "What is lost" not in titles
    shown = table_rows(sheet(page, "Ranking", 0.1))
    assert shown["holitom"][4] == DASH and figures(shown["holitom"][5])
    xs = {n.get("x1") for n in of_class(of_class(page, "curves")[0], "whisker")}
    assert len(xs) == 8  # side by side
    assert "untouched |" not in markdown_table(tmp_path)


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    write_run(tmp_path, clips=8)
    cells = (tmp_path / "cells.jsonl").read_text().splitlines(keepends=True)
    # Killed while the line after the last whole one was written.
    (tmp_path / "cells.jsonl").write_text("".join(cells[:12]) + cells[12][:40])
    results = read_result(tmp_path)
    assert len(results.cells) == 12
    page = parsed(render_report(results))
    assert "21 cells without a result yet" in words(of_class(page, "banner")[0])
    assert "21 cells without a result yet" in markdown_table(tmp_path)
    assert len(of_class(page, "series")) > 0


@pytest.mark.parametrize("cells", ["", '{"recipe": "untouched", "retain": 1.0, "items": 0}\n'])
def test_a_run_without_results_is_told_so(tmp_path: Path, cells: str) -> None:
    (tmp_path / "run.json").write_text('{"model": "tiny"}')
    (tmp_path / "cells.jsonl").write_text(cells)
    write_report(tmp_path)
    assert "Nothing to draw yet" in (tmp_path / "report.html").read_text()
    assert "model tiny" in (tmp_path / "table.md").read_text()


def test_cells_without_their_answers_keep_their_accuracy(tmp_path: Path) -> None:
    write_run(tmp_path, clips=8)
    (tmp_path / "answers.jsonl").unlink()
    shown = table_rows(sheet(parsed(render_report(read_result(tmp_path))), "Ranking", 0.1))
    cell = next(c for c in rows_of(tmp_path, "cells.jsonl") if c["retain"] == 0.1)
    assert figures(shown[cell["recipe"]][3]) == [100 * cell["correct"] / cell["items"]]
    assert "±" not in markdown_table(tmp_path).split("`holitom`")[1].splitlines()[0]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_latest_line_of_a_cell_holds(tmp_path: Path) -> None:
    write_run(tmp_path, clips=8, failing=("fastv",))
    cell = next(c for c in rows_of(tmp_path, "cells.jsonl") if c["recipe"] == "fastv")
    other = next(c for c in rows_of(tmp_path, "cells.jsonl") if c["recipe"] == "holitom")
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write(json.dumps({**other, "recipe": "fastv", "retain": cell["retain"]}) + "\n")
    (again,) = [c for c in read_result(tmp_path).of("fastv") if c.retain == cell["retain"]]
    assert again.error is None and again.accuracy is not None


# -- markdown -------------------------------------------------------------------------------------


def markdown_rows(text: str, number: int) -> list[list[str]]:
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in tables[number].split("\n")]
    assert set("".join(lines[1])) <= set(" :-")
    return [line for line in (lines[0], *lines[2:]) if line != [""]]


def test_the_markdown_has_the_figures_of_the_run(run: Path) -> None:
    write_report(run)
    text = (run / "table.md").read_text()
    assert text == markdown_table(run)
    cells = {(c["recipe"], c["retain"]): c for c in rows_of(run, "cells.jsonl")}
    heads, untouched, *rows = markdown_rows(text, 0)
    assert heads[:5] == ["recipe", "5 %", "10 %", "20 %", "50 %"]
    assert untouched[0] == "untouched" and untouched[-2] == "1.00\u00d7"
    assert {len(row) for row in (heads, untouched, *rows)} == {8}
    accuracies = []
    for row in rows:
        name = row[0].strip("`*")
        assert (row[0][0] == "*") == (name in BASELINES)
        for column, budget in enumerate(BUDGETS, 1):
            cell = cells[name, budget]
            mean, half = figures(row[column])
            assert mean == pytest.approx(100 * cell["correct"] / cell["items"], abs=0.051)
            assert 0 < half < 20
        cell = cells[name, 0.1]
        share = 100 * cell["flops"]["reduced"] / cell["flops"]["untouched"]
        assert row[5] == f"{share:.1f} %"
        accuracies.append(cell["correct"])
    assert accuracies == sorted(accuracies, reverse=True)
    for column, budget in enumerate(BUDGETS, 1):
        most = max(c["correct"] for (n, b), c in cells.items() if b == budget and n != "untouched")
        bold = {row[0].strip("`*") for row in rows if row[column].startswith("**")}
        assert bold == {
            row[0].strip("`*")
            for row in rows
            if cells[row[0].strip("`*"), budget]["correct"] == most
        }
    heads, *rows = markdown_rows(text, 1)
    assert heads == ["recipe", *TASKS] and rows[0][0] == "untouched"
    for row in rows[1:]:
        tasks = cells[row[0].strip("`*"), 0.1]["tasks"]
        for task, shown in zip(TASKS, row[1:], strict=True):
            right, number = tasks[task]
            assert float(shown) == pytest.approx(100 * right / number, abs=0.51)
    for phrase in ("`quickvideo` could not run at", "2 cores, cpu float32", "2026-03-14"):
        assert phrase in text
    assert "```console\n$ foveate bench --model embedded" in text


def test_the_markdown_names_baselines_that_do_better(run: Path) -> None:
    rows = {row[0].strip("`*"): row[-1] for row in markdown_rows(markdown_table(run), 0)}
    shares = {c["recipe"]: c["correct"] for c in rows_of(run, "cells.jsonl") if c["retain"] == 0.1}
    for name in ("holitom", "divprune", "fastv"):
        named = {part.strip("() ") for part in rows[name].split(",") if part}
        assert named == {b for b in BASELINES if shares[b] > shares[name]}
    assert rows["fastv"]  # the generator makes it worse than pool


# -- parts ----------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=40).map(sorted),
    st.floats(0.5, 20),
)
def test_labels_keep_their_order_their_distance_and_their_room(
    wanted: list[float], gap: float
) -> None:
    placed = spread(wanted, gap, 0, 100)
    room = min(gap, 100 / max(len(wanted) - 1, 1))
    assert all(b - a >= room - 1e-6 for a, b in pairwise(placed))
    assert placed[0] >= -1e-6 and placed[-1] <= 100 + 1e-6
    apart = all(b - a >= room for a, b in pairwise(wanted))
    if apart and room == gap:
        assert placed == pytest.approx(wanted, abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_accuracy_axes_hold_their_figures_with_round_steps(values: list[float]) -> None:
    scale = accuracy_scale([stats.Interval(value) for value in values])
    assert scale.bottom <= min(values) + 1e-9 and scale.top >= max(values) - 1e-9
    assert 2 <= len(scale.levels) <= 9
    assert scale.bottom / scale.step == pytest.approx(round(scale.bottom / scale.step))


@given(st.floats(0.001, 0.9), st.floats(1.05, 100))
def test_share_ticks_lie_inside_and_apart(low: float, ratio: float) -> None:
    ticks = share_ticks(low, low * ratio)
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert all(math.log(a / b) > 0.05 * math.log(ratio) for a, b in pairwise(ticks))


def oklab(rgb: np.ndarray) -> np.ndarray:
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(rgb @ np.array(to_lms).T) @ np.array(to_lab).T


# Machado, Oliveira, Fernandes 2009, severity 1: what is left of linear RGB.
SIGHT = {
    "full": np.eye(3),
    "protan": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deutan": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(("scheme", "card"), [(0, "#ffffff"), (1, "#191c20")])
def test_colours_are_told_apart_without_red_or_green(
    page: ET.Element, sight: str, scheme: int, card: str
) -> None:
    css = "".join(next(page.iter("style")).itertext())
    found = re.findall(r"--c\d: (#[0-9a-f]{6})", css)[8 * scheme : 8 * scheme + 8]
    assert f"--card: {card}" in css and len(set(found)) == 8
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (*found, card)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = oklab(np.clip(linear @ SIGHT[sight].T, 0, 1))[:8]
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[~np.eye(8, dtype=bool)]
    assert apart.min() > 0.09
    light = linear @ np.array([0.2126, 0.7152, 0.0722]) + 0.05
    contrast = np.maximum(light[:8], light[8]) / np.minimum(light[:8], light[8])
    assert contrast.min() >= 3
