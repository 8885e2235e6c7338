"""`tune`: what it looks at, that it can be stopped at any point, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foveate
from foveate.bench import Item, Suite, run_bench, tune
from foveate.bench.flow import InformationFlow, mean_cosine
from foveate.bench.inputs import Prompts
from foveate.bench.search import GaussianProcess, LocalSearch, Trial, optimiser_named, random_point
from foveate.bench.tuning import search_space, some_of, with_values
from foveate.checkpoints import load_model
from foveate.core import Recipe, SearchRange
from foveate.errors import MissingDependencyError, RecipeError

sys.path.insert(0, str(Path(__file__).parents[1] / "view"))

from checkpoints import save_checkpoint

SPACE = {"tau": SearchRange(0.5, 1.0), "beta": SearchRange(0.0, 1.0)}
WIDE = {"x": SearchRange(-3.0, 5.0), "n": SearchRange(2, 9, integer=True)}


def suite(clips: int = 3, questions: int = 2) -> Suite:
    def items() -> Iterator[Item]:
        for clip in range(clips):
            rng = np.random.default_rng(clip)
            frames = rng.integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
            for number in range(questions):
                task = f"task {number}"
                yield Item(f"{clip}-{number}", f"clip {clip}", frames, "what is", (), "a", task)

    return Suite("small", items)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = save_checkpoint("llava_onevision", tmp_path_factory.mktemp("model"))
    model, processor = load_model(folder)
    return {"model": model, "processor": processor, "model_name": "tiny"}


def short(tiny: dict[str, Any], out: Path, trials: int = 4, **options: Any) -> Any:
    settings = {"samples": 4, "random": 2, "frames": 4, "optimiser": "local", **options}
    return tune("vflowopt", 0.3, suite(), out=out, trials=trials, **settings, **tiny)


# -- objective ------------------------------------------------------------------------------------


def test_cosine() -> None:
    full_KD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert mean_cosine(full_KD, 3 * full_KD) == pytest.approx(1.0)
    assert mean_cosine(full_KD, -full_KD) == pytest.approx(-1.0)
    broken_KD = full_KD.clone()
    broken_KD[2] = torch.nan
    assert mean_cosine(full_KD, broken_KD) == pytest.approx(4 / 5)


def test_states_are_the_last_hidden_states(tiny: dict[str, Any]) -> None:
    model = tiny["model"]
    prompts = Prompts(model, tiny["processor"], suite(), 4)
    flow = InformationFlow(model, prompts, batch=4)
    full_KD = flow.states()
    expected = []
    for batch in prompts.batches(4):
        with torch.no_grad():
            # With the mask of left padding, as generation has it.
            out = model(**prompts.collate(batch), output_hidden_states=True)
        expected.append(out.hidden_states[-1][:, -1])
    torch.testing.assert_close(full_KD, torch.cat(expected), atol=1e-4, rtol=0)
    assert flow.states(Recipe.of("vflowopt"), 1.0).equal(full_KD)
    assert not flow.states(Recipe.of("vflowopt"), 0.2).equal(full_KD)
    with foveate.reduce(model, "random", retain=0.5):
        pass  # nothing of the search is left on the model


def test_samples_take_every_clip_and_task_in_turn() -> None:
    ids = [item.id for item in some_of(suite(clips=3, questions=2), 5)]
    assert ids == ["0-0", "1-1", "2-0", "0-1", "1-0"]
    assert len(list(some_of(suite(), 100))) == 6


# -- proposals ------------------------------------------------------------------------------------


def score(point: dict[str, float]) -> float:
    return -((point["x"] - 1.7) ** 2) / 10 - abs(point["n"] - 6) / 10


def searched(optimiser: Any, trials: int, random: int = 6) -> list[Trial]:
    done = [Trial(0)]
    while len(done) <= trials:
        number = len(done)
        point = (
            random_point(WIDE, number, 0) if number <= random else optimiser.propose(WIDE, done, 0)
        )
        assert all(WIDE[name].low <= value <= WIDE[name].high for name, value in point.items())
        assert isinstance(point["n"], int)
        done.append(Trial(number, point, score(point), "x"))
    return done


@pytest.mark.parametrize("name", ["local", "gp"])
def test_both_optimisers_get_closer_than_chance(name: str) -> None:
    if name == "gp":
        pytest.importorskip("optuna")
    trials = 11 if name == "gp" else 60
    done = searched(optimiser_named(name), trials)
    found = max(trial.score for trial in done[1:])
    drawn = max(score(random_point(WIDE, number, 0)) for number in range(1, trials + 1))
    assert found > -0.02 and found > drawn


@pytest.mark.parametrize("name", ["local", "gp"])
def test_a_proposal_depends_on_the_trials_alone(name: str) -> None:
    if name == "gp":
        pytest.importorskip("optuna")
    done = searched(optimiser_named(name), 8)
    again = optimiser_named(name).propose(WIDE, done, 0)
    assert again == optimiser_named(name).propose(WIDE, done, 0)
    assert again != optimiser_named(name).propose(WIDE, done[:-1], 0)


def test_the_gaussian_process_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"foveate\[tune\]"):
        GaussianProcess()
    assert isinstance(optimiser_named("auto"), LocalSearch)
    with pytest.raises(ValueError, match="optimiser"):
        optimiser_named("annealing")


@pytest.mark.parametrize(
    "found", [SearchRange(-2, 3), SearchRange(0.01, 100, log=True), SearchRange(1, 7, integer=True)]
)
def test_places_in_a_range(found: SearchRange) -> None:
    values = [found.at(unit / 50) for unit in range(51)]
    assert values == sorted(values) and (values[0], values[-1]) == (found.low, found.high)
    assert [found.at(found.place(value)) for value in values] == pytest.approx(values)


@pytest.mark.parametrize(
    "arguments", [(1, 1), (2, 1), (0, float("inf")), (0.5, 3, True), (0, 3, False, True)]
)
def test_bad_ranges(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="range"):
        SearchRange(*arguments)


# -- space ----------------------------------------------------------------------------------------


def test_what_a_recipe_sets_is_not_searched() -> None:
    assert search_space(Recipe.of("holitom"), 0.2) == SPACE
    assert search_space(Recipe.of("holitom(tau=0.9)"), 0.2) == {"beta": SPACE["beta"]}
    assert set(search_space(Recipe.of("vflowopt(alpha=0.5)"), 0.2)) == {
        *("threshold", "cell", "keep_input", "keep_first"),
    }
    for recipe in ("holitom(tau=0.9, beta=0.5)", "divprune"):
        with pytest.raises(RecipeError, match=r"nothing to search.*vflowopt"):
            search_space(Recipe.of(recipe), 0.2)


def test_values_go_to_their_methods() -> None:
    both = Recipe.of("vflowopt@projector + transprune(retain=0.5)")
    space = search_space(both, 0.2)
    assert {"vflowopt.alpha", "transprune.alpha", "cell"} <= set(space)
    made = with_values(both, {"vflowopt.alpha": 0.25, "cell": 4.0})
    assert made.steps[0].method.arguments() == {"alpha": 0.25, "cell": 4.0}
    assert made.steps[1] == both.steps[1] and made.steps[0].stages == ("projector",)
    assert with_values(both, {"transprune.alpha": 0.1}).steps[1].method.arguments() == {
        "alpha": 0.1
    }


# -- searching ------------------------------------------------------------------------------------


def test_a_search_from_end_to_end(tiny: dict[str, Any], tmp_path: Path) -> None:
    told: list[tuple[int, bool]] = []
    result = short(tiny, tmp_path, on_trial=lambda trial, best: told.append((trial.number, best)))
    assert [number for number, _ in told] == [0, 1, 2, 3, 4]
    assert [trial.how for trial in result.trials] == ["given", "random", "random", *["local"] * 2]
    assert result.best.score == max(trial.score for trial in result.trials) >= result.given.score
    assert told[result.best.number][1] and not any(b for n, b in told if n > result.best.number)
    assert all(trial.error is None and -1 <= trial.score <= 1 for trial in result.trials)

    rows = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [row["cosine"] for row in rows] == [trial.score for trial in result.trials]
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| ") == 7 and f"**{result.best.score:.4f}**" in table
    assert result.as_dict()["best"]["recipe"] == str(result.recipe) and str(result.recipe) in str(
        result
    )
    # The recipe that was found is a file that everything else takes.
    best = tmp_path / "best.json"
    assert Recipe.of(str(best)) == result.recipe
    bench = run_bench(
        str(best),
        0.3,
        suite(),
        out=tmp_path / "bench",
        frames=4,
        repeats=0,
        baselines=False,
        **tiny,
    )
    assert [cell.recipe for cell in bench.cells] == ["untouched", str(result.recipe)]
    assert bench.cells[1].figures["error"] is None


def test_a_stopped_search_goes_on_as_if_it_had_not_been(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill(trial: Trial, is_best: bool) -> None:
        if trial.number == 3:
            raise Killed

    short(tiny, tmp_path / "whole", trials=6)
    with pytest.raises(Killed):
        short(tiny, tmp_path / "parts", trials=6, on_trial=kill)
    trials = tmp_path / "parts" / "trials.jsonl"
    assert len(trials.read_text().splitlines()) == 4
    assert (tmp_path / "parts" / "best.json").is_file()
    with trials.open("a") as file:
        file.write('{"trial": 4, "recipe": "vflo')  # what a power cut leaves
    short(tiny, tmp_path / "parts", trials=6)
    for name in ("trials.jsonl", "best.json", "table.md", "states.safetensors"):
        whole, parts = (tmp_path / which / name for which in ("whole", "parts"))
        assert parts.read_bytes() == whole.read_bytes(), name
    before = trials.read_bytes()
    assert len(short(tiny, tmp_path / "parts", trials=3).trials) == 7
    assert len(short(tiny, tmp_path / "parts", trials=7).trials) == 8
    assert trials.read_bytes().startswith(before)


def test_other_folders_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    short(tiny, tmp_path / "a", trials=1)
    with pytest.raises(ValueError, match=r"different run.*budget|different run.*ranges"):
        tune(
            *("vflowopt", 0.4, suite()),
            out=tmp_path / "a",
            samples=4,
            trials=1,
            random=2,
            frames=4,
            optimiser="local",
            **tiny,
        )
    with pytest.raises(ValueError, match="number of random trials"):
        short(tiny, tmp_path / "a", trials=1, random=3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"no run of foveate tune \(no tune.json, but thesis.tex"):
        short(tiny, tmp_path / "b")
    with pytest.raises(ValueError, match="no run of foveate bench"):
        run_bench("random", 0.5, suite(), out=tmp_path / "a", frames=4, **tiny)


def test_arguments_that_cannot_run_are_a_bad_trial(tiny: dict[str, Any], tmp_path: Path) -> None:
    space = {"cell": SearchRange(-5.0, -1.0)}
    result = short(tiny, tmp_path, trials=2, space=space)
    assert result.best is result.given and result.recipe == Recipe.of("vflowopt")
    assert all("cell is a side" in str(trial.error) for trial in result.trials[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples"),
        ({"random": 0}, "random"),
        ({"trials": 0}, "trials"),
        ({"optimiser": "best"}, "optimiser"),
        ({"space": {"sigma": SearchRange(0, 1)}}, "sigma"),
        ({"space": {}}, "space"),
    ],
)
def test_bad_input(tiny: dict[str, Any], tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short(tiny, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("retain", [0.0, 1.0, 1.5])
def test_bad_budgets(tiny: dict[str, Any], tmp_path: Path, retain: float) -> None:
    with pytest.raises(ValueError, match="retain"):
        tune("vflowopt", retain, suite(), out=tmp_path / "none", **tiny)
