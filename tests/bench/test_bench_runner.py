from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import Card, Method, Recipe
from foveate.bench import BenchResult, Item, Suite, WorldSuite, read_result, run_bench
from foveate.bench import identity as identity_module
from foveate.bench import inputs as inputs_module
from foveate.bench import runner as runner_module
from foveate.bench.generation import Generator
from foveate.bench.inputs import Prompts
from foveate.bench.measure import LiveTensors, peak_memory
from foveate.bench.plan import parse_budgets, plan_cells
from foveate.bench.store import read_lines
from foveate.checkpoints import load_model
from foveate.errors import RecipeError, UnknownMethodError
from foveate.view import ask

sys.path.insert(0, str(Path(__file__).parents[1] / "view"))
from checkpoints import save_checkpoint

QUESTIONS = ["what is in the video", "is the house red", "a bike rides past the white house"]


def clip(seed: int, frames: int = 6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (frames, 5, 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


def items(clips: int = 3) -> list[Item]:
    videos = [clip(n) for n in range(clips)]
    return [
        Item(f"{n}-{k}", f"clip{n}", videos[n], question, (), "yes", "even" if k % 2 else "odd")
        for n in range(clips)
        for k, question in enumerate(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return load_model(checkpoint)


@pytest.fixture(autouse=True)
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that a page was asked for; the page itself is tested on its own."""
    asked: list[Path] = []
    monkeypatch.setattr(runner_module, "_write_report", asked.append)
    return asked


@pytest.fixture
def bench(loaded: tuple[Any, Any], tmp_path: Path) -> Callable[..., BenchResult]:
    def run(recipes: Any = "divprune", retain: Any = (0.3,), **options: Any) -> BenchResult:
        settings = {
            "suite": Suite("mine", items()),
            "out": tmp_path / "out",
            "model": loaded[0],
            "processor": loaded[1],
            "frames": 6,
            "max_new_tokens": 2,
            "repeats": 0,
            "baselines": False,
            **options,
        }
        return run_bench(recipes, retain, **settings)

    return run


def answers(folder: Path) -> dict[tuple[str, float, str], str]:
    rows = read_lines(folder / "answers.jsonl")
    found = {(r["recipe"], r["retain"], r["id"]): r["predicted"] for r in rows}
    assert len(found) == len(rows), "an answer is there twice"
    return found


def stable(folder: Path) -> list[dict[str, Any]]:
    """Lines of cells without what a clock says."""
    return [{**row, "seconds": 0} for row in read_lines(folder / "cells.jsonl")]


# -- what is run ----------------------------------------------------------------------------------


def test_cells_are_planned_before_anything_is_loaded() -> None:
    keys = [c.key for c in plan_cells("tome(r=2, retain=0.6) + holitom, fastv", [0.1, 1])]
    assert keys[0] == ("untouched", 1.0)
    assert [name for name, budget in keys[1:] if budget == 0.1] == [
        *("tome(r=2, retain=0.6) + holitom", "fastv", "random", "uniform", "pool")
    ]
    assert len(keys) == 11
    everything = plan_cells("all", 0.1)
    assert len({c.key for c in everything}) == len(everything) > 10
    assert len(plan_cells("pool, pool,random", 0.1)) == 4  # nothing is run twice
    with pytest.raises(UnknownMethodError, match=r"holitim.*Did you mean holitom"):
        plan_cells("holitim", 0.1)
    with pytest.raises(RecipeError, match="has a budget of its own"):
        plan_cells("holitom(retain=0.5)", 0.1)
    with pytest.raises(ValueError, match="at least one recipe"):
        plan_cells(" , ", 0.1)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got 1.5"):
        parse_budgets("0.5,1.5")
    with pytest.raises(ValueError, match="must be numbers"):
        parse_budgets("0.5,half")
    with pytest.raises(ValueError, match="at least one budget"):
        plan_cells("fastv", [])


def test_a_misspelt_recipe_is_found_before_the_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownMethodError):
        run_bench("holitim", 0.1, Suite("s", items()), model="no/such/model", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("recipe", [None, "holitom"])
def test_batches_answer_like_single_questions(
    family: str, recipe: str | None, tmp_path: Path
) -> None:
    model, processor = load_model(save_checkpoint(family, tmp_path / "model"))
    asked = [
        Item(i.id, i.clip_id, i.video, i.question, (), found.text, i.task)
        for i in items()
        for found in [
            ask(
                *(model, processor, i.video, i.question, recipe),
                **{"frames": 6, "max_new_tokens": 3, "retain": 0.4 if recipe else None},
            )
        ]
    ]
    result = run_bench(
        "holitom",
        0.4,
        Suite("as one by one", asked),
        out=tmp_path / "out",
        model=model,
        processor=processor,
        **{"frames": 6, "max_new_tokens": 3, "batch": 4, "repeats": 0, "baselines": False},
    )
    (cell,) = [c for c in result.cells if c.recipe == (recipe or "untouched")]
    assert cell.figures["correct"] == cell.figures["items"] == 9
    assert len(set(answers(tmp_path / "out").values())) > 3


def test_a_budget_of_one_is_the_untouched_model(bench: Callable[..., BenchResult]) -> None:
    result = bench("holitom,fastv,tome@encoder", 1)
    found = answers(result.folder)
    plain = {key[2]: text for key, text in found.items() if key[0] == "untouched"}
    assert all(plain[key[2]] == text for key, text in found.items())
    untouched, *others = stable(result.folder)
    for cell in others:
        assert cell == {**untouched, "recipe": cell["recipe"]}


def test_figures_of_a_cell(bench: Callable[..., BenchResult]) -> None:
    result = bench("divprune,fastv(layer=1)", [0.3], repeats=2)
    untouched, divprune, fastv = (cell.figures for cell in result.cells)
    assert untouched["visual_before"] == untouched["visual_after"] == 6 * 9 + 1
    assert untouched["tasks"] == {"odd": [0, 6], "even": [0, 3]} and untouched["items"] == 9
    # The untouched model's FLOPs come from formulas, those of the others from their reports.
    assert divprune["flops"]["untouched"] == untouched["flops"]["untouched"]
    assert divprune["flops"]["reduced"] < untouched["flops"]["reduced"]
    assert divprune["visual_before"] == 55 and divprune["visual_after"] == 16
    (stage,) = divprune["stages"]
    assert (stage["stage"], stage["before"], stage["after"]) == ("projector", 55, 16)
    text = [length - 55 for length in untouched["layer_tokens"]]
    assert len(text) == 4 and len(set(text)) == 1
    assert divprune["layer_tokens"] == pytest.approx([text[0] + 16] * 4)
    assert fastv["visual_after"] == 55 and fastv["stages"][0]["layer"] == 1
    left = fastv["stages"][0]["after"]
    assert fastv["layer_tokens"] == pytest.approx([text[0] + 55] + [text[0] + left] * 3)
    per_layer = [cell.visual_per_layer for cell in result.cells]
    assert per_layer == pytest.approx([55, 16, (55 + 3 * left) / 4])
    for figures in (untouched, divprune, fastv):
        first = figures["first_token"]
        assert 0 < first["low"] <= first["median"] <= first["high"] and first["repeats"] == 2
        assert figures["decode_tokens_per_second"] > 0 and figures["error"] is None
    assert untouched["overhead"] == {} and set(divprune["overhead"]) == {"projector"}
    assert 0 < divprune["overhead"]["projector"] < divprune["first_token"]["high"]


def test_without_repeats_there_are_no_times(bench: Callable[..., BenchResult]) -> None:
    figures = bench().cells[0].figures
    assert figures["first_token"] is None and figures["decode_tokens_per_second"] is None
    assert figures["peak_memory"] > 0


def test_options_are_offered_with_letters_where_the_suite_says_so(checkpoint: Path) -> None:
    model, processor = load_model(checkpoint)
    item = Item("1", "c", clip(0), "what is in the video", ("bike", "house"), "bike", "what")

    def length(lettered: bool) -> int:
        made = Prompts(model, processor, Suite("s", [item], lettered=lettered), 6)
        return made.prompts[0].length * (1 if made.lettered else -1)

    words = "A. bike B. house Answer with the option's letter from the given choices directly."
    # Its tokenizer does not know the words yet, so the question is asked as it is.
    assert length(True) == length(False) < 0
    processor.tokenizer.add_tokens([word for word in words.split() if word not in item.options])
    assert length(True) + length(False) == len(words.split())


def test_replies_have_room_for_the_longest_answer_and_a_lead_in(
    bench: Callable[..., BenchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, limits = Generator.generate, set()

    def limited(self: Generator, inputs: Any, tokens: int, **options: Any) -> Any:
        limits.add(tokens)
        return generate(self, inputs, tokens, **options)

    monkeypatch.setattr(Generator, "generate", limited)
    asked = [*items(1), Item("long", "clip0", clip(0), "what", (), "a red bike", "odd")]
    result = bench(suite=Suite("mine", asked), max_new_tokens=None)
    # One more for the FLOPs of the encoder and for memory; the words of the tokenizer are tokens.
    assert limits == {3 + 8, 1} and result.run["max_new_tokens"] == 11


def test_each_clip_is_read_once_while_it_fits(
    bench: Callable[..., BenchResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[int] = []
    sample = inputs_module.sample_frames
    monkeypatch.setattr(inputs_module, "sample_frames", lambda *a: (read.append(1), sample(*a))[1])
    bench("divprune,fastv", [0.3, 0.5])
    assert len(read) == 3
    bench("divprune,fastv", [0.3, 0.5], cache_bytes=0, out=tmp_path / "again", batch=4)
    assert len(read) > 3 + 3 + 5 * 3
    assert answers(tmp_path / "again") == answers(tmp_path / "out")


def test_a_batch_too_large_for_the_memory_is_halved(
    bench: Callable[..., BenchResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench()
    generate, sizes = Generator.generate, []

    def small(self: Generator, inputs: Any, tokens: int, **options: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return generate(self, inputs, tokens, **options)

    monkeypatch.setattr(Generator, "generate", small)
    bench(out=tmp_path / "small")
    assert max(sizes) > 2 and answers(tmp_path / "small") == answers(tmp_path / "out")
    assert stable(tmp_path / "small") == stable(tmp_path / "out")


def test_live_tensors_are_counted_while_they_live() -> None:
    layer = torch.nn.Linear(1000, 1000, bias=False)

    def call() -> None:
        one = torch.ones(1000, 1000)
        two = one + one
        view = two.t()[:10]
        del one, two
        torch.zeros(100, 1000)
        del view

    assert peak_memory(layer, call) == 3 * 4_000_000
    with LiveTensors(layer) as live:
        call()
    assert live.now == 4_000_000


# -- recipes that fail ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(Method):
    """Fails when it is asked."""

    card: ClassVar[Card] = Card(
        "broken", "Broken", "test", ("projector",), "baseline", "For tests."
    )

    def projector(self, tokens: Any, context: Any) -> None:
        raise IndexError("no such\nrow")


def test_a_recipe_that_fails_is_shown_and_the_run_goes_on(
    bench: Callable[..., BenchResult],
) -> None:
    # There is no such layer in the model, which only the attachment can see.
    recipes = [Recipe.of(Broken()), "fastv(layer=99)", "uniform"]
    seen: list[dict[str, Any]] = []
    result = bench(recipes, on_cell=seen.append)
    errors = {cell.recipe: cell.error for cell in result.cells}
    assert errors["broken"] == "IndexError: no such row"
    assert errors["fastv(layer=99)"].startswith("ValueError: layer = 99 does not exist")
    assert errors["untouched"] is None and errors["uniform"] is None
    assert [row["recipe"] for row in seen] == list(errors)
    assert {key[0] for key in answers(result.folder)} == {"untouched", "uniform"}
    assert "IndexError: no such row" in str(result)
    failed = result.as_dict()["cells"][1]
    assert failed["items"] == 0 and failed["accuracy"] is None


def test_failed_cells_are_measured_again_when_asked(
    bench: Callable[..., BenchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, broken = Generator.generate, [True]

    def flaky(self: Generator, inputs: Any, tokens: int, **options: Any) -> Any:
        if broken[0] and "measured" in broken:
            raise RuntimeError("the disk is full")
        return generate(self, inputs, tokens, **options)

    monkeypatch.setattr(Generator, "generate", flaky)
    mark = lambda line: broken.append("measured")  # noqa: E731
    first = bench(on_cell=mark)  # the untouched model answers, divprune does not
    assert [cell.error for cell in first.cells] == [None, "RuntimeError: the disk is full"]
    broken[0] = False
    seen: list[Any] = []
    assert bench(on_cell=seen.append).cells[1].error and not seen
    again = bench(on_cell=seen.append, retry_failed=True)
    assert [cell.error for cell in again.cells] == [None, None]
    assert [line["recipe"] for line in seen] == ["divprune"]
    assert len(stable(again.folder)) == 2 and len(answers(again.folder)) == 18


def test_planned_cells_of_all_calls_are_known(bench: Callable[..., BenchResult]) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench("divprune", [0.3, 0.5], progress=Stop(4 + 3))
    stopped = read_result(bench("fastv", [0.3]).folder)
    planned = [("untouched", 1.0), ("divprune", 0.3), ("divprune", 0.5), ("fastv", 0.3)]
    assert [tuple(key) for key in stopped.run["planned"]] == planned
    assert stopped.missing == [key for key in planned if key not in {c.key for c in stopped.cells}]
    assert ("divprune", 0.5) in stopped.missing
    assert bench("divprune", [0.3, 0.5]).missing == []


def test_the_untouched_model_must_answer(
    bench: Callable[..., BenchResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken model")

    monkeypatch.setattr(Generator, "generate", fail)
    with pytest.raises(RuntimeError, match="broken model"):
        bench()
    assert read_result(tmp_path / "out").cells == []


# -- clips that fail ------------------------------------------------------------------------------


def test_clips_that_do_not_decode_are_left_out(
    bench: Callable[..., BenchResult], tmp_path: Path
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"not a video" * 100)
    bad = [
        Item(f"b{n}", "bad", tmp_path / "bad.mp4", "what", (), "red", "odd", f"q.jsonl:{n}")
        for n in (4, 9)
    ]
    result = bench(suite=Suite("mine", [*items(1), *bad]))
    assert result.run["items"] == 3 and result.run["clips"] == 1
    assert [line.split(": ")[0] for line in result.run["skipped"]] == ["q.jsonl:4", "q.jsonl:9"]
    with pytest.raises(ValueError, match=r"no question of mine can be asked: q.jsonl:4: "):
        bench(suite=Suite("mine", bad), out=tmp_path / "other")
    with pytest.raises(ValueError, match="two questions have the id '0-0'"):
        bench(suite=Suite("mine", items(1) * 2), out=tmp_path / "other")
    assert not (tmp_path / "other" / "run.json").exists()


# -- going on -------------------------------------------------------------------------------------


class Stop:
    """Interrupts a run at the n-th word about its progress."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, what: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [4, 7, 8, 13])
def test_an_interrupted_run_goes_on(
    bench: Callable[..., BenchResult], tmp_path: Path, reports: list[Path], after: int
) -> None:
    # Five batches of two a cell: the interruption falls into cells and between them.
    options = {"recipes": "divprune,fastv", "retain": [0.3, 0.5], "batch": 2}
    whole = bench(**options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        bench(**options, progress=Stop(3 + after))
    stopped = read_result(tmp_path / "out")  # readable as it is
    assert len(stopped.cells) < 5 and reports[-1] == tmp_path / "out"
    again: list[Any] = []
    result = bench(**options, on_cell=again.append)
    assert len(again) == 5 - len(stopped.cells)
    assert stable(tmp_path / "out") == stable(tmp_path / "whole")
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert [c.accuracy for c in result.cells] == [c.accuracy for c in whole.cells]


def test_a_finished_run_does_nothing_and_can_grow(bench: Callable[..., BenchResult]) -> None:
    first = bench()
    before = (first.folder / "cells.jsonl").read_bytes()
    seen: list[Any] = []
    bench(on_cell=seen.append)
    assert not seen and (first.folder / "cells.jsonl").read_bytes() == before
    bench("fastv,divprune", [0.3, 0.6], on_cell=seen.append)
    keys = [(c["recipe"], c["retain"]) for c in seen]
    assert keys == [("fastv", 0.3), ("fastv", 0.6), ("divprune", 0.6)]


def test_lines_that_a_kill_cut_off_are_repaired(
    bench: Callable[..., BenchResult], tmp_path: Path
) -> None:
    options = {"recipes": "divprune,fastv", "retain": [0.3]}
    bench(**options, out=tmp_path / "whole")
    bench(**options)
    cells, rows = tmp_path / "out" / "cells.jsonl", tmp_path / "out" / "answers.jsonl"
    # The last cell's line is cut, and so are answers that stand before it.
    cells.write_bytes(cells.read_bytes()[:-40])
    rows.write_bytes(rows.read_bytes()[:-30])
    assert len(read_result(tmp_path / "out").cells) == 2
    bench(**options)
    assert stable(tmp_path / "out") == stable(tmp_path / "whole")
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    # A whole line without its end is kept.
    cells.write_bytes(cells.read_bytes()[:-1])
    seen: list[Any] = []
    bench(**options, on_cell=seen.append)
    assert not seen and cells.read_bytes().endswith(b"}\n") and len(stable(tmp_path / "out")) == 3


def test_a_line_damaged_in_the_middle_is_named(
    bench: Callable[..., BenchResult], tmp_path: Path
) -> None:
    cells = bench().folder / "cells.jsonl"
    cells.write_text("{oops\n" + cells.read_text())
    with pytest.raises(ValueError, match=r"cells\.jsonl:1 is damaged"):
        bench()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 4}, r"frames \(6 there, 4 here\)"),
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"max_new_tokens": 3}, r"max_new_tokens \(2 there"),
        ({"model_name": "other"}, r"model \(Llava.* there, other here\)"),
        ({"suite": Suite("yours", items())}, r"suite \(mine there, yours here\)"),
        ({"suite": Suite("mine", items(2))}, r"number of questions \(9 there, 6 here\)"),
        ({"suite": Suite("mine", items(), args={"a": 1})}, r"arguments of the suite \(\{\} there"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    bench: Callable[..., BenchResult], changes: dict[str, Any], message: str
) -> None:
    folder = bench().folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"holds a different run: .*{message}"):
        bench(**changes)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_exchanged_clip_is_another_run(
    bench: Callable[..., BenchResult], tmp_path: Path
) -> None:
    """Also where its length in bytes is the same; where it lies and when it was written is not."""

    def save(file: Path, seed: int) -> Path:
        file.parent.mkdir(exist_ok=True)
        # Pictures without compression: equal sizes, whatever they show.
        Image.fromarray(clip(seed)[0]).save(file, format="bmp")
        return file

    def run(file: Path) -> None:
        bench(suite=Suite("mine", [Item("1", "c", file, QUESTIONS[0], (), "yes", "all")]))

    first = save(tmp_path / "a" / "clip.bmp", 0)
    run(first)
    run(save(tmp_path / "b" / "clip.bmp", 0))
    size = first.stat().st_size
    assert save(first, 1).stat().st_size == size
    with pytest.raises(ValueError, match=r"different run: questions \("):
        run(first)


def test_exchanged_frames_are_another_run(bench: Callable[..., BenchResult]) -> None:
    bench()
    changed = [Item(**{**item.__dict__, "video": item.video[::-1]}) for item in items()]
    with pytest.raises(ValueError, match=r"different run: questions \("):
        bench(suite=Suite("mine", changed))


def test_generated_clips_are_told_apart_by_their_arguments(loaded: tuple[Any, Any]) -> None:
    """The run of a world goes on where other releases of Pillow draw a pixel otherwise."""
    suite = WorldSuite(1, ["what"], frames=4)
    prompts = Prompts(*loaded, suite, 4)
    before = identity_module._digest(prompts)
    for prompt in prompts.prompts:
        prompt.item.video[...] += 1
    assert identity_module._digest(prompts) == before


def test_other_weights_and_other_answers_are_another_run(
    bench: Callable[..., BenchResult], loaded: tuple[Any, Any]
) -> None:
    bench()
    changed = items()
    changed[4] = Item(**{**changed[4].__dict__, "answer": "no"})
    with pytest.raises(ValueError, match=r"different run: questions \("):
        bench(suite=Suite("mine", changed))
    weight = loaded[0].lm_head.weight
    kept = weight.data.clone()
    try:
        weight.data[0, 0] += 1
        with pytest.raises(ValueError, match="different run: class and weights of the model"):
            bench()
    finally:
        weight.data.copy_(kept)
    bench()


def test_nothing_else_is_overwritten(bench: Callable[..., BenchResult], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"not empty and holds no run .*thesis\.txt"):
        bench(out=mine)
    with pytest.raises(ValueError, match="is a file"):
        bench(out=mine / "thesis.txt")
    (mine / "run.json").write_text('{"name": "marathon"}')
    with pytest.raises(ValueError, match="not of this version"):
        bench(out=mine)
    (mine / "run.json").write_text("marathon")
    with pytest.raises(ValueError, match="cannot be read"):
        bench(out=mine)
    assert sorted(path.name for path in mine.iterdir()) == ["run.json", "thesis.txt"]


def test_two_runs_do_not_write_to_one_folder(
    bench: Callable[..., BenchResult], tmp_path: Path
) -> None:
    pytest.importorskip("fcntl")

    def meddle(line: Any) -> None:
        with pytest.raises(BlockingIOError, match="another run is writing"):
            bench()

    bench(on_cell=meddle)
    assert len(stable(tmp_path / "out")) == 2


def test_values_are_checked(bench: Callable[..., BenchResult], loaded: tuple[Any, Any]) -> None:
    for name in ("frames", "batch", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            bench(**{name: 0})
    with pytest.raises(ValueError, match="needs its processor"):
        bench(processor=None)


def test_the_run_says_what_it_was(bench: Callable[..., BenchResult]) -> None:
    run = json.loads((bench(model_name="tiny").folder / "run.json").read_text())
    assert run["version"] == 1 and run["model"] == "tiny"
    assert run["model_id"].startswith("LlavaOnevisionForConditionalGeneration, weights ")
    assert run["items"] == 9 and run["clips"] == 3 and run["tasks"] == {"odd": 6, "even": 3}
    assert (
        run["device"] == "cpu" and run["dtype"] == "float32" and run["torch"] == torch.__version__
    )
    assert {"hardware", "transformers", "foveate", "date", "command", "suite_args"} <= set(run)
