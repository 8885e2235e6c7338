"""Write docs/compatibility.md from what a run of the behaviour suite recorded.

    pytest tests/attach --record-matrix matrix.jsonl
    python scripts/compatibility.py matrix.jsonl

Nothing in the tables is written by hand: rows, columns, marks and notes are lines of that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core import METHODS, STAGES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"

WORKS, PART, NOTHING, REFUSED, FAILED, NOT_ASKED = "●", "◐", "○", "✕", "**✗**", ""

#: Thirty methods by twenty columns fit a page when cells are as wide as their marks.
NARROW = """<style>
.md-typeset table:not([class]) th, .md-typeset table:not([class]) td {
  min-width: 0; padding: .3em .45em; white-space: nowrap; }
</style>"""


@dataclass(frozen=True)
class Run:
    """What one run recorded.

    Attributes:
        head: versions, hardware, date and command.
        tests: finished behaviour tests.
        end: how many tests of all passed, failed and were skipped, and how long it took.
    """

    head: dict[str, Any]
    tests: list[dict[str, Any]]
    end: dict[str, Any]

    @classmethod
    def read(cls, *files: Path) -> Run:
        """Read what `pytest --record-matrix` wrote.

        Args:
            files: records of one or several runs; where two hold the same test, the later counts.

        Raises:
            ValueError: a file is not of a run, or of one that was stopped.
        """
        heads, tests, ends = [], {}, []
        for file in files:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            kinds = [line.get("kind") for line in lines]
            if kinds[:1] != ["run"] or kinds[-1:] != ["end"]:
                raise ValueError(f"{file} is not the record of a whole run; make it anew.")
            heads.append(lines[0])
            ends.append(lines[-1])
            tests |= {_key(line): line for line in lines if line["kind"] == "test"}
        commands = "\n".join(head["command"] for head in heads)
        end = {key: sum(end[key] for end in ends) for key in ("passed", "failed", "seconds")}
        return cls({**heads[-1], "command": commands}, list(tests.values()), end)

    def of(self, **wanted: str) -> list[dict[str, Any]]:
        """Tests with these values."""
        return [test for test in self.tests if all(test[k] == v for k, v in wanted.items())]

    def names(self, key: str) -> list[str]:
        """All values of a key, in alphabetical order."""
        return sorted({test[key] for test in self.tests})

    @property
    def properties(self) -> list[str]:
        """What was tested, in the order of the source."""
        places = {test["property"]: tuple(test["place"]) for test in reversed(self.tests)}
        return sorted(places, key=places.__getitem__)


def _key(test: dict[str, Any]) -> tuple[str, ...]:
    """What names a test in every run."""
    named = (test["property"], test["method"], test["family"])
    return (*named, json.dumps(test["variant"], sort_keys=True))


class Notes:
    """Numbered notes of one table; equal texts share a number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, symbol: str, text: str) -> str:
        """The symbol with the number of its note."""
        if text not in self.texts:
            self.texts.append(text)
        return f"{symbol}<sup>{self.texts.index(text) + 1}</sup>"

    def __str__(self) -> str:
        return "\n".join(f"{n}. {text}" for n, text in enumerate(self.texts, 1))


def family_mark(tests: list[dict[str, Any]], stages: set[str], notes: Notes) -> str:
    """What a method that acts at these stages does on a family, all properties together."""
    if failed := [test["property"] for test in tests if test["outcome"] != "passed"]:
        return notes.mark(FAILED, f"Fails: {'; '.join(sorted(set(failed)))}.")
    acted = next((test["acted"] for test in tests if "acted" in test), None)
    if acted is None:
        refusals = [test["refused"] for test in tests if "refused" in test]
        return notes.mark(REFUSED, refusals[0]) if refusals else NOT_ASKED
    if not any(acted.values()):
        why = "sees the frames of a video as images" if "video" in acted else "takes no videos"
        return notes.mark(NOTHING, f"Changes nothing: it acts on videos alone; this model {why}.")
    if all(set(found) == stages for found in acted.values()):
        return WORKS
    first, *others = acted.values()
    if all(set(found) == set(first) for found in others):
        return notes.mark(PART, f"Acts at {_stages(first)} only.")
    parts = [f"{modality}s at {_stages(found)}" for modality, found in acted.items() if found]
    return notes.mark(PART, f"Acts on {', on '.join(parts)}{' only' if len(parts) == 1 else ''}.")


def _stages(stages: Iterable[str]) -> str:
    named = [stage for stage in STAGES if stage in stages]
    return " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)


def property_mark(tests: list[dict[str, Any]], notes: Notes) -> str:
    """Whether a property holds for a method, all families together."""
    if not tests:
        return NOT_ASKED
    families = {test["family"] for test in tests}
    if failed := {test["family"] for test in tests if test["outcome"] != "passed"}:
        text = f"Fails on {', '.join(sorted(failed))}; holds on {len(families - failed)} families."
        return notes.mark(FAILED, text)
    # Families that the method leaves alone are the other table's affair.
    here = [test for test in tests if "acted" not in test or any(test["acted"].values())]
    refused = [test for test in here if "refused" in test and "acted" not in test]
    if here and len(refused) == len(here):
        return notes.mark(REFUSED, refused[0]["refused"])
    return WORKS if here else NOTHING


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " :-: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _method(name: str) -> str:
    return f"[`{name}`](methods/{name}.md)"


def families_table(run: Run) -> str:
    """One row per method, one column per family, and the notes."""
    notes, families = Notes(), run.names("family")
    rows = []
    for method in run.names("method"):
        tests = run.of(method=method)
        acted = [found for test in tests for found in test.get("acted", {}).values()]
        stages = {stage for found in acted for stage in found}
        marks = [family_mark(run.of(method=method, family=f), stages, notes) for f in families]
        rows.append([_method(method), *marks, str(len(tests))])
    header = ["Method", *(family.replace("_", "<br>") for family in families), "Tests"]
    return f"{_table(header, rows)}\n\n{notes}".rstrip()


def properties_table(run: Run) -> str:
    """The list of properties, one row per method, one column per property, and the notes."""
    notes, listed, rows = Notes(), [], []
    for name in run.properties:
        tests = run.of(property=name)
        families = len({test["family"] for test in tests})
        listed.append(f"1. {name} (tests: {len(tests)}, families: {families})")
    for method in run.names("method"):
        marks = [property_mark(run.of(method=method, property=p), notes) for p in run.properties]
        rows.append([_method(method), *marks])
    header = ["Method", *(str(n) for n, _ in enumerate(run.properties, 1))]
    return "\n".join(listed) + f"\n\n{_table(header, rows)}\n\n{notes}".rstrip()


def page(run: Run) -> str:
    """The page, in Markdown."""
    head = run.head
    failed = sum(test["outcome"] != "passed" for test in run.tests)
    methods, families = run.names("method"), run.names("family")
    return f"""---
hide:
  - toc
---

{NARROW}

# Compatibility

What the shared behaviour suite found for {len(methods)} methods on {len(families)} model families:
{len(run.tests):,} tests, {failed or "none"} failed. Nothing here is written by hand; the page is
made from the record of a run. {elsewhere(methods)}

```bash
{head["command"]}
python scripts/compatibility.py matrix.jsonl
```

{head["date"]}, foveate {head["foveate"]}, transformers {head["transformers"]}, torch
{head["torch"]}, Python {head["python"]}, {head["hardware"]}.

The models are tiny ones with random weights, of the architectures that transformers has: four
layers, prompts of unequal length, images and videos mixed, a row without any. So the page says that
the mechanics are right: the same numbers as a reference, for every way of calling a model. How well
a method chooses is another question, see the [leaderboard](leaderboard.md).

## Methods on model families

| Mark | Meaning |
| :-: | --- |
| {WORKS} | acts on everything the family takes, and every property below that applies holds |
| {PART} | the same, but it acts on a part of what the family takes; see the note |
| {NOTHING} | changes nothing on this family, and the note says why |
| {REFUSED} | refused with an error before anything runs; the note is the error |
| {FAILED} | a property fails; the note says which |

{families_table(run)}

## Properties of methods

Each column is a property; {WORKS} says that it holds on every family on which the method acts, and
an empty cell that the method cannot have it, such as a budget where nothing is removed. Attention
is sdpa unless said otherwise.

{properties_table(run)}
"""


def elsewhere(methods: Iterable[str]) -> str:
    """A sentence on registered methods that no run has recorded; empty when there are none."""
    others = [f"[`{name}`](methods/{name}.md)" for name in sorted(set(METHODS) - set(methods))]
    if not others:
        return ""
    return (
        f"Methods for [backbones of their own](backbones.md) are not in the tables: "
        f"{', '.join(others)}."
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the page of a record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "records", nargs="+", type=Path, help="what pytest --record-matrix wrote; later ones count"
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    given = parser.parse_args(arguments)
    try:
        run = Run.read(*given.records)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    given.out.write_text(page(run), encoding="utf-8")
    print(f"wrote {given.out}: {len(run.tests)} tests")


if __name__ == "__main__":
    main()
