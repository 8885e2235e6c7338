"""The bases of methods that keep some patches of an item as they are and decide only which.

Legend: N tokens of one item, P patches among them, T planes (frames or tiles) of one shape,
L patches of a plane, K kept patches (of the item or of a plane).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.core.budget import Budget
from foveate.core.context import ProjectorContext
from foveate.core.grid import Grid, Plane
from foveate.core.method import Count, Method
from foveate.core.newlines import with_special
from foveate.core.planes import count_by_plane
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


@dataclass(frozen=True)
class PlaneSelector(Method):
    """Keeps a share of the patches of every plane (frame, tile), chosen by `choose_in_planes`.

    Planes of one shape and share are chosen in one batch. Newlines and [CLS] tokens stay as in
    `PatchSelector`.

    Example:
        >>> from foveate import ops
        >>> from foveate.core import Card
        >>> @dataclass(frozen=True)
        ... class LoudestOfFrame(PlaneSelector):
        ...     card = Card("loudest_of_frame", "Loudest", "An example", ("projector",), "baseline",
        ...                 "Keeps the features of largest norm of every frame.")
        ...     def choose_in_planes(self, tokens, context, source_TL, plane, keep):
        ...         return ops.top_k(tokens.x_BND[0, source_TL].norm(dim=-1), keep)
        >>> LoudestOfFrame().count(Grid.video(8, 6, 6), Budget(retain=0.25))
        Count(tokens=72, exact=True)
    """

    def choose_in_planes(
        self,
        tokens: Tokens,
        context: ProjectorContext,
        source_TL: torch.Tensor,
        plane: Plane,
        keep: int,
    ) -> torch.Tensor:
        """Which patches of some planes of one shape stay.

        Args:
            tokens: the item's tokens, [1, N, D].
            context: budget, grid and signals.
            source_TL: the planes' patches among the item's tokens, in raster order, int64 [T, L].
            plane: their shape.
            keep: K.

        Returns:
            int64 [T, K], places among the L patches of each plane, without repetition.
        """
        raise NotImplementedError

    def kept_per_plane(self, grid: Grid, budget: Budget) -> Sequence[int]:
        """Patches that stay of every plane; by default the budget's share, at least one."""
        return budget.split([plane.num_patches for plane in grid.planes])

    def count(self, grid: Grid, budget: Budget) -> Count:
        """The sum over planes plus special tokens; a bound where rows end in newlines."""
        if budget.is_full:
            return Count(grid.num_tokens)
        return count_by_plane(grid, self.kept_per_plane(grid, budget))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep the chosen patches of every plane of one item."""
        if context.budget.is_full:
            return None
        grid, device = context.grid, tokens.device
        patch_P = grid.patch_index(device)
        batches: dict[tuple[Plane, int], list[int]] = defaultdict(list)
        first = 0
        for plane, keep in zip(grid.planes, self.kept_per_plane(grid, context.budget), strict=True):
            batches[plane, keep].append(first)
            first += plane.num_patches
        chosen = []
        for (plane, keep), starts in batches.items():
            start_T1 = torch.tensor(starts, device=device)[:, None]
            source_TL = patch_P[start_T1 + torch.arange(plane.num_patches, device=device)]
            place_TK = self.choose_in_planes(tokens, context, source_TL, plane, keep)
            chosen.append(source_TL.gather(1, place_TK).flatten())
        return Reduction.select(with_special(torch.cat(chosen), grid), tokens.num_tokens)
