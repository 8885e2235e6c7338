"""Windows of a plane of tokens: what lies in each, what lies around it, and pooling inside.

Legend: B images, N tokens of a plane in raster order, h x w windows of it, W their number, s cells
of a window, k tokens of its surroundings, T cells of the plane, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from foveate.ops.resample import average_matrix

Shape = tuple[int, int]


def windows_of(plane: Shape, window: Shape) -> Shape:
    """Rows and columns of windows.

    Raises:
        ValueError: windows of that size do not fill the plane.

    Example:
        >>> windows_of((14, 14), (7, 7))
        (2, 2)
    """
    if min(window) < 1 or plane[0] % window[0] or plane[1] % window[1]:
        raise ValueError(
            f"Windows of {window[0]} x {window[1]} do not fill a plane of {plane[0]} x {plane[1]}."
        )
    return plane[0] // window[0], plane[1] // window[1]


def cut_windows(x_BNC: Tensor, plane: Shape, window: Shape) -> Tensor:
    """Tokens window by window, each in raster order, [B * W, h * w, C].

    Example:
        >>> cut_windows(torch.arange(4.0).view(1, 4, 1), (2, 2), (2, 1))[..., 0].tolist()
        [[0.0, 2.0], [1.0, 3.0]]
    """
    rows, columns = windows_of(plane, window)
    x = x_BNC.unflatten(1, (rows, window[0], columns, window[1])).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def join_windows(x_WsC: Tensor, plane: Shape, window: Shape) -> Tensor:
    """The opposite of `cut_windows`: tokens of all windows in raster order, [B, N, C].

    Example:
        >>> x = torch.arange(12.0).view(1, 12, 1)
        >>> torch.equal(join_windows(cut_windows(x, (2, 6), (2, 3)), (2, 6), (2, 3)), x)
        True
    """
    rows, columns = windows_of(plane, window)
    x = x_WsC.unflatten(1, window).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(1, 4)


def pool_windows(x_BNC: Tensor, plane: Shape, window: Shape, cells: Shape) -> Tensor:
    """The channels' largest values in the cells of every window, [B * W, s, C].

    Cells are those of adaptive pooling: they cover a window and overlap where its size is no
    multiple of their number.

    Args:
        x_BNC: tokens of a plane.
        plane: its rows and columns.
        window: rows and columns of a window.
        cells: rows and columns of cells in each.

    Example:
        >>> pool_windows(torch.arange(16.0).view(1, 16, 1), (4, 4), (4, 4), (2, 2)).flatten()
        tensor([ 5.,  7., 13., 15.])
    """
    x_WChw = cut_windows(x_BNC, plane, window).transpose(1, 2).unflatten(2, window)
    return adaptive_max_pool2d(x_WChw, cells).flatten(2).transpose(1, 2)


def surroundings(plane: Shape, window: Shape, margin: int) -> Tensor:
    """The tokens of every window with some around it, int64 [W, k], all inside the plane.

    They are `margin` rows and columns more than the window, moved inwards at the edges and cut to
    the plane where that is smaller.

    Args:
        plane: rows and columns.
        window: rows and columns of a window.
        margin: rows and columns more.

    Example:
        >>> surroundings((1, 6), (1, 3), margin=1).tolist()
        [[0, 1, 2, 3], [2, 3, 4, 5]]

    Source: STViT-R's released code (kernel 10, stride 4 for windows of 7 in a plane of 14 x 14).
    """
    counts = windows_of(plane, window)
    places = []
    for axis in range(2):
        size = min(window[axis] + margin, plane[axis])
        start = torch.arange(counts[axis]) * window[axis] - (size - window[axis]) // 2
        places.append(start.clamp(0, plane[axis] - size)[:, None] + torch.arange(size))
    row_Rh, column_Qw = places
    index_RQhw = row_Rh[:, None, :, None] * plane[1] + column_Qw[None, :, None]
    return index_RQhw.flatten(2).flatten(0, 1)


def cell_shares(plane: Shape, window: Shape, cells: Shape) -> Tensor:
    """Which tokens feed the cells of a plane, in equal shares, float32 [T, N].

    Cells are in raster order over the whole plane, rows of windows beside each other.

    Example:
        >>> cell_shares((1, 4), (1, 4), (1, 2)).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    counts = windows_of(plane, window)
    rows, columns = (
        torch.block_diag(*[average_matrix(size, num)] * count)
        for size, num, count in zip(window, cells, counts, strict=True)
    )
    return torch.kron(rows, columns)
