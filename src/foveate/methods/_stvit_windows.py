"""STViT-R's groups of blocks on planes of windows: pooling, costs and provenance.

Legend: B images, N tokens of a plane in raster order, T semantic tokens, W windows, s semantic
tokens of a window, k tokens of its surroundings, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from foveate import ops
from foveate.core import Reduction
from foveate.core.window_flops import block_flops
from foveate.core.windows import ReadingBlock, WindowStep
from foveate.methods._stvit_modules import MARGIN, SemanticGroup
from foveate.ops.windows import Shape

#: The blocks of a group behind its first, which is one of the encoder on image tokens.
ROLES = ("stgm1", "stgm2", "local", "glob", "recover")


def cell_middles(plane: Shape, window: Shape, cells: Shape) -> torch.Tensor:
    """The token in the middle of every cell, cells in raster order over the plane, int64 [T].

    Example:
        >>> cell_middles((4, 4), (4, 4), (2, 2)).tolist()
        [5, 7, 13, 15]
        >>> cell_middles((1, 6), (1, 3), (1, 1)).tolist()
        [1, 4]
    """
    middle = []
    for size, side, num in zip(plane, window, cells, strict=True):
        inside = (2 * torch.arange(num) + 1) * side // (2 * num)
        middle.append((torch.arange(0, size, side)[:, None] + inside).flatten())
    return (middle[0][:, None] * plane[1] + middle[1]).flatten()


def group_tensors(tensors: Mapping[str, torch.Tensor], group: int) -> dict[str, torch.Tensor]:
    """The tensors of one group; those of a file without groups are the first one's.

    Example:
        >>> group_tensors({"groups.1.stgm1.attn.q.bias": torch.zeros(2)}, 1)
        {'stgm1.attn.q.bias': tensor([0., 0.])}
    """
    if not any(name.startswith("groups.") for name in tensors):
        return dict(tensors) if group == 0 else {}
    prefix = f"groups.{group}."
    found = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def group_step(
    x_BNC: torch.Tensor,
    plane: Shape,
    window: Shape,
    cells: Shape,
    blocks: Mapping[str, ReadingBlock],
    centres_1TC: torch.Tensor | None,
) -> WindowStep:
    """A plane behind a group of blocks, all of which `blocks` names (`ROLES`).

    Args:
        x_BNC: image tokens.
        plane: their rows and columns.
        window: rows and columns of a window.
        cells: semantic tokens of a window, rows and columns.
        blocks: by role.
        centres_1TC: learned centres.
    """
    group = SemanticGroup(
        *(blocks[role] for role in ROLES),
        global_tokens=centres_1TC,
        window=window,
        cells=cells,
    )
    steps = group.steps(x_BNC, plane)
    assert steps.recovered_BNC is not None
    B, N, C = x_BNC.shape
    reduction = Reduction.synthesise(
        steps.semantic_BTC.detach(),
        N,
        ops.cell_shares(plane, window, cells).to(x_BNC.device).expand(B, -1, -1),
        cell_middles(plane, window, cells).to(x_BNC.device).expand(B, -1),
    )
    inner = {role: block.inner for role, block in blocks.items()}
    return WindowStep(steps.recovered_BNC, reduction, group_flops(C, inner, plane, window, cells))


def group_flops(
    width: int, inner: Mapping[str, int], plane: Shape, window: Shape, cells: Shape
) -> int:
    """FLOPs of one image in the blocks of a group that run on semantic tokens.

    Args:
        width: C.
        inner: width inside the MLP, by role.
        plane: rows and columns of image tokens.
        window: rows and columns of a window.
        cells: semantic tokens of a window, rows and columns.

    Example:
        >>> inner = dict.fromkeys(ROLES, 4 * 384)
        >>> round(group_flops(384, inner, (14, 14), (7, 7), (3, 3)) / 1e9, 3)
        1.493
    """
    counts = ops.windows_of(plane, window)
    N, W, s = plane[0] * plane[1], counts[0] * counts[1], cells[0] * cells[1]
    k = min(window[0] + MARGIN, plane[0]) * min(window[1] + MARGIN, plane[1])
    T = W * s
    # Queries, tokens that are read, and how many pairs of them meet.
    of_block = {
        "stgm1": (T, W * (s + k), T * (s + k)),
        "stgm2": (T, T + N, T * (T + N)),
        "local": (T, T, T * s),
        "glob": (T, T, T * T),
        "recover": (N, T, N * T),
    }
    return sum(block_flops(width, inner[role], *shape) for role, shape in of_block.items())
