"""Write docs/trained.md from the cards of trained tasks.

python scripts/trained_page.py [--card FOLDER ...]

--card copies card.json of finished trainings (`foveate train NAME --out FOLDER`) to docs/trained/
first. What is said about a task is in docs/trained/NAME.md, every figure on the page in
docs/trained/NAME.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from foveate._wording import plural
from foveate.cli.training_tasks import TASK_SUMMARIES
from foveate.core._files import write_text

DOCS = Path(__file__).parents[1] / "docs"
UNTOUCHED = "untouched"
INTRO = """# What methods keep of trained models

Cosines on features do not say whether a classification survives. `foveate train` trains small
models on generated data, in minutes of two CPU cores, and measures on held-out data what every
method keeps of them:

```bash
foveate train shapes --out shapes/ --threads 2
foveate train measure shapes/  # once more, without training
```

{commands}

A training that is interrupted goes on with `--resume`, to the same weights. From Python the trained
modules are at hand:

```python
from pathlib import Path

from foveate.training import TaskTraining, load_task, make_task

TaskTraining(make_task("poses", "tiny"), Path("poses")).run()  # "small" is what the tables show
task, modules = load_task("poses")
print(sorted(modules))
```

The models are small and the data are generated: the rows say how methods compare with each other
and with doing nothing on one model, not what they reach on public benchmarks. A row with a bar says
what was asked of it, and whether that was reached; what was tried before is said with each task.
The weights do not ship with the package: the commands make them.
"""


def page(folder: Path) -> str:
    """The page, from the cards and texts in a folder."""
    found = [name for name in TASK_SUMMARIES if (folder / f"{name}.json").exists()]
    commands = "\n".join(f"- `foveate train {name}`: {TASK_SUMMARIES[name]}." for name in found)
    parts = [INTRO.format(commands=commands)]
    for name in found:
        card = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        text = folder / f"{name}.md"
        said = text.read_text(encoding="utf-8").strip() if text.exists() else ""
        parts.append(f"## {name.capitalize()}\n\n{said}\n\n{rows(card)}\n\n{facts(card)}\n")
    return "\n".join(parts)


def rows(card: dict[str, Any]) -> str:
    """The table of one task."""
    outcomes = card["outcomes"]
    base = {(row["on"], row["metric"]): row["value"] for row in reversed(outcomes) if is_base(row)}
    has = {
        key: any(row[key] not in (None, "") for row in outcomes) for key in ("on", "flops", "note")
    }
    names = ["on"] * has["on"] + ["recipe", "metric", "value", "difference"]
    names += ["FLOPs"] * has["flops"] + ["asked", "met"] + ["remarks"] * has["note"]
    lines = []
    for row in outcomes:
        reference = base.get((row["on"], row["metric"]))
        off = "" if reference is None or is_base(row) else f"{row['value'] - reference:+.2f}"
        flops = "" if row["flops"] is None else f"{100 * row['flops']:.1f} %"
        met = {None: "", True: "yes", False: "**no**"}[row["met"]]
        recipe = "*untouched*" if is_base(row) else named(row["recipe"])
        line = [row["on"]] * has["on"] + [recipe, row["metric"], f"{row['value']:.2f}", off]
        line += [flops] * has["flops"] + [row["bar"], met] + [row["note"]] * has["note"]
        lines.append(line)
    right = ("value", "difference", "FLOPs")
    aligned = ["--:" if name in right else ":--" for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, aligned, *lines])


def named(recipe: str) -> str:
    """A recipe as code, what else is said of it in words: "tempme, no training"."""
    end = recipe.rindex(")") + 1 if ")" in recipe else len(recipe.partition(",")[0])
    is_words = " " in recipe[:end].partition("(")[0]
    return recipe if is_words else f"`{recipe[:end]}`{recipe[end:]}"


def is_base(row: dict[str, Any]) -> bool:
    """Whether a row is the model without a method."""
    return row["recipe"] == UNTOUCHED


def facts(card: dict[str, Any]) -> str:
    """How the model came about, in a sentence or two."""
    sizes = " + ".join(f"{count:,} ({name})" for name, count in card["parameters"].items())
    stages = "; ".join(
        f"{name}: {plural(stage['steps'], 'step')}, {stage['samples']:,} samples, "
        f"{stage['seconds'] / 60:.0f} min"
        for name, stage in card["stages"].items()
    )
    return (
        f"Parameters: {sizes}. Stages: {stages}. {card['hardware']}, torch {card['torch']}, "
        f"{card['date']}; `foveate train {card['task']} --size {card['size']}`."
    )


def main() -> None:
    """Copy cards where asked, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", nargs="+", default=[], type=Path, metavar="FOLDER")
    for source in parser.parse_args().card:
        card = json.loads((source / "card.json").read_text(encoding="utf-8"))
        write_text(DOCS / "trained" / f"{card['task']}.json", json.dumps(card, indent=1) + "\n")
    write_text(DOCS / "trained.md", page(DOCS / "trained"))


if __name__ == "__main__":
    main()
