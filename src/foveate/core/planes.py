"""Reductions made inside every plane (frame or tile) of an item, put together for the item.

Legend: N tokens of one item, P patches of it, T planes, L patches of a plane, M targets of a plane
or of the item, D channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from foveate.core.grid import Grid, TokenKind
from foveate.core.method import Count
from foveate.core.newlines import with_special
from foveate.core.reduction import Reduction
from foveate.core.tokens import Tokens


def frames_of(tokens: Tokens, grid: Grid, method: str) -> torch.Tensor:
    """The patches of a video frame by frame, [T, L, D]; a view where no tokens lie between them.

    Args:
        tokens: the item's tokens, [1, N, D].
        grid: its layout.
        method: who asks, for the error.

    Raises:
        ValueError: the frames differ in size.

    Example:
        >>> grid = Grid.video(4, 2, 3, newlines_at_end=1)
        >>> frames_of(Tokens.from_grid(torch.zeros(25, 8), grid), grid, "evs").shape
        torch.Size([4, 6, 8])
    """
    if not grid.is_uniform:
        sizes = sorted({(plane.height, plane.width) for plane in grid.planes})
        raise ValueError(
            f"{method} compares frames with each other and needs frames of one size, got {sizes}."
        )
    T, L = len(grid.planes), grid.planes[0].num_patches
    x_ND = tokens.x_BND[0]
    if grid.num_tokens - grid.newlines_at_end == T * L:
        # Copying all patches would cost as much as a pass over them.
        return x_ND[: T * L].unflatten(0, (T, L))
    return x_ND[grid.patch_index(x_ND.device)].unflatten(0, (T, L))


def count_by_plane(grid: Grid, kept: Sequence[int]) -> Count:
    """Tokens of an item that keeps `kept[t]` patches of plane t, [CLS] and newlines as in
    `merge_by_plane`; a bound where rows end in newlines.

    Example:
        >>> count_by_plane(Grid.video(2, 3, 3, newlines_at_end=1), [4, 2])
        Count(tokens=7, exact=True)
    """
    rows = [
        min(plane.height, n) if plane.row_newline else 0
        for plane, n in zip(grid.planes, kept, strict=True)
    ]
    return Count(sum(kept) + grid.num_special + sum(rows), exact=not any(rows))


def take_planes(x_ND: torch.Tensor, source_TL: torch.Tensor) -> torch.Tensor:
    """The rows `source_TL` of the tokens, [T, L, D]; on the CPU a view where they are one stretch.

    Args:
        x_ND: tokens of an item.
        source_TL: int64 [T, L], ascending.

    Example:
        >>> take_planes(torch.arange(8.0)[:, None], torch.tensor([[2, 3], [4, 5]]))[..., 0].tolist()
        [[2.0, 3.0], [4.0, 5.0]]
    """
    if source_TL.device.type == "cpu" and source_TL.numel():
        first, last = int(source_TL[0, 0]), int(source_TL[-1, -1])
        if last - first + 1 == source_TL.numel():
            return x_ND[first : last + 1].unflatten(0, tuple(source_TL.shape))
    return x_ND[source_TL]


def merge_by_plane(
    grid: Grid,
    kept: Sequence[int],
    merge: Callable[[torch.Tensor, int], Reduction],
    device: torch.device | str = "cpu",
) -> Reduction:
    """One reduction of an item from reductions of its planes' patches.

    Planes of equal size and share form one batch. Targets of a plane stay in the order that `merge`
    gives them, behind the plane's [CLS] tokens and in front of newlines; where rows end in newlines
    they return to raster order, and rows that still hold one keep their newline.

    Args:
        grid: layout of the item.
        kept: targets M of every plane, at least one each.
        merge: `merge(source_TL, M)` reduces the patches `source_TL` (indices among the item's
            tokens, int64 [planes of the batch, L]) and returns a select or a merge from L to M.
        device: where the indices are made.

    Returns:
        A merge of the item's N tokens, weights as `merge` gave them.

    Example:
        >>> grid = Grid.video(2, 1, 3, newlines_at_end=1)
        >>> first = lambda source_TL, M: Reduction.select(torch.arange(M).expand(2, M), 3)
        >>> merge_by_plane(grid, [2, 2], first).anchor_BM.tolist()
        [[0, 1, 3, 4, 6]]
    """
    patch_P = grid.patch_index(device)
    sizes = [plane.num_patches for plane in grid.planes]
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for plane, shape in enumerate(zip(sizes, kept, strict=True)):
        batches[shape].append(plane)
    first_T = torch.tensor([0, *sizes]).cumsum(0).tolist()
    home_N = torch.full((grid.num_tokens,), -1, device=device)
    weight_N = torch.ones(grid.num_tokens, device=device)
    rank_N = torch.zeros(grid.num_tokens, dtype=torch.long, device=device)
    for (size, keep), planes in batches.items():
        first = torch.tensor([first_T[plane] for plane in planes], device=device)
        source_TL = patch_P[first[:, None] + torch.arange(size, device=device)]
        merged = merge(source_TL, keep)
        anchor_TM = source_TL.gather(1, merged.anchor_BM)
        group_TL = merged.groups_BN
        home_TL = anchor_TM.gather(1, group_TL.clamp(min=0))
        home_N[source_TL] = home_TL.where(group_TL >= 0, -1)
        if merged.weight_BN is not None:
            weight_N[source_TL] = merged.weight_BN.to(weight_N.dtype)
        rank_N[anchor_TM] = torch.arange(keep, device=device).expand_as(anchor_TM)
    return merge_by_anchor(grid, home_N, weight_N, rank_N)


def merge_by_anchor(
    grid: Grid, home_N: torch.Tensor, weight_N: torch.Tensor, rank_N: torch.Tensor
) -> Reduction:
    """One merge of an item's patches, whose targets stand at patches of their own.

    Targets and special tokens are in the order of `by_rank_in_planes`. O(N log N).

    Args:
        grid: layout of the item.
        home_N: int64 [N], the patch at which the target of every patch stands (its own index for
            that patch); -1 drops the patch, and stands for special tokens.
        weight_N: weight of every patch in its target, as it is.
        rank_N: the place of a target among those of its plane, at its anchor, int64 [N].

    Example:
        >>> grid = Grid.video(2, 1, 3, newlines_at_end=1)
        >>> home_N = torch.tensor([1, 1, -1, 4, 4, 4, -1])
        >>> merged = merge_by_anchor(grid, home_N, torch.ones(7), torch.zeros(7, dtype=torch.long))
        >>> merged.anchor_BM.tolist(), merged.groups_BN.tolist()
        ([[1, 4, 6]], [[0, 0, -1, 1, 1, 1, 2]])
    """
    device = home_N.device
    order_N = torch.arange(grid.num_tokens, device=device)
    kept_M = by_rank_in_planes((home_N == order_N).nonzero()[:, 0], rank_N, grid)
    slot_N = torch.full((grid.num_tokens,), -1, device=device)
    slot_N[kept_M] = torch.arange(len(kept_M), device=device)
    slot_N = torch.where(home_N >= 0, slot_N[home_N.clamp(min=0)], slot_N)
    # A dropped patch has no home, and no slot either: only what is kept was given one.
    return Reduction.merge(slot_N, len(kept_M), weight_N, kept_M, normalise=False)


def by_rank_in_planes(anchor_K: torch.Tensor, rank_N: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Anchors of an item's targets with special tokens, in the order of a method, int64 [M].

    Plane by plane: [CLS] tokens, targets by rank, newlines. Where rows end in newlines, everything
    is in raster order, and rows that hold a target keep their newline.

    Args:
        anchor_K: the patches that stand for targets, int64 [K].
        rank_N: the place of a target among those of its plane, at its anchor, int64 [N].
        grid: layout of the item.

    Example:
        >>> grid = Grid.video(2, 1, 3, newlines_at_end=1)
        >>> by_rank_in_planes(torch.tensor([1, 2, 4]), torch.tensor([0, 1, 0, 0, 0, 0, 0]), grid)
        tensor([2, 1, 4, 6])
    """
    kept_M = with_special(anchor_K, grid)
    if any(plane.row_newline for plane in grid.planes):
        return kept_M
    device = anchor_K.device
    kind_N, time_N = grid.kinds(device), grid.positions(device)[:, 0]
    block_N = torch.where(kind_N == TokenKind.CLS, 0, torch.where(kind_N == TokenKind.PATCH, 1, 2))
    key_N = (3 * time_N + block_N) * (grid.num_tokens + 1) + rank_N
    return kept_M[key_N[kept_M].argsort(stable=True)]


def average_cells(
    cell_P2: torch.Tensor, grid: Grid, size_BN: torch.Tensor | None = None
) -> Reduction:
    """Average the patches that share a cell of their plane, weighted by token size.

    A cell takes the place of its middle patch (the upper left of the middle ones); every row of
    cells keeps one newline where rows have them; newlines at the end and [CLS] tokens stay. O(P).

    Args:
        cell_P2: (row, column) of the cell of every patch, int64 [P, 2], rectangles of patches
            numbered in raster order from 0; -1 drops a patch.
        grid: layout of the item.
        size_BN: [1, N] size of every token; None for ones.

    Example:
        >>> grid = Grid.image(2, 4)
        >>> cell_P2 = grid.positions()[:, 1:] // 2
        >>> average_cells(cell_P2, grid).groups_BN.tolist()
        [[0, 0, 1, 1, 0, 0, 1, 1]]
    """
    device = cell_P2.device
    patch_P = grid.patch_index(device)
    plane_P, row_P, column_P = grid.positions(device)[patch_P].unbind(1)
    height = max(plane.height for plane in grid.planes)
    width = max(plane.width for plane in grid.planes)
    used_P = (cell_P2 >= 0).all(1)
    spare = len(grid.planes) * height * width
    key_P = (plane_P * height + cell_P2[:, 0]) * width + cell_P2[:, 1]
    key_P = key_P.where(used_P, spare)
    is_middle_P = _is_middle(row_P, key_P, spare) & _is_middle(column_P, key_P, spare)
    anchor_K = patch_P[is_middle_P & used_P]
    kept_M = with_special(anchor_K, grid)
    slot_N = torch.full((grid.num_tokens,), -1, device=device)
    slot_N[kept_M] = torch.arange(len(kept_M), device=device)
    slot_of_cell = torch.full((spare + 1,), -1, device=device)
    slot_of_cell[key_P[is_middle_P & used_P]] = slot_N[anchor_K]
    slot_N[patch_P] = slot_of_cell[key_P]
    return Reduction.merge(slot_N, len(kept_M), size_BN, kept_M)


def _is_middle(place_P: torch.Tensor, key_P: torch.Tensor, spare: int) -> torch.Tensor:
    """Whether a row (or column) of patches is the middle one of its cell."""
    empty = place_P.new_zeros(spare + 1)
    first, last = (
        empty.scatter_reduce(0, key_P, place_P, how, include_self=False)[key_P]
        for how in ("amin", "amax")
    )
    return place_P == (first + last) // 2
