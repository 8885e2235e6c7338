"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import foveate

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(foveate.__path__, "foveate.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(
    name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    if name == "foveate.checkpoints.loading":
        try:
            module.embedded_folder()
        except foveate.FoveateError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(str(tmp_path))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
