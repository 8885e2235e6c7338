"""Write the documentation pages that come from code: one per method, one per package.

mkdocs loads this file as a hook (`hooks:` in mkdocs.yml), so the pages are made on every build and
never stored. `python scripts/gen_method_pages.py holitom` prints one page.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from foveate.core import STAGES, Card, Method, get_method, list_methods

ROOT = Path(__file__).parents[1]


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(header: list[str], rows: list[list[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _bullets(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _source(card: Card) -> str:
    """The citation of a card: a link to the paper, or what the baseline does."""
    year = f" ({card.year})" if card.year else ""
    if not card.arxiv:
        return card.paper + year
    return f"[{card.paper}](https://arxiv.org/abs/{card.arxiv}), arXiv {card.arxiv}{year}"


def _official_code(card: Card) -> str:
    if not card.url:
        return "none"
    return f"<{card.url}>" + (f", {card.licence}" if card.licence else "")


def _parameters(method: type[Method]) -> str:
    rows = [
        [f"`{field.name}`", f"`{_type_name(field.type)}`", f"`{_default(field)}`"]
        for field in dataclasses.fields(method)
        if field.init and not field.name.startswith("_")
    ]
    return _table(["Parameter", "Type", "Default"], rows) if rows else "None."


def _type_name(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "object")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def method_page(name: str) -> str:
    """Markdown page of one registered method, written from its card and its fields."""
    method = get_method(name)
    card = method.card
    facts = [
        ["Source", _source(card)],
        ["Stages", ", ".join(card.stages)],
        ["Kind", card.kind],
        ["Official code", _official_code(card)],
        ["Default budget", f"`retain={card.retain:g}`"],
        ["Class", f"[`{method.__name__}`][{method.__module__}.{method.__qualname__}]"],
    ]
    parts = [
        f"# {card.title}",
        card.summary,
        _table(["`" + name + "`", ""], facts),
        "## Use",
        "```python\nimport foveate\n\n"
        f'with foveate.reduce(model, "{name}", retain={card.retain:g}) as run:\n'
        "    output = model.generate(**inputs)\nprint(run.report)\n```",
        "## Parameters",
        "Keyword arguments of `foveate.reduce` and fields of the class.",
        _parameters(method),
    ]
    if card.defaults:
        rows: list[list[object]] = [[f"`{key}`", value] for key, value in card.defaults.items()]
        parts += ["## Published settings", _table(["Setting", "Value"], rows)]
    if card.headline:
        parts += [
            "## Published results",
            "Figures of the source named above, not measured by this project.",
            _bullets(card.headline),
        ]
    if card.notes:
        parts += ["## Notes", _bullets(card.notes)]
    reference = f"::: {method.__module__}.{method.__qualname__}"
    options = "    options:\n      heading_level: 3\n      show_root_heading: true"
    parts += ["## Reference", f"{reference}\n{options}"]
    return "\n\n".join(parts) + "\n"


def method_table() -> str:
    """Markdown table of every registered method against the six stages."""
    rows = []
    for name in list_methods():
        card = get_method(name).card
        marks = ["yes" if stage in card.stages else "" for stage in STAGES]
        rows.append([f"[{card.title}]({name}.md)", f"`{name}`", *marks, card.kind])
    return _table(["Method", "Name", *STAGES, "Kind"], rows)


def methods_index() -> str:
    """Markdown page that lists the methods."""
    return (
        "# Methods\n\n"
        "One published system is one class in one file. Every page below is written from the "
        "card in that file, so it cannot disagree with the code.\n\n"
        f"{method_table()}\n\n"
        "`foveate list` prints the same table; `foveate list --stage decoder` filters it. A "
        "method of your own joins it without a change to foveate: see "
        "[Add a method](../add-a-method.md).\n"
    )


def api_page(package: str) -> str:
    """Markdown page with the reference of one package or module below `foveate`."""
    options = "    options:\n      show_submodules: true"
    return f"# {package}\n\n::: {package}\n{options}\n"


def api_packages() -> list[str]:
    """Public packages and modules directly below `foveate`, methods left to their own pages."""
    source = ROOT / "src" / "foveate"
    modules = {path.stem for path in source.glob("*.py")}
    modules |= {path.parent.name for path in source.glob("*/__init__.py")}
    return sorted(
        f"foveate.{name}" for name in modules if not name.startswith("_") and name != "methods"
    )


def generated_pages() -> dict[str, str]:
    """Every generated page: path below docs/ -> Markdown."""
    pages = {"methods/index.md": methods_index()}
    pages |= {f"methods/{name}.md": method_page(name) for name in list_methods()}
    pages |= {f"api/{package}.md": api_page(package) for package in api_packages()}
    return pages


def on_config(config: Any) -> Any:
    """Fill the navigation: mkdocs calls this before it looks for pages."""
    methods = [{get_method(n).card.title: f"methods/{n}.md"} for n in list_methods()]
    packages = [{package: f"api/{package}.md"} for package in api_packages()]
    for entry in config.nav:
        if entry.get("Methods") is not None:
            entry["Methods"] = [*entry["Methods"], *methods]
        if entry.get("API") is not None:
            entry["API"] = [*entry["API"], *packages]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the build."""
    from mkdocs.structure.files import File

    for path, content in generated_pages().items():
        files.append(File.generated(config, path, content=content))
    return files


if __name__ == "__main__":
    for requested in sys.argv[1:] or list_methods():
        print(method_page(requested))
