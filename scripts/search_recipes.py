"""Find combined recipes that beat their parts at equal cost, on the embedded model.

    python scripts/search_recipes.py search RUN         pairs on clips of the validation split
    python scripts/search_recipes.py confirm RUN        the best of them on the test split
    python scripts/search_recipes.py page RUN           docs/combined-recipes.md from both

Every pair of a method that shortens the prompt with one that acts in the decoder or inside the
encoder is run with original positions, at three divisions of the budget. A pair is judged by its
accuracy above the best of its parts at equal FLOPs, the parts with either way to number positions.
All cells stay in RUN and a stopped search goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.bench import BenchResult, WorldSuite, read_result, run_bench
from foveate.bench.report_markdown import table
from foveate.core import PRESETS, Budget, Recipe
from foveate.core._files import write_text
from foveate.errors import RecipeError

PAGE = Path(__file__).parents[1] / "docs" / "combined-recipes.md"
#: Around what scripts/search_fast.py writes.
BEGIN, END = "<!-- fast: begin -->", "<!-- fast: end -->"
PROMPT = ("divprune", "vidcom2", "evs", "todre@projector", "holitom@projector", "uniform")
INSIDE = ("fastv", "catp@decoder", "lvlm_csp", "pyramiddrop")
ENCODER = ("tome(retain=0.5)@encoder", "tome(retain=0.3)@encoder")
SHARES = ((1, 2), (1, 1), (2, 1))
SEARCH = {"clips": 24, "split": "val"}
CONFIRM = {"clips": 64, "split": "test"}
SEARCH_AT = (0.05, 0.1, 0.2)
CONFIRM_AT = (0.05, 0.1, 0.2, 0.5)
PARTS_AT = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6)
#: Pairs of the search that are run on the test split.
FINALISTS = 4


@dataclass(frozen=True)
class Trial:
    """A combined recipe, the parts it must beat, and by how much it does.

    Attributes:
        name: the recipe as the run names it.
        parts: recipes of one method.
        gain: mean accuracy above the best part at equal FLOPs, as a fraction.
        worst: the smallest such difference over the budgets.
    """

    name: str
    parts: tuple[str, ...]
    gain: float
    worst: float


def candidates() -> dict[str, tuple[Recipe, tuple[Recipe, ...]]]:
    """Name in the run -> recipe and its parts."""
    found: dict[str, tuple[Recipe, tuple[Recipe, ...]]] = {}
    for one, other in itertools.product(PROMPT, INSIDE):
        for left, right in SHARES:
            _add(found, f"{_shared(one, left)} + {_shared(other, right)}", (one, other))
    for encoder, one in itertools.product(ENCODER, (*PROMPT, *INSIDE)):
        _add(found, f"{encoder} + {one}", (one, "tome"))
    return found


def _add(found: dict, text: str, parts: tuple[str, ...]) -> None:
    # Numbered anew, this model loses its only clock: docs/leaderboard-positions.md.
    recipe = Recipe(Recipe.parse(text).steps, "original")
    alone = tuple(
        Recipe(made.steps, way)
        for made in map(Recipe.parse, parts)
        # Inside the encoder there is nothing to number.
        for way in (("original",) if made.stages == ("encoder",) else ("compact", "original"))
    )
    found[run_name(recipe)] = recipe, alone


def _shared(term: str, share: int) -> str:
    if share == 1:
        return term
    name, at, stage = term.partition("@")
    return f"{name}(share={share}){at}{stage}"


def run_name(recipe: Recipe) -> str:
    """What a bench run calls a recipe."""
    return str(recipe) + ("" if recipe.positions == "auto" else f" ({recipe.positions} positions)")


def judged(result: BenchResult, name: str, parts: tuple[Recipe, ...]) -> Trial | None:
    """A recipe against the upper envelope of its parts; None when a curve is missing."""
    names = tuple(run_name(part) for part in parts)
    mine, curves = _curve(result, name), [_curve(result, part) for part in names]
    if mine is None or any(curve is None for curve in curves):
        return None
    gains = []
    for flops, accuracy in mine[:-1]:
        # Left of a part's cheapest point the part cannot go; it counts with what it has there.
        best = max(np.interp(flops, *np.array(curve).T) for curve in curves if curve)
        gains.append(accuracy - best)
    return Trial(name, names, float(np.mean(gains)), float(min(gains)))


def _curve(result: BenchResult, name: str) -> list[tuple[float, float]] | None:
    """(FLOPs as a fraction of the untouched model's, accuracy), ascending, untouched model last."""
    points = [
        (cell.flops_fraction, cell.accuracy.value)
        for cell in result.of(name)
        if cell.accuracy is not None and cell.flops_fraction is not None
    ]
    if not points or result.untouched is None or result.untouched.accuracy is None:
        return None
    return [*sorted(points), (1.0, result.untouched.accuracy.value)]


def run(recipes: list[Recipe], retain: tuple[float, ...], world: dict[str, Any], out: Path) -> None:
    """Measure what is not measured yet; a recipe whose own budgets forbid one is left out there."""
    for at in retain:
        fitting = [recipe for recipe in recipes if _fits(recipe, at)]
        run_bench(
            fitting,
            at,
            WorldSuite(**world),
            out=out,
            batch=16,
            repeats=0,
            progress=lambda what, done, total: print(
                f"\r{what[:70]:<72}{done}/{total}", end="", file=sys.stderr, flush=True
            ),
        )


def _fits(recipe: Recipe, retain: float) -> bool:
    try:
        recipe.budgets(Budget(retain=retain))
    except RecipeError:
        return False
    return True


def ranking(folder: Path) -> list[Trial]:
    """All judged candidates of a run, best first."""
    result = read_result(folder)
    trials = [judged(result, name, parts) for name, (_, parts) in candidates().items()]
    return sorted((t for t in trials if t is not None), key=lambda t: -t.gain)


def search(folder: Path) -> None:
    """Run all candidates and their parts on the validation split."""
    pairs = candidates()
    parts = list({run_name(p): p for _, alone in pairs.values() for p in alone}.values())
    run(parts, PARTS_AT, SEARCH, folder / "val")
    run([recipe for recipe, _ in pairs.values()], SEARCH_AT, SEARCH, folder / "val")
    for trial in ranking(folder / "val")[:20]:
        print(f"{trial.gain:+.3f} {trial.worst:+.3f}  {trial.name}")


def confirm(folder: Path) -> None:
    """Run the best of the search, the named recipes and their parts on the test split."""
    pairs = candidates()
    chosen = [pairs[trial.name] for trial in ranking(folder / "val")[:FINALISTS]]
    chosen += [pairs[run_name(p.recipe)] for p in PRESETS.values() if run_name(p.recipe) in pairs]
    parts = list({run_name(p): p for _, alone in chosen for p in alone}.values())
    run(parts, PARTS_AT, CONFIRM, folder / "test")
    run([recipe for recipe, _ in chosen], CONFIRM_AT, CONFIRM, folder / "test")
    for trial in ranking(folder / "test"):
        print(f"{trial.gain:+.3f} {trial.worst:+.3f}  {trial.name}")


def page(folder: Path) -> str:
    """docs/combined-recipes.md."""
    result, found = read_result(folder / "test"), read_result(folder / "val")
    trials = {trial.name: trial for trial in ranking(folder / "val")}
    pairs = candidates()
    run_info = json.loads((folder / "test" / "run.json").read_text(encoding="utf-8"))
    lines = [_INTRO.format(trials=len(trials), **_facts(run_info))]
    lines += [_preset(result, name) for name, p in PRESETS.items() if run_name(p.recipe) in pairs]
    rows = [
        [f"`{trial.name}`", f"{100 * trial.gain:+.1f}", f"{100 * trial.worst:+.1f}"]
        for trial in list(trials.values())[:15]
    ]
    whole = found.untouched.accuracy.value if found.untouched and found.untouched.accuracy else 0
    lines.append(
        "## The search\n\nThe best fifteen of all trials on the validation split, in points of "
        "accuracy above the best of the parts at equal FLOPs: mean over the budgets, and at "
        f"the worst of them. The untouched model answers {100 * whole:.1f} % there.\n\n"
        + table(("recipe", "mean", "worst"), rows)
        + "\n\nTrials that lose to a part on average: "
        f"{sum(t.gain < 0 for t in trials.values())} of {len(trials)}."
    )
    # `fast` was found by another search, which writes its own section.
    lines.append("## `fast`\n\n" + _section_of_fast())
    return "\n\n".join(lines) + "\n"


def _section_of_fast() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def _preset(result: BenchResult, preset_name: str) -> str:
    preset = PRESETS[preset_name]
    name = run_name(preset.recipe)
    _, parts = candidates()[name]
    trial = judged(result, name, parts)
    assert trial is not None, f"{name} was not confirmed"
    rows = []
    for recipe in (name, *trial.parts):
        cells = {cell.retain: cell for cell in result.of(recipe)}
        row = [f"**{preset_name}**" if recipe == name else f"`{recipe}`"]
        for at in CONFIRM_AT:
            cell = cells.get(at)
            if cell is None or cell.accuracy is None:
                row.append("not run")
            else:
                row.append(f"{100 * cell.accuracy.value:.1f} at {100 * cell.flops_fraction:.0f} %")
        rows.append(row)
    heads = ["accuracy at FLOPs", *(f"{100 * at:g} % kept" for at in CONFIRM_AT)]
    return (
        f"## `{preset_name}`\n\n{preset.summary}\n\n```text\n{preset.recipe}\n```\n\n"
        f"Positions: {preset.recipe.positions}. On the test split {100 * trial.gain:+.1f} points "
        f"above the best of its parts at equal FLOPs on average, {100 * trial.worst:+.1f} at the "
        f"worst of the four budgets.\n\n{table(heads, rows)}"
    )


def _facts(run_info: dict[str, Any]) -> dict[str, str]:
    facts = {key: str(run_info.get(key, "")) for key in ("hardware", "date", "foveate", "items")}
    return {**facts, "date": facts["date"][:10]}


_INTRO = """# Combined recipes

Methods of different stages can do together what neither does alone. These recipes have names, and
stand wherever a recipe can: `foveate.reduce(model, "NAME", retain=0.1)`,
`foveate bench --recipes NAME`. They were found by a search over {trials} pairs on the validation
split of the world and confirmed on {items} questions of its test split with the embedded model;
what they are worth on another model is for you to measure: `foveate bench --model ...`.

At one budget a method that acts early costs less than one that acts late, so accuracy at equal
`retain` would be no fair comparison. A combined recipe is held against the best of its parts **at
equal FLOPs** (whole call, vision encoder included), each part with either way to number positions,
between its measured budgets by linear interpolation. A part that cannot be made as cheap counts
with what it has at its cheapest. [`fast`](#fast), for who may lose one percent of the accuracy,
came out of a search of its own.

{hardware}, foveate {foveate}, {date}.

```console
$ python scripts/search_recipes.py search RUN
$ python scripts/search_recipes.py confirm RUN
$ python scripts/search_recipes.py page RUN
```"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("search", "confirm", "page"))
    parser.add_argument("run", type=Path, help="folder of the measurements")
    options = parser.parse_args()
    if options.what == "page":
        write_text(PAGE, page(options.run))
    else:
        {"search": search, "confirm": confirm}[options.what](options.run)


if __name__ == "__main__":
    main()
