"""The page and the table that `foveate bench` leaves in its folder.

Legend: nothing here is a tensor; accuracies, shares of tokens and of FLOPs are fractions.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from foveate._wording import plural, shorten
from foveate.bench import report_tables as tables
from foveate.bench import report_text as text
from foveate.bench.plan import BASELINES
from foveate.bench.report_curves import Style
from foveate.bench.report_markdown import render_markdown
from foveate.bench.report_plots import (
    flops_chart,
    legend,
    multiples,
    retained_chart,
    styles_of,
    stylesheet,
)
from foveate.bench.report_stages import stage_bars
from foveate.bench.results import BenchResult, read_result
from foveate.bench.store import UNTOUCHED
from foveate.core._files import write_text

# The browser itself refuses whatever is not in the file; there is no script to run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LEADS = {
    "retained": "Questions answered right while fewer visual tokens are kept, to the right. Point "
    "at a recipe to single it out; tick it to keep it lit in all charts and tables.",
    "flops": "The same answers over the FLOPs that were really spent. A recipe that prunes inside "
    "the decoder still pays for the encoder and the first layers; here each stands at its cost.",
    "tasks": "Percent right over percent of the tokens kept; all charts share their axes.",
    "ranking": "Dot and bar: accuracy and its interval; line and band: untouched; dashed: the "
    "best of the baselines. Differences are paired, question by question, in points; "
    "those in grey may be chance.",
    "losses": "Of the questions that the untouched model answers right, how many percent each "
    "recipe gets wrong.",
    "costs": "Means per question; the time to the first token is a median with its range. "
    "Overhead is the time inside the recipe's own modules and part of that time.",
    "stages": "Median per question, from a clip that is opened anew to the end of the answer: "
    "choosing frames (all that a scorer looks at included), decoding them, preprocessing and the "
    "vision tower, the language model up to its first token, and the rest.",
}
_HOW = (
    (
        "interval",
        "95 %, by resampling whole clips: questions about one clip are right or wrong together, "
        "so they count as one draw.",
    ),
    (
        "paired difference",
        "The same questions on both sides, which is far sharper than comparing two intervals by "
        "eye: recipes whose bars overlap can still differ for certain.",
    ),
    (
        "baselines",
        "random drops tokens by lot, uniform keeps every n-th, pool averages neighbours; "
        "even_frames takes fewer frames, where a recipe chooses them. A recipe below one of them "
        "at the same budget does not earn its effort on this suite. The best of them is chosen by "
        "the same answers, which favours it a little.",
    ),
    (
        "excludes 0",
        "The paired interval lies on one side of zero. Among many comparisons some do so by "
        "chance: one in twenty where nothing differs.",
    ),
    (
        "FLOPs",
        "Counted analytically over the whole call, from the tokens that each layer really saw.",
    ),
    (
        "first token",
        "Measured on the hardware named above. With few tokens fixed costs dominate, so that "
        "saved FLOPs need not show as saved time.",
    ),
    ("a dash", "Not measured, or not measurable here."),
)


def write_report(folder: Path) -> None:
    """Write report.html and table.md beside the results of a run, finished or not.

    Args:
        folder: where `foveate bench --out` wrote run.json, cells.jsonl and answers.jsonl.

    Raises:
        ValueError: there is no such folder, or it holds no run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "run.json").write_text('{"model": "tiny"}')
        ...     write_report(Path(folder))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['report.html', 'run.json', 'table.md']
    """
    folder = Path(folder)
    results = read_result(folder)
    write_text(folder / "report.html", render_report(results))
    write_text(folder / "table.md", render_markdown(results))


def markdown_table(folder: Path) -> str:
    """The accuracy tables of a run in GitHub's markdown, for the documentation.

    Raises:
        ValueError: there is no such folder, or it holds no run.
    """
    return render_markdown(read_result(Path(folder)))


def render_report(results: BenchResult) -> str:
    """The document of `write_report` as text: one file, no script, light and dark."""
    styles = styles_of(results)
    title = f"{model_name(results)}: accuracy against budget"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n<link rel="icon" href="data:,"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_css(styles, results)}</style>\n</head>\n"
        f'<body>\n<header class="page"><h1>{escape(title)}</h1>{_facts(results)}'
        f"{_banner(results)}{_cards(results)}</header>\n<main>{_body(results, styles)}"
        f"<footer>Written by foveate {escape(_version())}. This file needs no network and runs no "
        "script.</footer></main>\n</body>\n</html>\n"
    )


# -- head -----------------------------------------------------------------------------------------


def model_name(results: BenchResult) -> str:
    """A model's name; of a folder its last part, which is what people call it by."""
    name = str(results.run.get("model") or results.run.get("model_id") or "a model")
    return Path(name).name or name


def _facts(results: BenchResult) -> str:
    run = results.run
    given = run.get("suite_args")
    options = ""
    if isinstance(given, dict):
        options = ", ".join(
            f"{name} {_plain(value)}" for name, value in given.items() if value is not None
        )
    facts = (
        ("model", run.get("model") if run.get("model") != model_name(results) else None),
        ("of class", run.get("model_id") if run.get("model_id") != run.get("model") else None),
        ("suite", f"{run['suite']} ({options})" if options else run.get("suite")),
        ("questions", _asked(results)),
        ("frames", run.get("frames")),
        ("hardware", run.get("hardware")),
        ("on", " ".join(str(run[k]) for k in ("device", "dtype") if run.get(k)) or None),
        ("date", str(run.get("date") or "").replace("T", " ")[:16] or None),
        (
            "versions",
            ", ".join(f"{k} {run[k]}" for k in ("foveate", "torch", "transformers") if run.get(k)),
        ),
    )
    listed = "".join(
        f"<li>{name} <b>{escape(str(value))}</b></li>" for name, value in facts if value
    )
    command = run.get("command")
    shown = f"<pre>{escape(str(command))}</pre>" if command else ""
    return f'<ul class="facts">{listed}</ul>{shown}'


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _asked(results: BenchResult) -> str | None:
    run = results.run
    if not run.get("items"):
        return None
    about = f" about {plural(run['clips'], 'clip')}" if run.get("clips") else ""
    return f"{run['items']:,}{about} in {plural(len(results.tasks), 'task')}"


def _banner(results: BenchResult) -> str:
    notes = []
    if results.untouched is None:
        notes.append("The untouched model has no result yet: nothing is compared to it.")
    if results.missing:
        some = ", ".join(f"{name} at {text.budget(b)}" for name, b in results.missing[:4])
        more = len(results.missing) - 4
        notes.append(
            f"{plural(len(results.missing), 'cell')} without a result yet: {some}"
            f"{f' and {more} more' if more > 0 else ''}."
        )
    return f'<p class="banner">{escape(" ".join(notes))}</p>' if notes else ""


def _cards(results: BenchResult) -> str:
    cards = []
    if results.untouched is not None and results.untouched.accuracy:
        figure = results.untouched.accuracy
        cards.append(_card(UNTOUCHED, figure.value, escape(text.span(figure)), "", "first"))
    for budget in results.budgets:
        standings = [row for row in results.standings(budget) if row.cell.recipe not in BASELINES]
        if not standings or budget >= 1:
            continue
        best = standings[0]
        ahead = sum(row.to_baseline is not None and not row.below for row in standings)
        compared = any(row.best_baseline for row in standings)
        note = f"{ahead} of {len(standings)} not below any baseline" if compared else ""
        name = f"<b>{escape(shorten(best.cell.recipe, 44))}</b>"
        cards.append(_card(f"best at {text.budget(budget)}", best.accuracy.value, name, note))
    return f'<ul class="figures">{"".join(cards)}</ul>' if cards else ""


def _card(name: str, value: float, what: str, note: str, style: str = "one") -> str:
    return (
        f'<li class="{style}"><div class="name">{name}</div>'
        f'<div class="value">{text.percent(value)}<small> %</small></div>'
        f'<div class="note">{what}</div><div class="note">{note}</div></li>'
    )


# -- body -----------------------------------------------------------------------------------------


def _body(results: BenchResult, styles: dict[str, Style]) -> str:
    failed = _panel("Could not run", tables.failures(results))
    if not results.recipes:
        return _panel("Nothing to draw yet", "<p>No recipe has finished a cell.</p>") + failed
    curves = legend(results, styles) + _scroll(retained_chart(results, styles))
    panels = (
        ("Accuracy against tokens kept", curves, "retained"),
        ("Accuracy against compute", _scroll(flops_chart(results, styles)), "flops"),
        ("By task", multiples(results, styles), "tasks"),
        ("Ranking", tables.ranking(results, styles), "ranking"),
        ("What is lost", tables.losses(results, styles), "losses"),
        ("Costs", tables.costs(results, styles), "costs"),
        ("Time by stage", stage_bars(results, styles), "stages"),
    )
    how = "".join(f"<dt>{name}</dt><dd>{escape(said)}</dd>" for name, said in _HOW)
    return (
        "".join(_panel(name, body, _LEADS[key]) for name, body, key in panels)
        + failed
        + _panel("Left out", tables.left_out(results))
        + _panel("How to read this", f'<dl class="how">{how}</dl>')
    )


def _panel(name: str, body: str, lead: str = "") -> str:
    if not body:
        return ""
    told = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section class="panel"><h2>{escape(name)}</h2>{told}{body}</section>'


def _scroll(body: str) -> str:
    return f'<div class="scroll" tabindex="0">{body}</div>'


# -- style ----------------------------------------------------------------------------------------


def _css(styles: dict[str, Style], results: BenchResult) -> str:
    """The style sheet with one rule per recipe and budget for what is pointed at or ticked."""
    rules = [stylesheet("chart"), stylesheet("report")]
    rules += [
        f"input.t{number}:checked ~ .sheet.n{number} {{ display: block; }}"
        for number in range(len(results.budgets))
    ]
    rules.append(
        ".curves:has(.series:hover) .series:not(:hover), body:has(.legend label:hover) .series, "
        "body:has(.pick:checked) .series { opacity: .1; }\n"
        ".series:hover .stroke { stroke-width: 3.2; opacity: 1 !important; } "
        ".series:hover .whisker { opacity: .9; } .series:hover .dot { opacity: 1; }"
    )
    for style in styles.values():
        one = f"body:has(.key{style.number}:hover)", f"body:has(#pick{style.number}:checked)"
        mine = f".s{style.number}.series"
        for where in one:
            rules.append(
                f"{where} {mine} {{ opacity: 1 !important; }} {where} {mine} .stroke, "
                f"{where} {mine} .dot {{ opacity: 1; }} {where} {mine} .whisker {{ opacity: .8; }} "
                f"{where} tr.s{style.number} > * {{ background-color: var(--accent-soft); }}"
            )
    return "\n".join(rules)


def _version() -> str:
    from foveate import __version__

    return __version__
