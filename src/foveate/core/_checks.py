"""Checks of indices, masks and anchors, shared by the constructors of `Reduction`.

Values are looked at on the CPU only: reading them back from an accelerator would stall it. What the
checks make of their input (dtypes, padding set to -1) is the same on every device.

Legend: B batch, K any number of indices, N source tokens, M target tokens.
"""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor, what: str) -> torch.Tensor:
    """[K] or [B, K] as [B, K]."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{what} must be a tensor [K] or [B, K], got {type(x).__name__}.")
    if x.dim() == 1:
        return x[None]
    if x.dim() != 2:
        raise ValueError(f"{what} must be [K] or [B, K], got shape {tuple(x.shape)}.")
    return x


def as_index(x: torch.Tensor, what: str) -> torch.Tensor:
    """[K] or [B, K] of any integer type as int64 [B, K]."""
    x = as_rows(x, what)
    if x.dtype == torch.bool:
        raise ValueError(
            f"{what} must hold integers, got a bool mask of shape {tuple(x.shape)}; "
            "turn a keep mask of one sample into indices with keep_N.nonzero()[:, 0]."
        )
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"{what} must hold integers, got {x.dtype}.")
    return x.long()


def check_range(index: torch.Tensor, size: int, what: str) -> None:
    """Indices lie in -1 .. size - 1."""
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= size:
            allowed = f"0..{size - 1} (or -1)" if size else "-1 alone, there are no tokens"
            raise ValueError(f"{what} must lie in {allowed}, found {low}..{high}.")


def check_shape(x: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    """`x` has exactly this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{what} have shape {tuple(x.shape)}, expected {shape}.")


def as_mask(mask_BM: torch.Tensor | None, shape: tuple[int, int], what: str) -> torch.Tensor | None:
    """[M] or [B, M] as bool [B, M]; None stays None."""
    if mask_BM is None:
        return None
    mask_BM = as_rows(mask_BM, f"{what}: mask")
    check_shape(mask_BM, shape, f"{what}: masks")
    return mask_BM.bool()


def existing(index_BM: torch.Tensor, what: str) -> torch.Tensor | None:
    """Which targets of a ragged batch exist: those whose index is not -1; None when all do.

    A single sample needs no padding, so -1 is refused there. On accelerators a mask that is all
    True may come back: telling that apart from None would mean to wait for the device.
    """
    exists_BM = index_BM >= 0
    if index_BM.device.type != "cpu":
        return None if index_BM.shape[0] == 1 else exists_BM
    if bool(exists_BM.all()):
        return None
    if index_BM.shape[0] == 1:
        missing = (~exists_BM[0]).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{what} {missing[:5]} of {index_BM.shape[1]} has no source token, and a single sample "
            "is not padded: leave such targets out, or pass mask_BM to say that they are padding."
        )
    return exists_BM


def as_anchors(
    anchor_BM: torch.Tensor,
    shape: tuple[int, int],
    num_in: int,
    mask_BM: torch.Tensor | None,
    what: str,
) -> torch.Tensor:
    """Anchors int64 [B, M] in -1 .. N - 1, -1 in padding."""
    anchor_BM = as_index(anchor_BM, f"{what}: anchor")
    check_shape(anchor_BM, shape, f"{what}: anchors")
    if mask_BM is not None:
        anchor_BM = anchor_BM.where(mask_BM, -1)
    check_range(anchor_BM, num_in, f"{what}: anchor")
    return anchor_BM
