"""What happens to newline tokens when patches go: five policies are in use in the field.

Legend: N tokens of an item, K kept patches.
"""

from __future__ import annotations

from typing import Literal

import torch

from foveate.core.grid import Grid, TokenKind

NewlinePolicy = Literal["keep", "row", "end", "remove"]


def with_newlines(kept_K: torch.Tensor, grid: Grid, policy: NewlinePolicy = "row") -> torch.Tensor:
    """Kept patch tokens plus the newline tokens that a policy keeps, ascending.

    Args:
        kept_K: int64 [K], indices of kept patches among the item's tokens.
        grid: the item's layout.
        policy: "keep" all newlines; "row": the newline of every row that still holds a patch, and
            those at the end; "end": only those after the last plane; "remove": none. Methods whose
            candidates include newlines do not call this.

    Returns:
        int64 [K'], ascending; [CLS] tokens are kept only when they are among `kept_K`.

    Raises:
        ValueError: the policy is unknown, or `kept_K` does not hold indices.

    Example:
        >>> from foveate.core import Grid, Plane
        >>> grid = Grid((Plane(2, 2, row_newline=True),))     # p p n p p n
        >>> with_newlines(torch.tensor([0]), grid, "row").tolist()
        [0, 2]
    """
    if policy not in ("keep", "row", "end", "remove"):
        raise ValueError(
            f'newline policy must be "keep", "row", "end" or "remove", got {policy!r}.'
        )
    if kept_K.dim() != 1 or kept_K.is_floating_point() or kept_K.dtype == torch.bool:
        raise ValueError(
            f"with_newlines takes indices, int64 [K]; got {kept_K.dtype} {tuple(kept_K.shape)}."
        )
    kept_K = kept_K.sort().values
    if policy == "remove":
        return kept_K
    device = kept_K.device
    is_newline_N = grid.kinds(device) == TokenKind.NEWLINE
    end_N = torch.zeros(grid.num_tokens, dtype=torch.bool, device=device)
    end_N[grid.num_tokens - grid.newlines_at_end :] = True
    keep_N = torch.zeros(grid.num_tokens, dtype=torch.bool, device=device)
    keep_N[kept_K] = True
    if policy == "keep":
        keep_N |= is_newline_N
    elif policy == "end":
        keep_N |= is_newline_N & end_N
    else:
        rows = max(plane.height for plane in grid.planes)
        time_N, y_N, _ = grid.positions(device).unbind(1)
        row_N = time_N * rows + y_N
        occupied = torch.zeros(len(grid.planes) * rows, dtype=torch.bool, device=device)
        # A kept [CLS] token has a row by convention only, and keeps no newline.
        is_patch_K = grid.kinds(device)[kept_K] == TokenKind.PATCH
        occupied[row_N[kept_K][is_patch_K]] = True
        keep_N |= is_newline_N & (occupied[row_N] | end_N)
    return keep_N.nonzero()[:, 0]


def with_special(kept_K: torch.Tensor, grid: Grid, policy: NewlinePolicy = "row") -> torch.Tensor:
    """Like `with_newlines`, and all [CLS] tokens stay as well, ascending.

    Example:
        >>> from foveate.core import Grid, Plane
        >>> grid = Grid((Plane(2, 2, row_newline=True, prefix=1),))     # c p p n p p n
        >>> with_special(torch.tensor([1]), grid).tolist()
        [0, 1, 3]
    """
    cls_C = (grid.kinds(kept_K.device) == TokenKind.CLS).nonzero()[:, 0]
    return torch.cat([with_newlines(kept_K, grid, policy), cls_C]).unique()
