"""Frames of one video as one sequence: what becomes of a reduction, and which images are frames.

Legend: I images, f of them in a row, R = I / f rows, N source tokens of an image, M target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from foveate.core.grid import Grid
from foveate.core.reduction import Reduction


def join_rows(reduction: Reduction, num: int) -> Reduction:
    """A reduction of I samples as one of I / num: sources and targets side by side.

    The tokens of `num` consecutive samples follow each other, so whatever is indexed by the sources
    of a row comes apart with `x.view(I, N, ...)`. Padding stays where it is. O(I (N + M)); a matrix
    becomes block diagonal.

    Raises:
        ValueError: the samples do not divide by `num`.

    Example:
        >>> pick = Reduction.select(torch.tensor([[0, 2], [1, 2]]), num_in=3)
        >>> joined = join_rows(pick, 2)
        >>> joined, joined.anchor_BM.tolist()
        (Reduction(select, 1 x (6 -> 4)), [[0, 2, 4, 5]])
    """
    I, N, M = reduction.batch, reduction.num_in, reduction.num_out  # noqa: E741 - images
    if num < 1 or I % num:
        raise ValueError(f"{I} samples cannot be joined {num} by {num}.")
    if num == 1:
        return reduction
    R = I // num
    if reduction.kind == "transform" and reduction.matrix_BMN is None:  # a spread
        reduction = Reduction(
            "transform",
            N,
            reduction.anchor_BM,
            reduction.mask_BM,
            matrix_BMN=reduction.matrix(),
            conserve=reduction.conserve,
        )

    def beside(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.reshape(R, num * x.shape[1], *x.shape[2:])

    def moved(index_IX: torch.Tensor | None, step: int) -> torch.Tensor | None:
        if index_IX is None:
            return None
        first_f1 = step * torch.arange(num, device=index_IX.device)[:, None]
        index_RfX = index_IX.reshape(R, num, -1)
        return (index_RfX + first_f1).where(index_RfX >= 0, -1).flatten(1)

    anchor_RM = moved(reduction.anchor_BM, N)
    assert anchor_RM is not None
    return replace(
        reduction,
        num_in=num * N,
        anchor_BM=anchor_RM,
        mask_BM=beside(reduction.mask_BM),
        assignment_BN=moved(reduction.assignment_BN, M),
        weight_BN=beside(reduction.weight_BN),
        matrix_BMN=_diagonal(reduction.matrix_BMN, num),
        features_BMD=beside(reduction.features_BMD),
    )


def split_rows(reduction: Reduction, num: int) -> Reduction:
    """A reduction of joined rows as seen by each of their `num` images: [R, num N] -> [I, N].

    All M targets of the row stand in every image; those that none of its tokens went to have no
    provenance there. A source that feeds several targets goes to the one in which it weighs most.

    Example:
        >>> row = Reduction.merge(torch.tensor([[0, 1, 1, 2]]), 3)
        >>> split_rows(row, 2).groups_BN.tolist()
        [[0, 1], [1, 2]]
    """
    if num == 1:
        return reduction
    N, M = reduction.num_in // num, reduction.num_out
    group_IN = reduction.groups_BN.reshape(-1, N)
    first_f1 = N * torch.arange(num, device=group_IN.device)[:, None]
    anchor_RfM = reduction.anchor_BM[:, None] - first_f1
    own_RfM = (anchor_RfM >= 0) & (anchor_RfM < N) & (reduction.anchor_BM >= 0)[:, None]
    anchor_IM = anchor_RfM.where(own_RfM, -1).flatten(0, 1)
    return Reduction.merge(group_IN, M, anchor_BM=anchor_IM)


def _diagonal(matrix_IMN: torch.Tensor | None, num: int) -> torch.Tensor | None:
    """Matrices of `num` consecutive samples along the diagonal of one."""
    if matrix_IMN is None:
        return None
    I, M, N = matrix_IMN.shape  # noqa: E741 - images
    if matrix_IMN.is_sparse:
        matrix_IMN = matrix_IMN.coalesce()
        image_E, row_E, column_E = matrix_IMN.indices()
        place_E = image_E % num
        index_3E = torch.stack([image_E // num, row_E + place_E * M, column_E + place_E * N])
        shape = (I // num, num * M, num * N)
        values_E = matrix_IMN.values()
        return torch.sparse_coo_tensor(index_3E, values_E, shape, check_invariants=True).coalesce()
    own_ff = torch.eye(num, dtype=matrix_IMN.dtype, device=matrix_IMN.device)
    blocks = matrix_IMN.view(-1, num, M, 1, N) * own_ff[:, None, :, None]
    return blocks.reshape(I // num, num * M, num * N)


def clip_lengths(layouts: Sequence[tuple[Grid, int]]) -> list[int]:
    """How many images each video has, 1 for an image of its own or a tile.

    Args:
        layouts: for every image, the grid of its visual item and its plane there.

    Example:
        >>> clip, image = Grid.video(3, 2, 2), Grid.image(2, 2)
        >>> clip_lengths([(clip, 0), (clip, 1), (clip, 2), (image, 0)])
        [3, 1]
    """
    lengths: list[int] = []
    before: tuple[Grid, int] | None = None
    for grid, plane in layouts:
        follows = before is not None and before[0] is grid and before[1] + 1 == plane
        if follows and grid.modality == "video":
            lengths[-1] += 1
        else:
            lengths.append(1)
        before = grid, plane
    return lengths
