"""What every registered method owes its readers: a source, a page, a row, and code that agrees."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from foveate.core import Method, get_method, list_methods
from foveate.core.registry import _BUILTIN

ROOT = Path(__file__).parents[2]
BUILTIN = sorted(_BUILTIN)


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("scripts/gen_method_pages.py", monkeypatch)


def test_registry_lists_the_methods_of_the_package() -> None:
    files = {path.stem for path in (ROOT / "src/foveate/methods").glob("*.py")}
    named = {target.split(":")[0].rpartition(".")[2] for target in _BUILTIN.values()}
    assert named == {name for name in files if not name.startswith("_")}
    assert set(BUILTIN) <= set(list_methods())


def test_shared_suite_has_a_row_for_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    table = load("tests/attach/method_table.py", monkeypatch).METHOD_TABLE
    assert sorted(table) == BUILTIN
    for name, row in table.items():
        assert set(row.stages) == set(get_method(name).stages()), name


@pytest.mark.parametrize("name", BUILTIN)
def test_card_names_its_source(name: str) -> None:
    card = get_method(name).card
    assert card.name == name
    assert card.title and card.paper
    assert card.summary.endswith("."), "the summary is a sentence"
    if card.kind == "baseline":
        return
    assert re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
    assert 2000 + int(card.arxiv[:2]) <= card.year + 1
    assert card.headline, "a published system has published figures"
    assert card.defaults, "and published settings"


@pytest.mark.parametrize("name", BUILTIN)
def test_card_and_class_agree_on_the_stages(name: str) -> None:
    method = get_method(name)
    assert issubclass(method, Method)
    assert set(method.card.stages) == set(method.stages())


@pytest.mark.parametrize("name", BUILTIN)
def test_method_is_a_frozen_dataclass_that_explains_every_field(name: str) -> None:
    method = get_method(name)
    fields = [field.name for field in dataclasses.fields(method)]
    docstring = inspect.getdoc(method) or ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        method().card = None  # type: ignore[misc]
    for field in fields:
        assert re.search(rf"^\s+{field}\b.*:", docstring, re.MULTILINE), f"{field} is undocumented"


@pytest.mark.parametrize("name", BUILTIN)
def test_page_shows_card_and_fields(name: str, pages: ModuleType) -> None:
    method = get_method(name)
    page = pages.method_page(name)
    assert method.card.summary in page
    assert f"::: {method.__module__}.{method.__qualname__}" in page
    for field in dataclasses.fields(method):
        assert f"| `{field.name}` |" in page
    for figure in method.card.headline:
        assert figure in page
    assert f"methods/{name}.md" in pages.generated_pages()


def test_readme_table_is_up_to_date(pages: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == pages.readme_with_table(readme), (
        "run: python scripts/gen_method_pages.py --readme"
    )
