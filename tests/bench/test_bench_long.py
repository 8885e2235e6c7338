"""Long clips in the bench: files, frames chosen for each question, time by stage."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate import Recipe
from foveate.bench import (
    FolderSuite,
    Item,
    LongWorldSuite,
    Suite,
    open_suite,
    read_result,
    run_bench,
)
from foveate.bench import inputs as inputs_module
from foveate.bench import long_suite as long_module
from foveate.bench import stage_times as stage_module
from foveate.bench.identity import scorer_name
from foveate.bench.inputs import Prompts
from foveate.bench.plan import plan_cells
from foveate.bench.report import render_report
from foveate.bench.report_markdown import render_markdown
from foveate.checkpoints import load_model
from foveate.core.timeline import TIMED_STAGES
from foveate.errors import MissingSignalError

sys.path.insert(0, str(Path(__file__).parents[1] / "view"))
sys.path.insert(0, str(Path(__file__).parent))
from bench_runs import write_run
from checkpoints import save_checkpoint

BRIGHT = (20, 21, 22, 23)


class Brightness:
    """Looks for bright frames, and counts what it is shown."""

    size, probabilities = (8, 8), True

    def __init__(self) -> None:
        self.seen = 0

    def relevance(self, pixels_T3hw: torch.Tensor, question: str) -> torch.Tensor:
        self.seen += len(pixels_T3hw)
        return pixels_T3hw.float().mean((1, 2, 3)) / 255


def clip(seed: int) -> np.ndarray:
    """40 dark frames, four of them bright."""
    generator = np.random.default_rng(seed)
    frames = generator.integers(0, 60, (40, 40, 64, 3), dtype=np.uint8)
    frames[list(BRIGHT)] += 150
    return frames


def items(clips: int = 2) -> list[Item]:
    videos = [clip(n) for n in range(clips)]
    asked = ["what is in the video", "is the house red"]
    return [
        Item(f"{n}-{k}", f"clip{n}", videos[n], text, (), "yes", "all")
        for n in range(clips)
        for k, text in enumerate(asked)
    ]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(save_checkpoint("llava_onevision", tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def bench(loaded: tuple[Any, Any], tmp_path: Path) -> Callable[..., Any]:
    def run(recipes: Any, retain: Any = (0.25,), **options: Any) -> Any:
        settings = {
            "suite": Suite("mine", items()),
            "out": tmp_path / "out",
            "model": loaded[0],
            "processor": loaded[1],
            "frames": 8,
            "max_new_tokens": 2,
            "repeats": 0,
            "baselines": False,
            **options,
        }
        return run_bench(recipes, retain, **settings)

    return run


# -- frames are chosen for each question ----------------------------------------------------------


def test_prompts_hold_the_frames_that_were_chosen(loaded: tuple[Any, Any]) -> None:
    scorer = Brightness()
    prompts = Prompts(*loaded, Suite("mine", items()), 8, scorer=scorer)
    recipe = Recipe.of("quota(base=5, force=True)@frames")
    found = prompts.chosen(recipe, 0.5)
    assert [prompt.ranks for prompt in found] == [BRIGHT] * 4
    assert all(prompt.plan is not None and prompt.plan.num_frames == 4 for prompt in found)
    assert [p.item for p in found] == [p.item for p in prompts.prompts]
    inputs = prompts.collate(found[:1])
    taken = torch.from_numpy(clip(0)[list(BRIGHT)]).permute(0, 3, 1, 2)
    expected, _ = prompts.split(_frames(taken), found[0].item)[1], None
    torch.testing.assert_close(inputs["pixel_values_videos"], expected["pixel_values_videos"])


def _frames(pixels: torch.Tensor) -> Any:
    from foveate.video import Frames

    index = torch.arange(len(pixels))
    return Frames(pixels, index.double(), index)


def test_a_full_budget_takes_frames_evenly(loaded: tuple[Any, Any]) -> None:
    prompts = Prompts(*loaded, Suite("mine", items()), 8, scorer=Brightness())
    assert prompts.chosen(Recipe.of("f2c"), 1.0) == prompts.prompts


def test_what_a_scorer_saw_serves_all_cells(loaded: tuple[Any, Any]) -> None:
    scorer = Brightness()
    prompts = Prompts(*loaded, Suite("mine", items()), 8, scorer=scorer)
    prompts.chosen(Recipe.of("f2c@frames"), 0.25)
    seen = scorer.seen
    assert seen == 4 * 40  # two questions about each clip, every second of it
    prompts.chosen(Recipe.of("f2c@frames"), 0.5)
    assert scorer.seen == seen


def test_clips_beyond_those_that_stay_open_are_looked_at_once_a_cell(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "OPEN_CLIPS", 1)
    scorer, opened = Brightness(), []
    original = inputs_module.open_clip
    monkeypatch.setattr(
        inputs_module, "open_clip", lambda source: opened.append(1) or original(source)
    )
    prompts = Prompts(*loaded, Suite("mine", items(3)), 8, scorer=scorer)
    for cell in (1, 2):
        opened.clear()
        prompts.chosen(Recipe.of("f2c@frames"), 0.25)
        # The first stays open; two questions about each other one share it.
        assert len(opened) == (3 if cell == 1 else 2)
        assert scorer.seen == 2 * 40 + cell * 4 * 40


def test_pixels_of_another_cell_make_room(loaded: tuple[Any, Any]) -> None:
    prompts = Prompts(*loaded, Suite("mine", items()), 8, scorer=Brightness())
    even = prompts._bytes
    prompts.chosen(Recipe.of("f2c@frames"), 0.25)
    first = prompts._bytes
    assert first > even
    prompts.chosen(Recipe.of("f2c@frames"), 0.25)
    assert prompts._bytes == first


def test_pixels_beyond_the_cache_are_decoded_again(loaded: tuple[Any, Any]) -> None:
    kept, none = (
        Prompts(*loaded, Suite("mine", items()), 8, scorer=Brightness(), cache_bytes=size)
        for size in (1 << 30, 0)
    )
    for recipe in ("f2c@frames", "quota(base=5, force=True)@frames"):
        pairs = [prompts.chosen(Recipe.of(recipe), 0.5) for prompts in (kept, none)]
        (one, other) = (p.collate(q[2:3]) for p, q in zip((kept, none), pairs, strict=True))
        assert not none._kept
        torch.testing.assert_close(one["pixel_values_videos"], other["pixel_values_videos"])


def test_recipes_that_choose_get_as_many_tokens_as_fewer_frames(bench: Callable[..., Any]) -> None:
    recipes = "f2c@frames, even_frames, divprune, f2c"
    result = bench(recipes, (0.25, 0.5), scorer=Brightness(), batch=3)
    assert not result.failures
    untouched = result.untouched.figures["visual_before"]
    for budget in (0.25, 0.5):
        tokens = {c.recipe: c.figures["visual_after"] for c in result.at(budget)}
        assert tokens["even_frames"] == pytest.approx(budget * untouched, rel=0.1)
        assert tokens["f2c@frames"] <= tokens["even_frames"]
        assert tokens["f2c"] <= 1.1 * tokens["even_frames"]
    stages = result.cell("f2c@frames", 0.25).figures["stages"]
    assert stages[0]["stage"] == "frames" and stages[0]["before"] == 40
    assert stages[0]["after"] == 2


def test_without_a_scorer_the_model_itself_is_asked(
    loaded: tuple[Any, Any], bench: Callable[..., Any]
) -> None:
    result = bench("f2c@frames")
    assert not result.failures and result.run["scorer"] is None
    prompts = Prompts(*loaded, Suite("mine", items()), 8)
    with pytest.raises(MissingSignalError):
        prompts.chosen(Recipe.of("f2c"), 0.25)


def test_another_scorer_is_another_run(bench: Callable[..., Any]) -> None:
    bench("f2c@frames", scorer=Brightness())
    bench("f2c@frames", scorer=Brightness())
    with pytest.raises(ValueError, match="scorer"):
        bench("f2c@frames")


def test_the_name_of_a_scorer_tells_its_weights(loaded: tuple[Any, Any]) -> None:
    scorer = Brightness()
    assert scorer_name(scorer) == "Brightness"
    scorer.model = loaded[0]  # type: ignore[attr-defined]
    assert scorer_name(scorer).startswith("Brightness, weights ")


def test_even_frames_run_beside_recipes_that_choose() -> None:
    names = [cell.name for cell in plan_cells("quota", 0.5)]
    assert names == ["untouched", "quota", "random", "uniform", "pool", "even_frames"]
    assert "even_frames" not in [cell.name for cell in plan_cells("divprune", 0.5)]
    assert [c.name for c in plan_cells("even_frames", 0.5, baselines=False)][1:] == ["even_frames"]


# -- time by stage --------------------------------------------------------------------------------


def test_every_question_pays_for_all_that_its_frames_took(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, opened = Brightness(), []
    original = stage_module.open_clip
    monkeypatch.setattr(
        stage_module, "open_clip", lambda source: opened.append(1) or original(source)
    )
    result = bench("f2c@frames, divprune", scorer=scorer, repeats=2)
    # Two questions, two turns, three cells; each time the clip is looked at from the beginning.
    assert len(opened) == 2 * 2 * 3
    assert scorer.seen == 4 * 40 + 2 * 2 * 40
    for cell in result.cells:
        seconds = cell.stage_seconds
        assert tuple(seconds) == TIMED_STAGES
        assert all(seconds[stage] > 0 for stage in TIMED_STAGES[1:]), seconds
        assert (seconds["choose"] > 0) == (cell.recipe == "f2c@frames")


def test_without_repeats_nothing_is_timed(bench: Callable[..., Any]) -> None:
    result = bench("divprune")
    assert all(cell.stage_seconds == {} for cell in result.cells)
    assert "Time by stage" not in render_report(result)


def test_slow_cells_are_timed_once(
    loaded: tuple[Any, Any], bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = stage_module.open_clip
    monkeypatch.setattr(
        stage_module, "open_clip", lambda source: opened.append(1) or original(source)
    )
    monkeypatch.setattr(stage_module, "PATIENCE", 0.0)
    bench("divprune", repeats=3)
    assert len(opened) == 2 * 2


def test_the_page_and_the_table_show_where_time_goes(tmp_path: Path) -> None:
    write_run(tmp_path)
    old = read_result(tmp_path)
    assert "Time by stage" not in render_report(old) and "by stage" not in render_markdown(old)
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        seconds = [0.0 if number else 0.4, 0.2, 0.05, 0.03, 0.01]
        row["stage_seconds"] = dict(zip(TIMED_STAGES, seconds, strict=True))
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = read_result(tmp_path)
    page, table = render_report(result), render_markdown(result)
    assert "Time by stage" in page
    assert page.count('aria-label="choose') == len(result.budgets)
    assert page.count('aria-label="decode') == len(rows) - 1
    assert "<title>choose 400 ms</title>" in page
    # The longest bar fills its width; the others are in proportion.
    assert 'class="stage1" x="173.9" y="0" width="87.0"' in page
    line = next(line for line in table.splitlines() if line.startswith("| untouched | 690 ms"))
    # To the first token: all but the rest of the answer.
    figures = ["680 ms", "400 ms", "200 ms", "50.0 ms", "30.0 ms", "10.0 ms |"]
    assert line.split(" | ")[2:] == figures
    assert "<td>680 ms</td>" in page and "to the first token" in page


# -- suites of long clips -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "asked"), [("needle", 3), ("dense", 2)])
def test_files_are_made_once(tmp_path: Path, kind: Any, asked: int) -> None:
    pytest.importorskip("av")
    options = {"clips": 2, "minutes": 0.2, "cache": tmp_path}
    suite = LongWorldSuite(kind, **options)
    found = list(suite)
    assert len(found) == 2 * asked
    assert len({item.video for item in found}) == 2
    events = [event.question for n in range(2) for event in suite.world.sample(n).events]
    assert [(i.question, i.answer, i.task) for i in found] == [
        (q.text, q.answer, q.task) for q in events
    ]
    before = {item.video: item.video.stat().st_mtime_ns for item in found}
    again = list(LongWorldSuite(kind, **options))
    assert [item.id for item in again] == [item.id for item in found]
    assert {item.video: item.video.stat().st_mtime_ns for item in again} == before
    assert LongWorldSuite(kind, **(options | {"minutes": 0.3})).folder != suite.folder
    some = LongWorldSuite(kind, tasks=[found[0].task], **options)
    assert [item.id for item in some] == [i.id for i in found if i.task == found[0].task]
    assert some.folder == suite.folder


def test_clips_are_drawn_as_large_as_the_model_sees(tmp_path: Path) -> None:
    suite = LongWorldSuite("needle", 1, minutes=0.2, cache=tmp_path)
    assert suite.sized_for(64) is suite and suite.sized_for(None) is suite
    larger = suite.sized_for(384)
    assert (larger.drawn, larger.pixels, larger.folder) != (64, 128, suite.folder)
    assert larger.cache == tmp_path and larger.sized_for(64) is larger


def test_unused_suites_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    folders = []
    for number, minutes in enumerate((0.15, 0.16, 0.17)):
        suite = LongWorldSuite("dense", 1, minutes=minutes, cache=tmp_path)
        list(suite)
        folders.append(suite.folder)
        os.utime(suite.folder, (number, number))
    list(LongWorldSuite("dense", 1, minutes=0.15, cache=tmp_path))  # used again: the newest now
    size = sum(file.stat().st_size for file in folders[2].iterdir())
    monkeypatch.setattr(long_module, "CACHE_BYTES", size + 1)
    list(LongWorldSuite("dense", 1, minutes=0.15, cache=tmp_path))
    assert [folder.exists() for folder in folders] == [True, False, True]
    monkeypatch.setattr(long_module, "CACHE_BYTES", 0)
    list(LongWorldSuite("dense", 1, minutes=0.15, cache=tmp_path))
    assert [folder.exists() for folder in folders] == [True, False, False]


def test_suites_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    needle = open_suite("world-needle", clips=3, minutes=5, seed=2, tasks=["what"])
    assert isinstance(needle, LongWorldSuite)
    assert needle.folder.is_relative_to(tmp_path)
    facts = {"seconds": 300, "clips": 3, "seed": 2, "tasks": ["what"], "fps": 8}
    assert {key: needle.args[key] for key in facts} == facts
    dense = open_suite("world-dense")
    assert (dense.args["seconds"], dense.args["fps"], dense.args["clips"]) == (6, 30, 16)
    with pytest.raises(ValueError, match="minutes are for world-needle"):
        open_suite("world", minutes=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "hay"}, '"needle" or "dense"'),
        ({"clips": 0}, "at least 1"),
        ({"tasks": ["order"]}, "no task order"),
        ({"minutes": 0.05}, "do not fit"),
        ({"split": "all"}, "unknown split"),
    ],
)
def test_bad_suites_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongWorldSuite(**values)


def test_the_embedded_model_reads_needles_from_files(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from foveate import embedded
    from foveate.world.long import LongWorld
    from foveate.world.long_files import export_long

    # Clips that are little more than their event: what the model makes of it once it is found.
    world = LongWorld(3.2, fps=8, events=1)
    export_long((world.sample(number) for number in range(18)), tmp_path / "clips")
    model, processor = embedded()
    result = run_bench(
        "divprune",
        1.0,
        FolderSuite(tmp_path / "clips"),
        out=tmp_path / "out",
        model=model,
        processor=processor,
        repeats=0,
        baselines=False,
    )
    assert result.untouched.accuracy.value >= 0.75
