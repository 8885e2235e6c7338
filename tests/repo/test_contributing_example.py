"""The worked example of CONTRIBUTING.md runs as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from foveate.core import Budget, Grid, ProjectorContext, Tokens, get_method, registry

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module made of the document's Python blocks, run in the order in which a reader does."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 3, "method, test, registration"
    module = ModuleType("outlier")
    # Dataclasses resolve annotations through sys.modules.
    monkeypatch.setitem(sys.modules, "outlier", module)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    for block in blocks:
        # The first block starts with the module's own __future__ import; none is inherited here.
        exec(compile(block, str(CONTRIBUTING), "exec", dont_inherit=True), module.__dict__)
    return module


def test_the_example_registers_and_counts(example: ModuleType) -> None:
    method = get_method("outlier")()
    assert method.card.stages == method.stages() == ("projector",)
    grid, budget = Grid.video(frames=3, height=4, width=5), Budget(retain=0.3)
    tokens = Tokens.from_grid(torch.randn(60, 8, generator=torch.manual_seed(0)), grid)
    reduction = method.projector(tokens, ProjectorContext(budget, grid=grid))
    assert reduction.num_out == method.count(grid, budget).tokens == 18
    kept = reduction.anchor_BM[0]
    assert bool((kept[1:] > kept[:-1]).all())


def test_the_example_keeps_everything_at_full_budget(example: ModuleType) -> None:
    grid = Grid.image(3, 3)
    tokens = Tokens.from_grid(torch.randn(9, 4, generator=torch.manual_seed(0)), grid)
    context = ProjectorContext(Budget(retain=1.0), grid=grid)
    assert get_method("outlier")().projector(tokens, context).is_identity


def test_the_example_refuses_a_bad_argument(example: ModuleType) -> None:
    with pytest.raises(ValueError, match='centre must be "mean" or "median"'):
        example.Outlier(centre="mode")


def test_the_example_is_formatted_like_the_code(example: ModuleType, tmp_path: Path) -> None:
    first = PYTHON_BLOCK.search(CONTRIBUTING.read_text())
    assert first
    path = tmp_path / "outlier.py"
    path.write_text(first[1])
    config = CONTRIBUTING.with_name("pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(config), str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
