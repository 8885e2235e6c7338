"""Frames resampled to token counts of their own, put together as one reduction of a video.

Legend: T frames, f frames of one count, L = H W patches of a frame, n tokens it gets (h rows of w),
D channels, N tokens of the item, M tokens out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch

from foveate import ops
from foveate.core import Grid, NewlinePolicy, Reduction, Tokens

Version = Literal["v1", "v2", "v3", "v4", "v5"]


def frame_shape(num: int, height: int, width: int, version: Version = "v1") -> tuple[int, int]:
    """Rows and columns of a frame of `num` tokens, at most that many cells.

    The shape of the frame with floored sides, then one row more or else one column if that fits;
    "v3" and "v4" have no rows: one of `num` tokens.

    Example:
        >>> frame_shape(20, 14, 14), frame_shape(15, 14, 14), frame_shape(20, 14, 14, "v3")
        ((5, 4), (4, 3), (1, 20))
    """
    if version in ("v3", "v4"):
        return 1, num
    h = max(1, math.isqrt(num * height // width))
    w = max(1, min(math.isqrt(num * width // height), num // h))
    h = min(h, num // w)
    if (h + 1) * w <= num:
        return h + 1, w
    return (h, w + 1) if h * (w + 1) <= num else (h, w)


def matrices(
    x_fLD: torch.Tensor, shape: tuple[int, int], num: int, version: Version
) -> torch.Tensor:
    """How the tokens of frames of one count come of their patches, [f, M, L], or [1, M, L] for all.

    Args:
        x_fLD: the frames.
        shape: rows and columns of a frame before.
        num: tokens that each gets.
        version: "v1" bilinear, "v2" adaptive average, "v3" evenly spaced patches, "v4" repeated
            bipartite matching, "v5" the same along rows and then along columns.
    """
    H, W = shape
    h, w = frame_shape(num, H, W, version)
    device = x_fLD.device
    if version in ("v1", "v2"):
        along = ops.bilinear_matrix if version == "v1" else ops.average_matrix
        return torch.kron(along(H, h, device), along(W, w, device))[None]
    if version == "v3":
        place_n = torch.linspace(0, H * W - 1, num, dtype=torch.float64, device="cpu").long()
        return torch.eye(H * W, device=device)[place_n.to(device)][None]
    if version == "v4":
        return matched_down(x_fLD, num).matrix()
    return _by_axes(x_fLD.unflatten(1, (H, W)), h, w)


def matched_down(x_BND: torch.Tensor, num: int) -> Reduction:
    """Bipartite matching, at most half of the tokens per round, until `num` are left.

    Sizes start at 1 in every round; unmerged tokens come before destinations. O(N^2 D).

    Example:
        >>> matched_down(torch.ones(1, 2, 3), 1).matrix().tolist()
        [[[0.5, 0.5]]]
    """
    reduction = Reduction.identity(x_BND.shape[1], len(x_BND), x_BND.device)
    while x_BND.shape[1] > num:
        matching = ops.bipartite_matching(x_BND, x_BND.shape[1] - num)
        merged = Reduction.merge(
            matching.assignment_BN, matching.num_kept, anchor_BM=matching.kept_BM
        )
        x_BND, reduction = merged.apply(x_BND), reduction.then(merged)
    return reduction


def _by_axes(x_fHWD: torch.Tensor, h: int, w: int) -> torch.Tensor:
    f, H, W, D = x_fHWD.shape
    rows = matched_down(x_fHWD.flatten(0, 1), w)
    x_fwHD = rows.apply(x_fHWD.flatten(0, 1)).view(f, H, w, D).transpose(1, 2).flatten(0, 1)
    columns_fwhH = matched_down(x_fwHD, h).matrix().view(f, w, h, H)
    rows_fHwW = rows.matrix().view(f, H, w, W)
    return torch.einsum("fwhH,fHwW->fhwHW", columns_fwhH, rows_fHwW).reshape(f, h * w, H * W)


def resample_frames(
    tokens: Tokens,
    x_TLD: torch.Tensor,
    grid: Grid,
    count_T: Sequence[int],
    version: Version = "v1",
    newlines: NewlinePolicy = "row",
) -> Reduction:
    """Every frame resampled to `count_T[t]` tokens (0 drops it), in the order of time.

    Frames of one count form a batch. Where rows end in newlines, every new row gets the newline of
    the row at its middle under "row" and "keep"; newlines at the end stay except under "remove";
    [CLS] tokens go. O(M L + M D).

    Args:
        tokens: the item's tokens, [1, N, D].
        x_TLD: its patches by frame.
        grid: its layout, of frames of one size.
        count_T: tokens per frame.
        version: as in `matrices`.
        newlines: policy.
    """
    T, H, W = grid.shape
    device = tokens.device
    patch_TL = grid.patch_index(device).view(T, -1)
    with_rows = grid.planes[0].row_newline and newlines in ("row", "keep")
    shape_T = [frame_shape(n, H, W, version) if n else (0, 0) for n in count_T]
    size_T = [h * (w + with_rows) for h, w in shape_T]
    first_T = torch.tensor([0, *size_T], device="cpu").cumsum(0)
    batches: dict[int, list[int]] = defaultdict(list)
    for frame, n in enumerate(count_T):
        if n:
            batches[n].append(frame)
    entries: list[tuple[torch.Tensor, ...]] = []
    for n, frames in batches.items():
        h, w = shape_T[frames[0]]
        first_f = first_T[frames].to(device)
        matrix_fML = matrices(x_TLD[frames], (H, W), n, version).expand(len(frames), -1, -1)
        f, m, patch = matrix_fML.nonzero(as_tuple=True)
        row = first_f[f] + m + (m // w if with_rows else 0)
        entries.append((row, patch_TL[frames][f, patch], matrix_fML[f, m, patch]))
        if with_rows:
            row_h = torch.arange(h, device=device)
            end_f1 = patch_TL[frames][:, :1]
            source_fh = end_f1 + (2 * row_h + 1) * H // (2 * h) * (W + 1) + W
            target_fh = first_f[:, None] + (row_h + 1) * (w + 1) - 1
            ones = torch.ones(source_fh.numel(), device=device)
            entries.append((target_fh.flatten(), source_fh.flatten(), ones))
    num_end = 0 if newlines == "remove" else grid.newlines_at_end
    end_E = torch.arange(num_end, device=device)
    last = grid.num_tokens - num_end
    entries.append((int(first_T[-1]) + end_E, last + end_E, torch.ones(num_end, device=device)))
    row, column, weight = (torch.cat(part) for part in zip(*entries, strict=True))
    index = torch.stack([torch.zeros_like(row), row, column])
    size = (1, int(first_T[-1]) + num_end, grid.num_tokens)
    matrix = torch.sparse_coo_tensor(index, weight.float(), size, check_invariants=False)
    return Reduction.transform(matrix.coalesce())
