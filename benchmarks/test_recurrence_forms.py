"""From how many numbers a step is a loop over the steps faster than chunks of them?

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_recurrence_forms.py --benchmark-enable \
        --benchmark-columns=median,iqr,rounds --benchmark-sort=name

`foveate.ops.linear_recurrence` and `selective_scan` choose by this table (`_LOOP_FROM` and
`_SCAN_FROM` in ops/_recurrence.py); each case is timed forwards and, with its gradients, back.
Without `--benchmark-enable` every case runs once and only its result is checked.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate import ops
from foveate.ops import _recurrence

# (B, E, S, L): a recurrence of B * E * S numbers over L steps, from one small channel group to the
# task `scan` and an image of Vim-Tiny.
CASES = {
    "128 x 65": (1, 16, 8, 65),
    "512 x 65": (1, 64, 8, 65),
    "512 x 1024": (1, 64, 8, 1024),
    "2048 x 197": (1, 128, 16, 197),
    "2048 x 1024": (1, 128, 16, 1024),
    "6144 x 197": (1, 384, 16, 197),
    "16384 x 65": (16, 128, 8, 65),
}
FORMS = {"loop": 0, "chunks": 1 << 60}


def inputs(B: int, E: int, S: int, L: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"u_BEL": (B, E, L), "delta_BEL": (B, E, L), "B_BSL": (B, S, L), "C_BSL": (B, S, L)}
    found = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    found["A_ES"] = -torch.arange(1.0, S + 1).repeat(E, 1)
    found["delta_bias_E"] = torch.full((E,), -3.0)
    return {name: x.requires_grad_() for name, x in found.items()}


@pytest.mark.parametrize("way", ["forwards", "and back"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_selective_scan(benchmark, monkeypatch, case: str, form: str, way: str) -> None:
    given = inputs(*CASES[case])
    expected = ops.selective_scan(**given)
    monkeypatch.setattr(_recurrence, "_SCAN_FROM", FORMS[form])

    def run() -> Tensor:
        if way == "forwards":
            with torch.no_grad():
                return ops.selective_scan(**given)
        y = ops.selective_scan(**given)
        torch.autograd.grad(y.sum(), list(given.values()))
        return y

    y = benchmark.pedantic(run, rounds=7, warmup_rounds=2)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_linear_recurrence(benchmark, monkeypatch, case: str, form: str) -> None:
    B, E, S, L = CASES[case]
    draw = torch.Generator().manual_seed(0)
    decay = torch.rand(L, B * E * S, generator=draw).requires_grad_()
    added = torch.randn(L, B * E * S, generator=draw).requires_grad_()
    expected = ops.linear_recurrence(decay, added)
    monkeypatch.setattr(_recurrence, "_LOOP_FROM", FORMS[form])

    def run() -> Tensor:
        state = ops.linear_recurrence(decay, added)
        torch.autograd.grad(state.sum(), (decay, added))
        return state

    state = benchmark.pedantic(run, rounds=7, warmup_rounds=2)
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
