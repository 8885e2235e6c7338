"""Rotary frequencies for sequences longer than a language model was trained on."""

from __future__ import annotations

import torch


def ntk_base(base: float, scale: float, dim: int) -> float:
    """The rotary base that stretches the slowest pair of channels by `scale`: base * s^(d/(d-2)).

    Args:
        base: the model's own base.
        scale: s, at least 1.
        dim: d, rotated channels of a head, above 2.

    Raises:
        ValueError: a scale below 1 or too few channels.

    Example:
        >>> round(ntk_base(10000.0, 2.0, 128))
        20221

    Source: NTK-aware scaling as used by arXiv 2409.12963.
    """
    _check(scale, dim)
    return base * scale ** (dim / (dim - 2))


def ntk_frequencies(inv_freq: torch.Tensor, scale: float) -> torch.Tensor:
    """The frequencies that `ntk_base` gives, from those of the model's own base.

    Pair i of d / 2 is slowed down by s^(2 i / (d - 2)): the first not at all, the last by exactly
    s. That makes it apply to frequencies that were scaled before, too.

    Args:
        inv_freq: [d / 2], the fastest pair first.
        scale: s, at least 1.

    Raises:
        ValueError: a scale below 1 or too few channels.

    Example:
        >>> ntk_frequencies(torch.tensor([1.0, 0.1, 0.01]), 4.0).tolist()
        [1.0, 0.05000000074505806, 0.0024999999441206455]
    """
    pairs = inv_freq.shape[-1]
    _check(scale, 2 * pairs)
    depth = torch.arange(pairs, dtype=torch.float64, device=inv_freq.device) / (pairs - 1)
    return (inv_freq.double() / scale**depth).to(inv_freq.dtype)


def _check(scale: float, dim: int) -> None:
    if not scale >= 1 or dim <= 2:
        raise ValueError(
            f"Stretching takes a scale of at least 1 and more than 2 rotated channels, got "
            f"scale={scale}, {dim} channels."
        )
