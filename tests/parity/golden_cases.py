"""Reading stored numbers of official implementations.

A file holds cases as key prefixes ("a/feat", "b/feat", ...); its metadata field "args" holds the
arguments of each case as JSON. Set FOVEATE_GOLDENS to run the same tests on other files of the
same format; a file that is absent is skipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

FOLDER = Path(os.environ.get("FOVEATE_GOLDENS", Path(__file__).parents[1] / "goldens"))


@dataclass(frozen=True)
class Case:
    """One case: its tensors by name and its arguments."""

    name: str
    tensors: dict[str, torch.Tensor]
    args: dict[str, Any]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def numbered(self, prefix: str) -> list[tuple[int, torch.Tensor]]:
        """All tensors named `prefix<number>`, by number."""
        found = [
            (key[len(prefix) :], value)
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        ]
        return sorted((int(k), v) for k, v in found if k.isdigit())


def read(name: str) -> tuple[list[Case], dict[str, Any]]:
    """All cases of a file and the whole "args" document; nothing when the file is absent."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        return [], {}
    with safe_open(path, "pt") as file:
        document = json.loads((file.metadata() or {}).get("args", "{}"))
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 - not a dict
            case, _, field = key.partition("/")
            tensors.setdefault(case, {})[field] = file.get_tensor(key)
    return [Case(case, t, document.get(case, {})) for case, t in sorted(tensors.items())], document


def cases(name: str, *needed: str) -> pytest.MarkDecorator:
    """Parametrise a test over the cases of a file that hold all the `needed` tensors."""
    found = [case for case in read(name)[0] if all(key in case for key in needed)]
    if not found:
        missing = pytest.mark.skip(reason=f"no case for this test in {FOLDER / name}.safetensors")
        return pytest.mark.parametrize("case", [pytest.param(None, marks=missing, id="absent")])
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])
