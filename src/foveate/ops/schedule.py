"""Schedules that drop tokens step by step: which share is left in which layer.

Plain Python numbers, so that counts are known before any tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

#: Steps of the search for a schedule; halving 60 times leaves no more than rounding errors.
_STEPS = 60


def mean_share(layers: Sequence[int], shares: Sequence[float], num_layers: int) -> float:
    """Mean over all layers of the share of tokens left, `shares[i]` from layer `layers[i]` on.

    Args:
        layers: ascending indices of the layers before which tokens go.
        shares: fractions left after each of them; before the first, all.
        num_layers: layers there are.

    Raises:
        ValueError: layers and shares do not match, or the layers do not rise from 0 to below
            `num_layers`.

    Example:
        >>> mean_share((8, 16, 24), (0.5, 0.25, 0.125), 32)
        0.46875
    """
    bounds = [0, *layers, num_layers]
    if len(layers) != len(shares) or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"need one share per layer and rising layers below {num_layers}, got layers "
            f"{list(layers)} and shares {list(shares)}"
        )
    lengths = [b - a for a, b in pairwise(bounds)]
    return sum(n * s for n, s in zip(lengths, (1.0, *shares), strict=True)) / num_layers


def earlier_layers(layers: Sequence[int], first: int) -> tuple[int, ...]:
    """The same cuts moved towards the start, so that the first one comes before layer `first`.

    Distances shrink in proportion, rounded to the nearest layer; no two cuts coincide.

    Args:
        layers: ascending indices, at least 1.
        first: index of the first cut, from 1 to `layers[0]`.

    Raises:
        ValueError: `first` lies outside that range.

    Example:
        >>> earlier_layers((8, 16, 24), 3), earlier_layers((7, 9, 12), 2), earlier_layers((1, 2), 1)
        ((3, 6, 9), (2, 3, 4), (1, 2))
    """
    if not layers or not 1 <= first <= layers[0]:
        raise ValueError(f"the first of the layers {list(layers)} cannot move to {first}")
    moved: list[int] = []
    for layer in layers:
        least = moved[-1] + 1 if moved else first
        moved.append(min(layer, max(least, round(layer * first / layers[0]))))
    return tuple(moved)


def share_schedule(
    target: float,
    layers: Sequence[int],
    num_layers: int,
    shares_at: Callable[[float], Sequence[float]],
    lowest: float,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The schedule of a family whose mean share over all layers is `target`.

    The cuts stay where they are as long as the family's member `lowest` is not undercut; below,
    they move to the latest earlier layers where it is not. Where even a first cut before layer 1
    is too late, the shares go on falling, down to none.

    Args:
        target: mean share of tokens left over all layers, in [0, 1].
        layers: ascending indices of the layers before which tokens go, at least 1.
        num_layers: layers there are.
        shares_at: x in [0, 1] -> the share left after each cut; rises with x from none to all.
        lowest: smallest x for which the cuts stay.

    Returns:
        layers, and the share left after each; rounded to nine digits, so that whole numbers stay
        whole when a count is rounded down.

    Example:
        >>> pyramid = lambda x: (x, x * x, x**3)
        >>> share_schedule(0.46875, (8, 16, 24), 32, pyramid, 0.5)
        ((8, 16, 24), (0.5, 0.25, 0.125))
        >>> share_schedule(0.2, (8, 16, 24), 32, pyramid, 0.5)[0]
        (1, 2, 3)
    """
    chosen = tuple(layers)
    for first in range(layers[0], 0, -1):
        chosen = earlier_layers(layers, first)
        if mean_share(chosen, shares_at(lowest), num_layers) <= target:
            break
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if mean_share(chosen, shares_at(middle), num_layers) < target:
            low = middle
        else:
            high = middle
    return chosen, tuple(round(share, 9) for share in shares_at(high))
