"""Schedules of shares over layers."""

from __future__ import annotations

import pytest

from foveate.ops import earlier_layers, mean_share, share_schedule


def test_mean_share() -> None:
    assert mean_share((), (), 3) == 1.0
    assert mean_share((1,), (0.0,), 4) == 0.25
    assert mean_share((0, 2), (0.5, 0.25), 4) == 0.375


@pytest.mark.parametrize(
    ("layers", "shares"), [((1, 2), (0.5,)), ((2, 1), (0.5, 0.2)), ((5,), (0.5,))]
)
def test_mean_share_of_bad_schedules(layers: tuple, shares: tuple) -> None:
    with pytest.raises(ValueError, match="one share per layer"):
        mean_share(layers, shares, 4)


def test_earlier_layers_never_meet_nor_move_back() -> None:
    for layers in ((7, 9, 12), (8, 16, 24), (3, 4, 5), (1, 2, 3)):
        assert earlier_layers(layers, layers[0]) == layers
        for first in range(1, layers[0]):
            moved = earlier_layers(layers, first)
            assert moved[0] == first and list(moved) == sorted(set(moved))
            assert all(a <= b for a, b in zip(moved, layers, strict=True))
    for first in (0, 8):
        with pytest.raises(ValueError, match="cannot move"):
            earlier_layers((7, 9, 12), first)


def test_the_target_is_met_from_all_to_the_least() -> None:
    previous = 0.0
    for step in range(101):
        layers, shares = share_schedule(step / 100, (4, 8), 16, lambda x: (x, x * x), 0.5)
        share = mean_share(layers, shares, 16)
        assert share == pytest.approx(max(step / 100, 1 / 16), abs=1e-6) and share >= previous
        previous = share
