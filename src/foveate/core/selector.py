"""The base of methods that keep some patches of an item as they are and decide only which.

Legend: N tokens of one item, P patches among them, K kept patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.core.budget import Budget
from foveate.core.context import ProjectorContext
from foveate.core.grid import Grid
from foveate.core.method import Count, Method
from foveate.core.newlines import with_special
from foveate.core.reduction import Reduction
from foveate.core.tokens import Tokens


@dataclass(frozen=True)
class PatchSelector(Method):
    """Keeps `round(retain * P)` patches of every item, chosen by `choose`, in their order.

    The newline of every row that still holds a patch, newlines at the end and [CLS] tokens stay on
    top of the budget. A method that ranks patches is `choose` and a card; `num_kept` may say that
    another number stays:

    Example:
        >>> from foveate import ops
        >>> from foveate.core import Card
        >>> @dataclass(frozen=True)
        ... class Loudest(PatchSelector):
        ...     card = Card("loudest", "Loudest", "An example", ("projector",), "baseline",
        ...                 "Keeps the features of largest norm.")
        ...     def choose(self, tokens, context, patch_P, keep):
        ...         return ops.top_k(tokens.x_BND[0, patch_P].norm(dim=-1), keep)
        >>> Loudest().count(Grid.image(24, 24), Budget(retain=0.25))
        Count(tokens=144, exact=True)
    """

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """Which patches stay.

        Args:
            tokens: the item's tokens, [1, N, D].
            context: budget, grid and signals.
            patch_P: int64 [P], the tokens that are patches.
            keep: K.

        Returns:
            int64 [K], places in `patch_P`, in any order, without repetition.
        """
        raise NotImplementedError

    def num_kept(self, grid: Grid, budget: Budget) -> int:
        """How many patches of an item stay, K; all of them leaves the item alone."""
        return max(1, budget.count(grid.num_patches))

    def count(self, grid: Grid, budget: Budget) -> Count:
        """`num_kept` patches plus special tokens; a bound where rows end in newlines."""
        if budget.is_full:
            return Count(grid.num_tokens)
        patches = self.num_kept(grid, budget)
        if patches == grid.num_patches:
            return Count(grid.num_tokens)
        rows = sum(plane.height for plane in grid.planes if plane.row_newline)
        return Count(patches + grid.num_special + min(rows, patches), exact=rows == 0)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep the chosen patches of one item."""
        if context.budget.is_full:
            return None
        patch_P = context.grid.patch_index(tokens.device)
        keep = self.num_kept(context.grid, context.budget)
        if keep == len(patch_P):
            return None
        chosen_K = patch_P[self.choose(tokens, context, patch_P, keep)]
        return Reduction.select(with_special(chosen_K, context.grid), tokens.num_tokens)
