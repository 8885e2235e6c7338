"""The package as a whole: public names, examples, and what it may import."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

from foveate import ops

MODULES = [m.name for m in pkgutil.iter_modules(ops.__path__, "foveate.ops.")]


def test_public_names_exist_are_sorted_and_documented():
    assert sorted(ops.__all__) == ops.__all__
    for name in ops.__all__:
        assert getattr(ops, name).__doc__, name


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(recurse=False)
    missing = [n for n in ops.__all__ if not finder.find(getattr(ops, n), n)[0].examples]
    # A result record is documented by the function that returns it.
    assert missing == ["Segmentation"]


def test_operations_load_nothing_of_transformers():
    code = (
        "import sys, foveate.ops; sys.exit(any(m.startswith('transformers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
