"""Write docs/leaderboard.md and its picture from a finished run of `foveate bench`.

foveate bench --recipes all --retain 0.05,0.1,0.2,0.5 --out report
python scripts/leaderboard.py report

Every figure on the page is computed from the run folder; explanations are read from
docs/leaderboard-notes.toml (method -> Markdown).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from foveate._wording import plural
from foveate.bench import BenchResult, Interval, read_result
from foveate.bench import report_text as text
from foveate.bench.cells import Cell
from foveate.bench.plan import BASELINES
from foveate.bench.report import model_name
from foveate.bench.report_markdown import accuracy_figure, by_task, cell_text, shown_name, table
from foveate.bench.report_plots import picture
from foveate.bench.report_tables import nearest, ratio
from foveate.bench.results import Standing
from foveate.bench.store import UNTOUCHED
from foveate.core import BackboneMethod, get_method, list_methods
from foveate.core._files import write_text

DOCS = Path(__file__).parents[1] / "docs"
#: Budgets whose tasks are shown, where the run has them.
TASKS_AT = (0.1, 0.2)
FLOOR = "random"


def leaderboard(result: BenchResult, notes: dict[str, str]) -> str:
    """The page as Markdown.

    Raises:
        ValueError: the run is not finished, or lacks the untouched model or `random`.
    """
    if result.missing:
        name, at = result.missing[0]
        raise ValueError(
            f"{plural(len(result.missing), 'planned cell')} without a result yet, for example "
            f"{name} at {at:g}: finish the run with the same command."
        )
    if result.untouched is None or FLOOR not in result.recipes:
        raise ValueError(f"the run must hold the untouched model and {FLOOR}.")
    parts = [
        "# Leaderboard",
        _intro(result),
        "![Accuracy against the fraction of visual tokens kept, one line per method]"
        "(assets/leaderboard.svg)",
        "## Accuracy",
        _accuracy(result),
        "## Ranking at each budget",
        _rankings(result),
        "## Costs",
        _costs(result),
        "## By task",
        *(by_task(result, at) for at in _shown(result)),
        f"## Below `{FLOOR}`",
        _below(result, notes),
        *_failures(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def unexplained(result: BenchResult, notes: dict[str, str]) -> list[str]:
    """Methods below `random` at some budget without a note."""
    return [name for name in result.methods if _deficits(result, name) and name not in notes]


# -- what was run ---------------------------------------------------------------------------------


def _intro(result: BenchResult) -> str:
    run = result.run
    plain = result.untouched
    assert plain is not None and plain.accuracy is not None
    about = f" about {plural(run['clips'], 'clip')}" if run.get("clips") else ""
    asked = f"{plural(run['items'], 'question')}{about} in {plural(len(result.tasks), 'task')}"
    made = ", ".join(f"{k} {v}" for k, v in (run.get("suite_args") or {}).items() if v is not None)
    versions = ", ".join(f"{k} {run[k]}" for k in ("foveate", "torch", "transformers") if k in run)
    facts = (
        ("model", f"{model_name(result)} ({run['model_id']})"),
        ("suite", f"{run['suite']} ({made})" if made else run["suite"]),
        ("frames of a clip", str(run.get("frames", text.DASH))),
        ("hardware", f"{run['hardware']}, {run['device']} {run['dtype']}"),
        ("versions", versions),
        ("date", run["date"][:10]),
    )
    return (
        f"Every method on the same model and the same {asked}. The untouched model answers "
        f"{plain.accuracy} of them. What the figures mean and how the intervals are "
        "made: [Accuracy against budget](bench.md). These are measurements of this project on one "
        "model and one suite; papers' own claims are on the [method pages](methods/index.md).\n\n"
        f"{_absent(result)}Every method runs as it was published, and most were "
        "published with positions numbered anew. That alone costs this model the sense of time; "
        "what the same methods do with their tokens' own positions is on [a page of its own]"
        "(leaderboard-positions.md).\n\n"
        + "\n".join(f"- {name}: {cell_text(said)}" for name, said in facts)
        + f"\n\n```bash\n{portable(run['command'])}\n"
        f"python scripts/leaderboard.py {result.folder.name}\n```"
    )


def _absent(result: BenchResult) -> str:
    """Which registered methods the run lacks, and why."""
    names = [name for name in list_methods() if name not in result.recipes]
    idle = [name for name in names if not get_method(name).reducing_stages()]
    parts = {
        "remove nothing": idle,
        "have backbones of their own": [
            name for name in names if issubclass(get_method(name), BackboneMethod)
        ],
        "needs policies in its prompt": [name for name in names if name == "safewatch"],
        "needs trained heads": [name for name in names if name == "dtop"],
    }
    told = [
        f"{', '.join(f'`{n}`' for n in found)} ({why})" for why, found in parts.items() if found
    ]
    rest = [name for name in names if not any(name in found for found in parts.values())]
    told += [", ".join(f"`{name}`" for name in rest)] if rest else []
    return f"Not here: {'; '.join(told)}. " if told else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def portable(command: str) -> str:
    """A command without the folders of the machine that it ran on."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command)]
    return shlex.join(words)


# -- tables ---------------------------------------------------------------------------------------


def _accuracy(result: BenchResult) -> str:
    best = {b: result.standings(b)[0].accuracy for b in result.budgets if result.standings(b)}
    rows = [[UNTOUCHED, *[accuracy_figure(result.untouched, None)] * len(result.budgets)]]
    for name in result.recipes:
        figures = [accuracy_figure(result.cell(name, b), best.get(b)) for b in result.budgets]
        rows.append([_linked(name), *figures])
    return (
        "In %, ± half the 95 % interval, by fraction of visual tokens kept; the best on average "
        "first, the best of each column bold, baselines in italics.\n\n"
        + table(["method", *map(text.budget, result.budgets)], rows)
    )


def _rankings(result: BenchResult) -> str:
    parts = [
        "Differences are paired, question by question, in points with their 95 % interval; those "
        "in brackets may be chance. The best baseline is the best of "
        f"{', '.join(f'`{name}`' for name in BASELINES)} at the same budget."
    ]
    for budget in result.budgets:
        rows = [
            [str(place), _linked(row.cell.recipe), *_ranked(row)]
            for place, row in enumerate(result.standings(budget), 1)
        ]
        heads = ["#", "method", "accuracy", "to untouched", "to the best baseline"]
        opened = " open" if budget == nearest(result.budgets, 0.1) else ""
        summary = f"<summary>{text.budget(budget)} of the visual tokens kept</summary>"
        body = f'<details markdown="1"{opened}>\n{summary}\n\n{table(heads, rows)}\n\n</details>'
        parts.append(body)
    return "\n\n".join(parts)


def _ranked(row: Standing) -> list[str]:
    return [row.accuracy.in_points(), _gap(row.cell.difference), _gap(row.to_baseline)]


def _gap(gap: Interval | None) -> str:
    if gap is None:
        return ""
    said = gap.in_points("+").replace("-", text.MINUS)
    return said if gap.excludes_zero else f"({said})"


def _costs(result: BenchResult) -> str:
    plain = result.untouched
    assert plain is not None
    rows = [[UNTOUCHED, *[_cost(plain)] * len(result.budgets)]]
    for name in result.recipes:
        rows.append([_linked(name), *(_cost(result.cell(name, b)) for b in result.budgets)])
    first = text.duration(plain.first_token)
    return (
        "Visual tokens in a layer of the language model (mean over its layers), FLOPs of the whole "
        "call in % of the untouched model's, and time to the first token as a multiple of the "
        f"untouched model's ({first}), measured in the same minutes. On a model this small "
        "fixed costs dominate the time. Methods of the cache stage shorten what is decoded "
        "from, not the prompt.\n\n" + table(["method", *map(text.budget, result.budgets)], rows)
    )


def _cost(cell: Cell | None) -> str:
    if cell is None:
        return text.DASH
    share = (
        text.DASH if cell.flops_fraction is None else f"{text.percent(cell.flops_fraction, 0)} %"
    )
    return f"{text.tokens(cell.visual_per_layer)} · {share} · {ratio(cell)}"


def _shown(result: BenchResult) -> list[float]:
    found = [b for b in (nearest(result.budgets, wanted) for wanted in TASKS_AT) if b is not None]
    return list(dict.fromkeys(found))


# -- what loses -----------------------------------------------------------------------------------


def _below(result: BenchResult, notes: dict[str, str]) -> str:
    low = [name for name in result.methods if _deficits(result, name)]
    low.sort(key=lambda name: not any(gap.excludes_zero for *_, gap in _deficits(result, name)))
    parts = [
        f"A method that answers fewer questions than dropping tokens by lot is a bug until it is "
        f"explained. {_counted(len(low), len(result.methods))}"
    ]
    for name in low:
        told = notes.get(name, "").strip() or "*Not explained yet.*"
        parts.append(f"### {cell_text(name)}\n\n{_evidence(result, name)}\n\n{told}")
    others = [name for name in result.recipes if name in notes and name not in low]
    if others:
        parts.append("## Notes")
        parts += [f"### {cell_text(name)}\n\n{notes[name].strip()}" for name in others]
    return "\n\n".join(parts)


def _counted(low: int, all_: int) -> str:
    if not low:
        return f"None of the {plural(all_, 'method')} does, at any budget."
    return f"Of {plural(all_, 'method')}, {low} {'does' if low == 1 else 'do'} at some budget."


def _deficits(result: BenchResult, name: str) -> list[tuple[Cell, Cell, Interval]]:
    """Where a method answers less than `random`: (its cell, random's cell, paired difference)."""
    found = []
    for cell in result.of(name):
        floor = result.cell(FLOOR, cell.retain)
        gap = cell.against(floor) if floor is not None else None
        if floor is not None and gap is not None and gap.value < 0:
            found.append((cell, floor, gap))
    return found


def _evidence(result: BenchResult, name: str) -> str:
    """Where a method is below `random`, by how much, and on which tasks."""
    found = _deficits(result, name)
    sure = "" if any(gap.excludes_zero for *_, gap in found) else " No gap excludes chance."
    where = "; ".join(f"{text.budget(c.retain)} kept: {_gap(gap)}" for c, _, gap in found)
    cell, floor, _ = min(found, key=lambda row: row[2].value)
    gaps = {task: cell.against(floor, task) for task in result.tasks}
    known = {task: gap for task, gap in gaps.items() if gap is not None}
    lost = sorted((gap.value, task) for task, gap in known.items() if gap.high < 0)
    won = sorted((-gap.value, task) for task, gap in known.items() if gap.low > 0)
    chosen = f"At {text.budget(cell.retain)}, "
    if lost:
        chosen += f"it loses to `{FLOOR}` on {_listed([task for _, task in lost], known)}"
    else:
        value, task = min((gap.value, task) for task, gap in known.items())
        chosen += (
            f"no single task is lost for certain; the largest gap is {_listed([task], known)}"
            if value < 0
            else "no task is lost"
        )
    more = f", and wins on {_listed([task for _, task in won], known)}" if won else ""
    return f"Difference to `{FLOOR}` in points: {where}.{sure} {chosen}{more}."


def _listed(tasks: Sequence[str], gaps: dict[str, Interval]) -> str:
    return ", ".join(f"{task} {_gap(gaps[task])}" for task in tasks)


def _failures(result: BenchResult) -> list[str]:
    rows = [
        [shown_name(name), ", ".join(map(text.budget, where)), cell_text(why)]
        for name, where, why in result.failures
    ]
    if not rows:
        return []
    return [
        "## Could not run",
        table(["method", "budgets", "reason"], rows).replace("--: ", ":-- "),
    ]


# -- helpers --------------------------------------------------------------------------------------


def _linked(name: str) -> str:
    """A registered method as a link to its page, another recipe as code."""
    from foveate.core import list_methods

    shown = shown_name(name)
    return f"[{shown}](methods/{name}.md)" if name in list_methods() else shown


def read_notes(path: Path) -> dict[str, str]:
    """Method -> Markdown.

    Raises:
        ValueError: the file is not TOML, or an entry is not text.
    """
    if not path.is_file():
        return {}
    try:
        notes = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error
    wrong = [name for name, value in notes.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} must be text.")
    return notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and the picture; gives the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/leaderboard.md from a run.")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the documentation")
    chosen = parser.parse_args(arguments)
    try:
        notes = read_notes(chosen.docs / "leaderboard-notes.toml")
        result = read_result(chosen.run)
        page = leaderboard(result, notes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (chosen.docs / "assets").mkdir(parents=True, exist_ok=True)
    write_text(chosen.docs / "leaderboard.md", page)
    write_text(chosen.docs / "assets" / "leaderboard.svg", picture(result))
    for name in unexplained(result, notes):
        print(f"warning: {name} is below {FLOOR} and not explained yet", file=sys.stderr)
    for name in notes.keys() - set(result.recipes):
        print(f"warning: there is a note on {name}, which is not in the run", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
