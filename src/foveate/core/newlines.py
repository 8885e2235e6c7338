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
        int64 [K'], ascending; [CLS] tokens are kept under "keep" only when chosen.

    Raises:
        ValueError: the policy is unknown.

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
    kept_K = kept_K.sort().values
    if policy == "remove":
        return kept_K
    device = kept_K.device
    is_newline_N = grid.kinds(device) == TokenKind.NEWLINE
    at_end_N = torch.arange(grid.num_tokens, device=device) >= (
        grid.num_tokens - grid.newlines_at_end
    )
    keep_N = torch.zeros(grid.num_tokens, dtype=torch.bool, device=device)
    keep_N[kept_K] = True
    if policy == "keep":
        keep_N |= is_newline_N
    elif policy == "end":
        keep_N |= is_newline_N & at_end_N
    else:
        position_N3 = grid.positions(device)
        width = int(grid._table[0][:, 1].max()) + 1
        row_N = position_N3[:, 0] * width + position_N3[:, 1]
        occupied = torch.zeros(int(row_N.max()) + 1, dtype=torch.bool, device=device)
        occupied[row_N[kept_K]] = True
        keep_N |= is_newline_N & (occupied[row_N] | at_end_N)
    return keep_N.nonzero()[:, 0]
