"""Sharing a token budget between parts (frames, segments, tiles) and layers.

Plain Python numbers, so that counts are known before any tensor exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def round_half_even(x: float | Fraction) -> int:
    """Round to the nearest integer, exact halves to the even one, as Python's `round`.

    Args:
        x: a finite number (0-d tensors count).

    Returns:
        An `int`.

    Raises:
        ValueError: not finite.

    Example:
        >>> round_half_even(2.5), round_half_even(3.5), round_half_even(0.098 * 576)
        (2, 4, 56)
    """
    value = x if isinstance(x, Fraction) else float(x)
    if not math.isfinite(value):
        raise ValueError(f"cannot round {x!r} to an integer")
    return round(value)


def split_evenly(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` integers that differ by at most one, larger ones first.

    Args:
        total: what to share, 0 or more.
        parts: 1 or more.

    Returns:
        `parts` integers that sum to `total`.

    Raises:
        ValueError: out of range.

    Example:
        >>> split_evenly(10, 4)
        [3, 3, 2, 2]
    """
    if total < 0 or parts < 1:
        raise ValueError(f"need total >= 0 and parts >= 1, got {total} and {parts}")
    base, extra = divmod(total, parts)
    return [base + 1] * extra + [base] * (parts - extra)


def proportional(
    total: int,
    weights: Sequence[float],
    *,
    minimum: int | Sequence[int] = 0,
    maximum: int | Sequence[int] | None = None,
) -> list[int]:
    """Share `total` in proportion to the weights, in integers that sum to it exactly.

    Parts that would leave their bounds are fixed there and the rest is shared anew; fractions go
    by largest remainder, ties to the first part. O(parts^2) at worst. If all weights are zero,
    they count as equal.

    Args:
        total: what to share, 0 or more.
        weights: one finite number >= 0 per part (a 1-D tensor or array counts).
        minimum: least per part, one number or one per part.
        maximum: most per part, likewise; None for no limit.

    Returns:
        One integer per part.

    Raises:
        ValueError: bad weights, or bounds that cannot meet the total.

    Example:
        >>> proportional(10, [1, 1, 2]), proportional(10, [1, 1, 8], maximum=5)
        ([3, 2, 5], [3, 2, 5])

    Source: Hamilton's method of largest remainders.
    """
    shares = [float(w) for w in weights]
    parts = len(shares)
    if parts == 0 or any(not math.isfinite(w) or w < 0 for w in shares):
        raise ValueError(f"weights must be finite numbers >= 0, at least one, got {shares}")
    low = _per_part(minimum, parts, "minimum")
    high = [total] * parts if maximum is None else _per_part(maximum, parts, "maximum")
    high = [min(h, total) for h in high]
    if any(a < 0 or a > b for a, b in zip(low, high, strict=True)) or not (
        sum(low) <= total <= sum(high)
    ):
        raise ValueError(
            f"cannot share {total} among {parts} parts with minimum {minimum} and maximum {maximum}"
        )
    if not any(shares):
        shares = [1.0] * parts
    exact = _bounded_shares(total, [Fraction(w) for w in shares], low, high)
    counts = [math.floor(share) for share in exact]
    # sorted() is stable, so equal remainders favour the first part.
    by_remainder = sorted(range(parts), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def linear_decay_schedule(num_layers: int, start: int, step: float) -> list[float]:
    """List the fraction kept after every layer: 1 before `start`, then falling by `step` to 0.

    Args:
        num_layers: layers of the model.
        start: first layer (0-based) after which tokens are dropped.
        step: fraction of the original tokens that each layer drops, 0 or more.

    Returns:
        `num_layers` fractions in [0, 1], never rising.

    Raises:
        ValueError: out of range.

    Example:
        >>> linear_decay_schedule(6, 2, 0.5)
        [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]

    Source: AIM, section 3.3 (arXiv 2412.03248): start 14, step 0.125 of 28 layers.
    """
    if num_layers < 0 or start < 0 or not step >= 0:
        raise ValueError(
            f"need num_layers, start and step >= 0, got {num_layers}, {start} and {step}"
        )
    kept = [1.0 - (layer - start + 1) * step for layer in range(num_layers)]
    return [1.0 if i < start else max(0.0, fraction) for i, fraction in enumerate(kept)]


def parse_r(num_layers: int, r: int | tuple[int, float] | list[int]) -> list[int]:
    """Spread ToMe's `r` (tokens merged per layer) over the layers.

    Args:
        num_layers: layers of the model.
        r: one number for all layers; a tuple (r, inflection) for a linear schedule with mean about
            r, from `r (1 - inflection)` to `r (1 + inflection)` (-1 falls, +1 rises); or a list,
            one number per layer, filled up with zeros.

    Returns:
        `num_layers` integers.

    Raises:
        ValueError: a list longer than the model, or a negative number.

    Example:
        >>> parse_r(4, 8), parse_r(4, (8, -1.0)), parse_r(4, [3])
        ([8, 8, 8, 8], [16, 10, 5, 0], [3, 0, 0, 0])

    Source: ToMe, section 4 (arXiv 2210.09461).
    """
    if isinstance(r, list):
        if len(r) > num_layers:
            raise ValueError(f"r lists {len(r)} layers but the model has {num_layers}")
        schedule = [int(value) for value in r] + [0] * (num_layers - len(r))
    else:
        mean, inflection = r if isinstance(r, tuple) else (r, 0.0)
        low = int(mean * (1 - inflection))
        rise = (2 * mean - 2 * low) / max(num_layers - 1, 1)
        schedule = [int(low + rise * layer) for layer in range(num_layers)]
    if any(value < 0 for value in schedule):
        raise ValueError(f"r must not be negative in any layer, got {schedule}")
    return schedule


def _per_part(value: int | Sequence[int], parts: int, name: str) -> list[int]:
    values = [value] * parts if isinstance(value, int) else [int(v) for v in value]
    if len(values) != parts:
        raise ValueError(f"{name} must be one number or {parts} numbers, got {len(values)}")
    return values


def _bounded_shares(
    total: int, weights: list[Fraction], low: list[int], high: list[int]
) -> list[Fraction]:
    """Shares proportional to the weights within bounds (as CSS resolves flexible lengths)."""
    free = set(range(len(weights)))
    shares = [Fraction(0)] * len(weights)
    left = Fraction(total)
    while free:
        mass = sum((weights[i] for i in free), Fraction(0))
        for i in free:
            # Parts without weight share what is left only when nobody else is there to take it.
            shares[i] = left * weights[i] / mass if mass else left / len(free)
        short = {i for i in free if shares[i] < low[i]}
        over = {i for i in free if shares[i] > high[i]}
        lacking = sum((low[i] - shares[i] for i in short), Fraction(0))
        excess = sum((shares[i] - high[i] for i in over), Fraction(0))
        if not short and not over:
            break
        fixed, bounds = (over, high) if excess >= lacking else (short, low)
        # On a draw both sides are settled: their sums cancel.
        if excess == lacking:
            for i in short:
                shares[i] = Fraction(low[i])
            left -= sum(low[i] for i in short)
            free -= short
        for i in fixed:
            shares[i] = Fraction(bounds[i])
        left -= sum(bounds[i] for i in fixed)
        free -= fixed
    return shares
