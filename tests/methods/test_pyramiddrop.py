"""PyramidDrop: schedules, ranking and counts."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Tokens
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.ops import mean_share

from .helpers import decoder_context, view_of


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def context_of(row_S: torch.Tensor, layer: int, budget: Budget | None = None, **more):
    """A context in which the last token would attend to the tokens as in `row_S`."""
    view = view_of(row_S, torch.arange(2, len(row_S) - 3))
    budget = budget or Budget(retain=PyramidDrop.card.retain)
    return decoder_context(
        view, layer, budget, **{"num_layers": 32, "attention_ahead": lambda: view, **more}
    )


def lengths_of(method: PyramidDrop, num: int, retain: float = 0.46875) -> list[int]:
    layers, shares = method.schedule(retain, 32)
    lengths = [num] * 32
    for layer, share in zip(layers, shares, strict=True):
        lengths[layer:] = [int(num * share)] * (32 - layer)
    return lengths


def test_published_counts_and_flops() -> None:
    """LLaVA-1.5-7B, 576 visual tokens: 4nd^2 + 2n^2d + 3ndm a layer, 3.82 TFLOPs untouched."""
    lengths = lengths_of(PyramidDrop(), 576)
    assert [lengths[i] for i in (7, 8, 15, 16, 23, 24, 31)] == [576, 288, 288, 144, 144, 72, 72]
    d, m = 4096, 11008
    cost = sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in lengths) / 1e12
    assert round(cost, 2) == 1.78


@pytest.mark.parametrize("num_layers", [2, 4, 24, 28, 32, 80])
@pytest.mark.parametrize("retain", [0.95, 0.6, 0.46875, 0.4, 0.3, 0.2, 0.1, 0.05])
def test_the_budget_is_the_mean_share(num_layers: int, retain: float) -> None:
    layers, shares = PyramidDrop().schedule(retain, num_layers)
    least = 1 / num_layers
    assert mean_share(layers, shares, num_layers) == pytest.approx(max(retain, least), abs=1e-6)
    assert list(shares) == sorted(shares, reverse=True)
    assert set(layers) <= set(PyramidDrop().decoder_layers(num_layers))


def test_every_stage_keeps_the_same_share() -> None:
    for retain in (0.7, 0.46875, 0.1):
        _, (one, two, three) = PyramidDrop().schedule(retain, 32)
        assert two == pytest.approx(one**2, abs=1e-6) and three == pytest.approx(one**3, abs=1e-6)


def test_share_by_hand() -> None:
    method = PyramidDrop(parts=3, keep=0.25)
    for retain in (0.1, 0.9):
        assert method.schedule(retain, 30) == ((10, 20), (0.25, 0.0625))
    assert method.decoder_layers(30) == (10, 20)


@pytest.mark.parametrize(("layer", "kept"), [(8, 20), (16, 10), (24, 5)])
def test_the_most_attended_stay_in_order(layer: int, kept: int) -> None:
    row_S = normal(45).abs()
    reduction = PyramidDrop().decoder(Tokens(normal(1, 40, 4)), context_of(row_S, layer))
    assert reduction is not None
    best = row_S[2:42].argsort(descending=True)[:kept].sort().values
    assert reduction.anchor_BM[0].tolist() == best.tolist()


def test_counts_refer_to_the_tokens_that_entered() -> None:
    row_S = normal(25).abs()
    context = context_of(row_S, 16, num_visual=41)
    reduction = PyramidDrop().decoder(Tokens(normal(1, 20, 4)), context)
    assert reduction is not None and reduction.num_out == 10  # a quarter of 41
    few = context_of(row_S, 16, Budget(retain=0.04), num_visual=41)
    assert PyramidDrop().decoder(Tokens(normal(1, 20, 4)), few) is None  # it cuts at 1, 2 and 3
    few = context_of(row_S, 3, Budget(retain=0.01), num_visual=41)
    reduction = PyramidDrop().decoder(Tokens(normal(1, 20, 4)), few)
    assert reduction is not None and reduction.num_out == 1
    absolute = context_of(row_S, 16, Budget(tokens=30), num_visual=40)
    share = PyramidDrop().schedule(0.75, 32)[1][1]
    reduction = PyramidDrop().decoder(Tokens(normal(1, 20, 4)), absolute)
    assert reduction is None and int(40 * share) > 20  # so many are not left


def test_nothing_to_do() -> None:
    row_S = normal(25).abs()
    tokens = Tokens(normal(1, 20, 4))
    assert PyramidDrop().decoder(tokens, context_of(row_S, 9)) is None
    assert PyramidDrop().decoder(tokens, context_of(row_S, 8, Budget(retain=1.0))) is None
    assert PyramidDrop().decoder_layers(1) == () and PyramidDrop().schedule(0.5, 1) == ((), ())


@pytest.mark.parametrize("arguments", [{"parts": 1}, {"keep": 0.0}, {"keep": 1.0}])
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PyramidDrop(**arguments)
