"""Measure the systems for long video on long generated clips, and write docs/long-video-bench.md.

python scripts/long_videos_bench.py run FOLDER
python scripts/long_videos_bench.py page FOLDER

A run that was stopped goes on with the same command; --only and --recipes add to a folder. Every
figure on the page is computed from the run folders.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import foveate
from foveate._wording import plural
from foveate.bench import BenchResult, Item, LongWorldSuite, Suite, read_result, run_bench
from foveate.bench import report_text as text
from foveate.bench.cells import Cell
from foveate.bench.plan import split_recipes
from foveate.bench.report_markdown import (
    accuracy_figure,
    cell_text,
    shown_name,
    stage_figures,
    table,
    task_figures,
)
from foveate.bench.store import UNTOUCHED
from foveate.core._files import write_text
from foveate.core.timeline import TIMED_STAGES
from foveate.video import Clip

DOCS = Path(__file__).parents[1] / "docs"
#: Folder -> kind, minutes, clips.
RUNS = {
    "needle-1": ("needle", 1.0, 16),
    "needle-5": ("needle", 5.0, 10),
    "needle-20": ("needle", 20.0, 6),
    "dense": ("dense", 0.1, 16),
}
TITLES = {
    "needle-1": "A needle in 1 minute",
    "needle-5": "A needle in 5 minutes",
    "needle-20": "A needle in 20 minutes",
    "dense": "Half a second in 6, at 30 frames per second",
}
RECIPES = (
    "f2c",
    "f2c@frames",
    "quota",
    "kffocus",
    "grt",
    "videoscan",
    "quickvideo",
    "video_streaming",
    "b_vllm",
    "tdc",
    "qtsplus",
)
#: More for one run: where the default looks at too few frames for half a second of motion.
MORE = {"dense": ("f2c(fps=15, anchors=2)@frames",)}
#: In place of the default: 20 minutes are looked at every other second, as long as a needle lasts.
INSTEAD = {"needle-20": {"f2c": "f2c(fps=0.5)", "f2c@frames": "f2c(fps=0.5)@frames"}}
FRAMES = 64
BUDGETS = (0.25, 0.0625)
#: Whole frames, taken evenly, beside which every recipe is set by its tokens.
LADDER = (2, 4, 8, 16, 32)
EVEN = "even_frames"
#: How often the scorer shows a frame to the model; its default of 8 is four times as slow.
REPEAT = 2
#: Frames that the embedded model was trained on.
FULL = 16
LEARNED = """## What this says, and what it does not

The model has three million weights and was trained on 16 frames of clips like these, and it is
asked in their own words. So the figures compare ways to spend a budget; they promise nothing for
real video.

- **Finding is what counts.** Shown a needle in two frames of 16, the model answers nine
  questions of ten. Whole frames taken evenly miss it: of the tokens of four frames in a minute
  they make a guess, where F2C with the same tokens is right four times of five.
- **More frames are not more.** 64 frames are four times what the model was trained on, and
  untouched it answers at chance. Whatever brings the prompt back to a length that it knows
  helps, lots drawn at `random` included; part of every gain at 25 % is that. The rows at 6.25 %
  are the sharper test.
- **Choosing tokens finds what the frames show.** GRT's motion gate and QTSplus's attention to
  the question pick the needle out of 64 frames that lie a second apart, in one minute. Of 5
  minutes those frames show fewer than half of the needles and of 20 minutes one in nine; then
  only looking for it before frames are chosen helps, as densely as the needle is short.
- **The scorer is the model itself**, asked about stills: it is surer where a picture shows what
  the question names. In this world that thing occurs nowhere else, which is as easy as it gets.
- **Motion needs neighbours.** A burst of half a second is answered from 8 frames or more of it.
  QuoTA comes closest: it keeps all frames and gives those that fit the question most of the
  tokens. F2C spreads its clips over time, by design, and shows the burst in too few frames.
- **A codec's key frames know nothing of a needle** that comes and goes within a scene (KFFocus);
  QuickVideo's pruning begins behind prefill, so that it answers as the untouched model does.
- **Choosing costs most where a scorer looks.** F2C's stills are nearly all of its time, more the
  longer the clip; they are the price of what it finds. Where nothing is scored, the vision tower
  and decoding share the time, and in 20 minutes decoding is up to half of it. Times were taken
  while other programs were at work: read them as shares, not as speeds.
- **Few clips.** Six clips of 20 minutes leave wide intervals, and by the rule of the bench no
  difference is certain where fewer than six clips are answered differently."""


# -- running --------------------------------------------------------------------------------------


def measure(folder: Path, names: Sequence[str], recipes: Sequence[str] | None) -> None:
    """Run what is missing in these folders."""
    torch.set_num_threads(1)
    model, processor = foveate.embedded()
    scorer = foveate.AnsweringScorer(model, processor, repeat=REPEAT)
    for name in names:
        kind, minutes, clips = RUNS[name]
        own = [INSTEAD.get(name, {}).get(recipe, recipe) for recipe in RECIPES]
        own += MORE.get(name, ())
        plans = [((EVEN,), [count / FRAMES for count in LADDER], False)]
        plans += [(recipes or own, BUDGETS, True)]
        for chosen, budgets, baselines in plans:
            run_bench(
                chosen,
                budgets,
                LongWorldSuite(kind, clips, minutes=minutes),  # type: ignore[arg-type]
                out=folder / name,
                model=model,
                processor=processor,
                model_name="embedded",
                frames=FRAMES,
                repeats=1,
                scorer=scorer,
                baselines=baselines,
                on_cell=lambda line, name=name: print(name, _told(line), flush=True),
            )


def _told(line: Mapping[str, Any]) -> str:
    if line["error"]:
        return f"{line['recipe']} at {line['retain']:g}: {line['error']}"
    right = f"{line['correct']} of {line['items']}"
    return f"{line['recipe']} at {line['retain']:g}: {right} in {line['seconds']:.0f} s"


def measure_shown(folder: Path, clips: int = 60) -> None:
    """What the model answers about an event that some of 16 frames show, from decoded files."""
    model, processor = foveate.embedded()
    rows = []
    for kind, shares in (("needle", (16, 4, 2, 1)), ("dense", (16, 8, 4, 2))):
        for share in shares:
            suite = Suite(f"{kind}-{share}", list(_shown_items(kind, share, clips)))
            with tempfile.TemporaryDirectory() as run:
                result = run_bench(
                    "divprune",
                    1.0,
                    suite,
                    out=run,
                    model=model,
                    processor=processor,
                    repeats=0,
                    baselines=False,
                )
                assert result.untouched is not None
                rows.append([kind, share, result.untouched.figures["tasks"]])
            print(*rows[-1], flush=True)
    write_text(folder / "shown.json", json.dumps(rows) + "\n")


def _shown_items(kind: Any, share: int, clips: int) -> Iterator[Item]:
    """16 frames of a clip, so many of them evenly from an event and the others evenly from the
    rest."""
    suite = LongWorldSuite(kind, clips, minutes=0.5)
    seen: set[str] = set()
    for item in suite:
        if item.clip_id in seen:
            continue
        index = len(seen)
        seen.add(item.clip_id)
        clip = suite.world.sample(index)
        # Events in turn, so that every task is asked as often.
        event = clip.events[index % len(clip.events)]
        inside = np.linspace(event.first, event.last, share + 2).round().astype(int)[1:-1]
        if share == FULL:
            inside = np.linspace(event.first, event.last, FULL).round().astype(int)
        rest = np.setdiff1d(np.arange(clip.frames), np.arange(event.first, event.last + 1))
        outside = rest[np.linspace(0, len(rest) - 1, FULL - share).round().astype(int)]
        ranks = np.union1d(inside, outside).tolist()
        frames_THWC = Clip(item.video).take(ranks).pixels.permute(0, 2, 3, 1).numpy()
        asked = event.question
        answer = (asked.text, tuple(asked.options), asked.answer, asked.task)
        yield Item(item.clip_id, item.clip_id, frames_THWC, *answer)


# -- the page -------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """The page as Markdown.

    Raises:
        ValueError: a run is missing, or has no untouched model to compare with.
    """
    runs = {name: read_result(folder / name) for name in RUNS}
    for name, result in runs.items():
        if result.untouched is None or result.cell(EVEN, BUDGETS[0]) is None:
            raise ValueError(f"{name} lacks the untouched model or {EVEN}: run it again.")
    first = next(iter(runs.values()))
    shown = json.loads((folder / "shown.json").read_text(encoding="utf-8"))
    parts = ["# Long videos", _intro(first), LEARNED, _shown(shown)]
    for name, result in runs.items():
        parts += _section(name, result)
    return "\n\n".join(parts) + "\n"


def _intro(result: BenchResult) -> str:
    run = result.run
    return (
        "Systems for long video on long clips of [the generated world](world.md#long-clips), with "
        f"the [embedded model](embedded-model.md): {FRAMES} frames are asked for, and every recipe "
        f"keeps {' or '.join(map(text.budget, BUDGETS))} of their visual tokens, as many as "
        f"{' or '.join(str(round(FRAMES * b)) for b in BUDGETS)} whole frames have. Beside each "
        "stands uniform sampling with as many tokens: whole frames, taken evenly. How it is "
        "measured: "
        "[Accuracy against budget](bench.md#long-clips).\n\n"
        f"- hardware: {run['hardware']}, {run['device']} {run['dtype']}\n"
        f"- scorer: {run.get('scorer')}, {REPEAT} copies of a frame\n"
        f"- versions: foveate {run['foveate']}, torch {run['torch']}, transformers "
        f"{run['transformers']}\n"
        f"- date: {run['date'][:10]}; other programs were at work on the machine\n\n"
        "```bash\npython scripts/long_videos_bench.py run FOLDER\n"
        "python scripts/long_videos_bench.py page FOLDER\n```"
    )


def _shown(rows: Sequence[Sequence[Any]]) -> str:
    parts = [
        "## An event that the model is shown",
        "What is possible once the right frames are found: 16 frames, so many of them from the "
        "event, the others from all over the rest of a clip of half a minute; decoded from the "
        "file. Percent right.",
    ]
    for kind in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == kind]
        tasks = list(mine[0][2])
        lines = [
            [
                f"{share} of {FULL}",
                *(text.percent(counted[task][0] / counted[task][1], 0) for task in tasks),
            ]
            for _, share, counted in mine
        ]
        number = sum(asked for _, asked in mine[0][2].values())
        parts.append(table([f"frames with it, {kind} ({number} questions)", *tasks], lines))
    return "\n\n".join(parts)


def _section(name: str, result: BenchResult) -> list[str]:
    run = result.run
    told = f"{plural(run['items'], 'question')} about {plural(run['clips'], 'clip')}"
    failed = [
        f"`{cell_text(recipe)}` could not run: {cell_text(why)}"
        for recipe, _, why in result.failures
    ]
    return [
        f"## {TITLES[name]}",
        f"{told}. Percent right ± half the 95 % interval; tokens per layer of the language model, "
        "mean; the paired difference to uniform sampling with as many tokens, in points, in "
        "brackets where it may be chance. A dash: not measured.",
        _accuracy(result),
        *failed,
        f"By task, {text.budget(BUDGETS[0])} of the tokens:",
        _by_task(result),
        f"Time per question from the file to the answer, {text.budget(BUDGETS[0])} of the tokens; "
        "median over two clips that were opened anew:",
        _times(result),
    ]


def _accuracy(result: BenchResult) -> str:
    heads = ["recipe"]
    for budget in BUDGETS:
        heads += [f"{text.budget(budget)}: right", "tokens", "uniform", "difference"]
    rows = []
    for recipe in _recipes(result):
        row = [shown_name(recipe)]
        for budget in BUDGETS:
            row += _against_even(result, result.cell(recipe, budget))
        rows.append(row)
    plain = result.untouched
    assert plain is not None
    row = [f"{UNTOUCHED}, {FRAMES} frames", accuracy_figure(plain, None)]
    rows.append([*row, text.tokens(plain.visual_per_layer), *[""] * (len(heads) - 3)])
    return table(heads, rows)


def _recipes(result: BenchResult) -> list[str]:
    """Recipes but for uniform sampling itself, the best on average first."""
    return [name for name in result.recipes if name != EVEN]


def _against_even(result: BenchResult, cell: Cell | None) -> list[str]:
    """Accuracy, tokens, and what uniform sampling does with as many."""
    if cell is None or cell.visual_per_layer is None:
        return [text.DASH] * 4
    rivals = [*result.of(EVEN), *([result.untouched] if result.untouched else [])]
    mine = cell.visual_per_layer
    rival = min(rivals, key=lambda c: abs(math.log((c.visual_per_layer or 1) / mine)))
    frames = round(rival.retain * FRAMES)
    assert rival.accuracy is not None
    figures = [accuracy_figure(cell, None), text.tokens(mine)]
    gap = cell.against(rival)
    said = text.DASH if gap is None else gap.in_points("+", places=0)
    if gap is not None and not gap.excludes_zero:
        said = f"({said})"
    return [*figures, f"{text.percent(rival.accuracy.value)} ({frames} frames)", said]


def _by_task(result: BenchResult) -> str:
    rows = []
    for name in [*_recipes(result), EVEN]:
        cell = result.cell(name, BUDGETS[0])
        if cell is not None:
            rows.append([shown_name(name), *task_figures(result, cell)])
    return table(["recipe", *result.tasks], rows)


def _times(result: BenchResult) -> str:
    cells = [result.cell(name, BUDGETS[0]) for name in [*_recipes(result), EVEN]]
    rows = []
    for cell in [*cells, result.untouched]:
        if cell is not None and cell.stage_seconds:
            name = cell.recipe if cell.recipe == UNTOUCHED else shown_name(cell.recipe)
            rows.append([name, *stage_figures(cell)])
    return table(["recipe", "sum", *TIMED_STAGES], rows)


def main() -> None:
    """Run or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="runs between commas: " + ", ".join(RUNS))
    parser.add_argument("--recipes", help="instead of the systems of the page")
    args = parser.parse_args()
    if args.what == "page":
        write_text(DOCS / "long-video-bench.md", page(args.folder))
        return
    names = args.only.split(",") if args.only else list(RUNS)
    measure(args.folder, names, split_recipes(args.recipes) if args.recipes else None)
    if not (args.folder / "shown.json").is_file():
        measure_shown(args.folder)


if __name__ == "__main__":
    main()
