"""What holds for every test: no model hub, no network, few threads, reproducible examples."""

from __future__ import annotations

import os
import random
import socket

# Before anything imports transformers or torch: both read the environment once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers of pytest-xdist share the cores; torch in each of them would otherwise claim all. Set in
# the workers alone: they would inherit the number that suits their parent.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from matrix_record import (  # noqa: F401  # hooks of --record-matrix
    pytest_addoption,
    pytest_configure,
    pytest_runtest_setup,
)

# Derandomised: the suite gives the same verdict on every machine and every run. Deadlines would
# make tests depend on the machine's speed.
settings.register_profile(
    "foveate",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("foveate")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Start every test from the same state of the generators, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # what a test draws without a generator of its own
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines, so that no test can come to need one."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        is_local = self.family == getattr(socket, "AF_UNIX", None) or (
            isinstance(address, tuple) and address[0] in {"127.0.0.1", "::1", "localhost"}
        )
        if not is_local:
            raise RuntimeError(f"a test tried to connect to {address!r}; tests use no network")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)
