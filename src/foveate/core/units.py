"""Cutting tokens inside an encoder image by image, in units that the model keeps together.

Where a model merges neighbouring patches into one token behind the encoder, dropping a few of them
would leave a token of nothing much: all patches of a token stay or go together, as one unit.

Legend: B images of a call, M tokens present (prefix included), P patches of an image, U units of
it, K tokens that stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from foveate import ops
from foveate.core.grid import Grid, Plane
from foveate.core.reduction import Reduction
from foveate.core.tokens import Tokens


def is_tiled(grid: Grid) -> bool:
    """Whether an item is an any-resolution image: a thumbnail and a mosaic of tiles."""
    return grid.modality == "image" and len(grid.planes) > 1


def patch_groups(num_patches: int, shape: Plane) -> torch.Tensor | None:
    """Which token of a plane each patch of its image becomes a part of, int64 [P].

    None where tokens are patches. Where pooling windows overlap, the token that a patch is nearest
    to.

    Example:
        >>> patch_groups(16, Plane(2, 2)).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
        >>> patch_groups(9, Plane(2, 2)).view(3, 3).tolist()
        [[0, 1, 1], [2, 3, 3], [2, 3, 3]]
    """
    if shape.num_patches >= num_patches:
        return None
    rows = round((num_patches * shape.height / shape.width) ** 0.5)
    if rows == 0 or num_patches % rows:
        return None
    columns = num_patches // rows
    row_R = (2 * torch.arange(rows) + 1) * shape.height // (2 * rows)
    column_C = (2 * torch.arange(columns) + 1) * shape.width // (2 * columns)
    return (row_R[:, None] * shape.width + column_C).flatten()


def image_shape(grid: Grid, plane: int) -> Plane:
    """The tokens of one image: those of its plane, or of a tile."""
    return grid.planes[0 if is_tiled(grid) else plane]


def num_tiles(plane: Plane, grid: Grid) -> int:
    """Tiles (of the thumbnail's size) that a plane of a tiled image is made of."""
    tile = grid.planes[0]
    return -(-plane.height // tile.height) * -(-plane.width // tile.width)


def present_units(
    tokens: Tokens, group_BP: torch.Tensor | None, prefix: int
) -> tuple[torch.Tensor, int]:
    """The unit of every present patch, [B, M - prefix], and U; padding belongs to none, U."""
    B, M, mask = tokens.batch, tokens.num_tokens, tokens.mask_BN
    if group_BP is None:
        num, unit_BM = M - prefix, torch.arange(-prefix, M - prefix, device=tokens.device)
        unit_BM = unit_BM.expand(B, M)
    else:
        num, unit_BM = int(group_BP.max()) + 1, pad(group_BP, (prefix, 0))
        if tokens.reduction is not None:
            unit_BM = tokens.reduction.gather(unit_BM)
    if mask is not None:
        unit_BM = unit_BM.masked_fill(~mask, num)
    return unit_BM[:, prefix:], num


def per_unit(
    value_BP: torch.Tensor,
    unit_BP: torch.Tensor,
    num_units: int,
    scatter: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """Sums or means of the patches of every unit, [B, U]."""
    return scatter(value_BP[..., None], unit_BP, num_units + 1)[:, :num_units, 0]


def best_units(
    score_BU: torch.Tensor,
    exists_BU: torch.Tensor,
    keep_B: torch.Tensor,
    unit_BP: torch.Tensor,
    prefix: int,
) -> torch.Tensor:
    """Which tokens stay, bool [B, M]: the prefix, and the patches of the best units."""
    B, U = score_BU.shape
    chosen_BK = ops.top_k_ragged(score_BU, keep_B, mask=exists_BU)
    keep_BU = torch.zeros(B, U + 1, dtype=torch.bool, device=score_BU.device)
    keep_BU.scatter_(1, chosen_BK.where(chosen_BK >= 0, U), True)
    keep_BU[:, U] = False
    return pad(keep_BU.gather(1, unit_BP), (prefix, 0), value=True)


def select_tokens(keep_BM: torch.Tensor) -> Reduction | None:
    """The tokens that stay, in order; images with fewer of them are padded. None: all stay."""
    count_B = keep_BM.sum(1)
    counts = count_B.tolist()
    width = max(counts)
    if min(counts) == keep_BM.shape[1]:
        return None
    index_BK = (~keep_BM).byte().argsort(dim=1, stable=True)[:, :width]
    mask_BK = None
    if min(counts) < width:
        mask_BK = torch.arange(width, device=keep_BM.device) < count_B[:, None]
    return Reduction.select(index_BK, keep_BM.shape[1], mask_BK)
