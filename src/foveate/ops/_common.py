"""Checks and numeric helpers shared by the modules of `foveate.ops`.

Legend of shape suffixes: B batch, N tokens, D channels, `...` any leading axes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums and distances are computed in: float64 stays, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """Return `x` in at least float32, without a copy when it already is."""
    return x.to(compute_dtype(x.dtype))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off: it would silently round logits and distances to half precision."""
    # The meta device knows no autocast and would raise.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:
    """L2-normalise the last axis in at least float32; norms below `eps` count as `eps`."""
    x = widen(x)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)


def require_dims(x: Tensor, dims: int | tuple[int, ...], name: str, layout: str) -> None:
    """Raise `ValueError` unless `x` has one of the given numbers of axes."""
    allowed = (dims,) if isinstance(dims, int) else dims
    if x.dim() not in allowed:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")


def require_shape(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raise `ValueError` unless `x` has exactly this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def require_count(value: int, low: int, high: int, name: str, what: str) -> None:
    """Raise `ValueError` unless `low <= value <= high`; `what` says what the bound counts."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high} ({what}), got {value}")


def batched(x: Tensor, name: str) -> tuple[Tensor, bool]:
    """Return `x` as [B, N, D] and whether a batch axis was added."""
    require_dims(x, (2, 3), name, "[N, D] or [B, N, D]")
    return (x.unsqueeze(0), True) if x.dim() == 2 else (x, False)
