"""Write the documentation pages that come from code: methods, packages and the command.

mkdocs loads this file as a hook (`hooks:` in mkdocs.yml), so the pages are made on every build and
never stored. From the shell, `python scripts/gen_method_pages.py holitom` prints one page and
`python scripts/gen_method_pages.py --readme` renews the table in README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import sys
from pathlib import Path
from typing import Any, get_type_hints

import foveate
from foveate.core import STAGES, Card, Method, get_method, list_methods

ROOT = Path(__file__).parents[1]
# Modules that are documented although their package does not export their names.
MODULES = {
    "foveate.core": ("foveate.core.flops", "foveate.core.dims"),
    "foveate.models": ("foveate.models.adapter", "foveate.models.tower", "foveate.models.dims"),
    "foveate.world": (
        "foveate.world.tokenizer",
        "foveate.world.export",
        "foveate.world.overview",
        "foveate.world.baselines",
    ),
}


def _cell(text: object) -> str:
    # Inside backticks a bar does not end the cell, and a backslash would be shown.
    parts = str(text).replace("\n", " ").split("`")
    return "`".join(p if i % 2 else p.replace("|", "\\|") for i, p in enumerate(parts))


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
    hints, meanings = get_type_hints(method), _meanings(method)
    rows: list[list[object]] = [
        [f"`{f.name}`", f"`{_type(hints[f.name])}`", f"`{_default(f)}`", meanings.get(f.name, "")]
        for f in dataclasses.fields(method)
    ]
    return _table(["Parameter", "Type", "Default", "Meaning"], rows) if rows else "None."


def _meanings(method: type) -> dict[str, str]:
    """Field -> what the class docstring says about it."""
    from griffe import Docstring

    sections = Docstring(inspect.getdoc(method) or "").parse(
        "google", warn_unknown_params=False, warn_missing_types=False
    )
    return {
        item.name: item.description
        for section in sections
        if section.kind.value == "parameters"
        for item in section.value
    }


def _type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    return f"{field.default:.4g}" if isinstance(field.default, float) else repr(field.default)


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
    options = {
        "heading_level": 3,
        "members": "false",
        "show_docstring_parameters": "false",  # they are in the table above
        "show_root_heading": "true",
    }
    lines = [
        reference,
        "    options:",
        *(f"      {key}: {value}" for key, value in options.items()),
    ]
    parts += ["## Reference", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def method_table(linked: bool = True) -> str:
    """Markdown table of the registered methods against the stages that any of them acts at.

    `linked` titles lead to the pages; otherwise a last column leads to the papers.
    """
    cards = [get_method(name).card for name in list_methods()]
    stages = [stage for stage in STAGES if any(stage in card.stages for card in cards)]
    rows: list[list[object]] = []
    for card in cards:
        marks = ["x" if stage in card.stages else "" for stage in stages]
        row = [card.title, f"`{card.name}`", *marks, card.kind]
        if linked:
            row[0] = f"[{card.title}]({card.name}.md)"
        else:
            row.append(f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else "")
        rows.append(row)
    return _table(["Method", "Name", *stages, "Kind", *([] if linked else ["Paper"])], rows)


def readme_with_table(readme: str) -> str:
    """README.md with the text between its `methods` marks replaced by the table."""
    start, end = "<!-- methods:start -->", "<!-- methods:end -->"
    head, _, rest = readme.partition(start)
    tail = rest.partition(end)[2]
    return f"{head}{start}\n{method_table(linked=False)}\n{end}{tail}"


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


def api_index() -> str:
    """Markdown page with the names that `foveate` itself exports."""
    rows: list[list[object]] = []
    for name in foveate.__all__:
        value = getattr(foveate, name)
        if name.startswith("_"):
            continue
        first_line = (inspect.getdoc(value) or "").partition("\n")[0]
        rows.append([f"[`{name}`][{value.__module__}.{value.__qualname__}]", first_line])
    return (
        "# API\n\nMost programs need nothing but these:\n\n"
        f"{_table(['Name', 'Is'], rows)}\n\n"
        "They are resolved at first use, so `import foveate` loads neither torch nor transformers. "
        "The packages below hold the rest. What is documented there is stable within a minor "
        "version; names with a leading underscore are not.\n"
    )


def api_page(package: str) -> str:
    """Markdown page with the reference of one package: its exports, then modules worth naming."""
    parts = [f"# {package}", f"::: {package}"]
    for module in MODULES.get(package, ()):
        parts += [f"## {module}", f"::: {module}\n    options:\n      heading_level: 3"]
    return "\n\n".join(parts) + "\n"


def api_packages() -> list[str]:
    """Public packages and modules directly below `foveate`, methods left to their own pages."""
    source = ROOT / "src" / "foveate"
    modules = {path.stem for path in source.glob("*.py")}
    modules |= {path.parent.name for path in source.glob("*/__init__.py")}
    return sorted(
        f"foveate.{name}"
        for name in modules
        if not name.startswith("_") and name not in ("methods", "cli")
    )


def cli_page() -> str:
    """Markdown page with the help texts of the command."""
    import typer

    from foveate.cli.app import app, run

    names = list(typer.main.get_group(app).commands)
    parts = [
        "# Command line",
        '`pip install "foveate[video,cli]"` brings the command. Every option below is also '
        "printed by `--help`; `--json` prints one document for machines. Exit codes: 0 fine, 2 bad "
        "input, 130 interrupted.",
    ]
    for arguments in [[], *([name] for name in names)]:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            run([*arguments, "--help"])
        parts.append(f"## foveate {' '.join(arguments)}\n\n```text\n{text.getvalue().strip()}\n```")
    return "\n\n".join(parts) + "\n"


def generated_pages() -> dict[str, str]:
    """Every generated page: path below docs/ -> Markdown."""
    pages = {"methods/index.md": methods_index(), "api/index.md": api_index()}
    pages["cli.md"] = cli_page()
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
    if sys.argv[1:] == ["--readme"]:
        readme = ROOT / "README.md"
        readme.write_text(readme_with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for requested in sys.argv[1:] or list_methods():
            print(method_page(requested))
