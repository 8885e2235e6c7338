"""Trainings that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import LEARNED, SHORT, training


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Matrices this small are slower on many threads, and sums then depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training that nothing interrupted."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("short") / "model"
    training(folder, SHORT).run()
    return folder


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple], dict[str, Any]]:
    """A training that got somewhere: its folder, what it told, and its card."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("learned") / "model"
    told: list[tuple] = []
    card = training(folder, LEARNED, clips=20, every=200).run(lambda *facts: told.append(facts))
    return folder, told, card
