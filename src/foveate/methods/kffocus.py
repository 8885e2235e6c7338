"""KFFocus: the frames that the video's own encoder chose, and more tokens for relevant ones.

Legend: F frames of a clip, K frames that are shown, G key frames, T frames (planes) of an item.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    FramePlan,
    FramesContext,
    Grid,
    Method,
    Plane,
    ProjectorContext,
    Reduction,
    Tokens,
    average_cells,
    merged_groups,
)


def fill_in_times(key_G: torch.Tensor, duration: float, delta: float = 0.05) -> torch.Tensor:
    """Times between key frames that are shown as well, float64, ascending.

    A gap of g seconds gets floor(g / (delta * duration)) of them, evenly; what lies before the
    first and behind the last key frame counts as a gap. At most 1 / delta times in all.

    Args:
        key_G: seconds of the key frames, float64 [G], ascending.
        duration: of the video, in seconds.
        delta: gap that is left alone, as a fraction of the duration.

    Example:
        >>> fill_in_times(torch.tensor([0.0, 3.0]).double(), 10.0, 0.2).tolist()
        [1.5, 4.75, 6.5, 8.25]

    Source: the frame layer of KFFocus (arXiv 2508.08989); head and tail are ours.
    """
    edge = torch.cat([key_G.new_zeros(1), key_G, key_G.new_full((1,), duration)])
    gap = edge.diff().clamp(min=0)
    # Rounding must not take the frame of a gap that is a whole multiple.
    num = (gap / (delta * duration) + 1e-9).floor().long()
    start, gap_n, num_n = (value.repeat_interleave(num) for value in (edge[:-1], gap, num))
    first = (num.cumsum(0) - num).repeat_interleave(num)
    step_n = torch.arange(len(first)) - first + 1
    return start + gap_n * step_n / (num_n + 1)


def condensed(plane: Plane, factor: int) -> tuple[int, int]:
    """Rows and columns of a plane whose sides are divided by `factor`, rounded up.

    Example:
        >>> condensed(Plane(14, 9), 4)
        (4, 3)
    """
    return -(-plane.height // factor), -(-plane.width // factor)


@dataclass(frozen=True)
class Shares:
    """How the frames of a video are condensed: `num_fine` by `fine`, the others by `coarse`.

    `num_shown` frames are left at all.
    """

    fine: int
    coarse: int
    num_fine: int
    num_shown: int


@dataclass(frozen=True)
class KFFocus(Method):
    """KFFocus without its trained module: key frames and fill-ins, condensed by relevance.

    The frames stage goes by the packet table alone and not by the question; the projector stage
    gives the frames that fit the question best more tokens. Videos only; images pass untouched.
    O(F) and O(N D).

    Args:
        delta: gap between key frames that is left alone, as a fraction of the duration.
        alpha: share of the frames that are condensed less; a budget of the call sets its own.
        d1: how often the sides of those are divided.
        d2: how often the sides of all others are.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> method, grid = KFFocus(), Grid.video(64, 16, 16)
        >>> method.count(grid, Budget(retain=method.card.retain, published=True)).tokens
        1792
        >>> method.shares(grid, Budget(retain=0.1))
        Shares(fine=2, coarse=4, num_fine=12, num_shown=64)

    Source: arXiv 2508.08989.
    """

    delta: float = 0.05
    alpha: float = 0.25
    d1: int = 2
    d2: int = 4

    card: ClassVar[Card] = Card(
        name="kffocus",
        title="KFFocus",
        paper="KFFocus: Highlighting Keyframes for Enhanced Video Understanding",
        arxiv="2508.08989",
        year=2025,
        stages=("frames", "projector"),
        kind="trained",
        summary="Shows the video's own key frames and fill-ins in long gaps, and condenses frames "
        "less the better they fit the question.",
        defaults={"all models": "delta 5 %, d1 2, d2 4 (reported); alpha 0.25 (ours)"},
        headline=(
            "Better accuracy than earlier methods at fewer tokens, mainly on long video "
            "(abstract; no figure verified)",
        ),
        notes=(
            "Its spatio-temporal module is trained with the model and is left out; without it (or "
            "with its output at zero, where its training starts) the condensed tokens are what "
            "remains. Frame choice and condensing have no parameters.",
            "Written from the abstract and a third-party account of the full text; there is no "
            "code. Average pooling per side and alpha are ours.",
            "Key frames are the packets from which decoding can start; nothing is decoded before "
            "the choice. Too many frames are thinned evenly to the frames asked for. In a video of "
            "key frames alone, or with key frames at a fixed distance, they say nothing of the "
            "content: the choice then lies about evenly.",
            "A budget of the call sets how many frames are fine, and divides or multiplies both "
            "factors by their ratio until it is met; below one token per frame the least relevant "
            "frames go.",
            "Relevance is the scorer's where frames were chosen with one, else the signal "
            "text.frame_similarity; give a CLIP-like model with companion=foveate.Companion(...).",
            "Newlines (one per row of cells) and [CLS] tokens come on top of the budget.",
        ),
        retain=0.25 / 4 + 0.75 / 16,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("text.frame_similarity",)

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 1 or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"delta must lie in (0, 1] and alpha in [0, 1], got {self.delta}, {self.alpha}."
            )
        if not 1 <= self.d1 < self.d2:
            raise ValueError(
                f"d1 must be at least 1 and d2 larger than it, got {self.d1} and {self.d2}."
            )

    # -- frames ---------------------------------------------------------------------------------

    def frames(self, context: FramesContext) -> FramePlan:
        """Key frames, and frames between those that lie far apart."""
        seconds_F = context.seconds_F
        key = context.keyframe_F.nonzero()[:, 0]
        times = fill_in_times(seconds_F[key], context.duration, self.delta)
        shown = torch.searchsorted(seconds_F, times + 1e-6, right=True) - 1
        index_K = torch.cat([key, shown.clamp(0, len(seconds_F) - 1)]).unique()
        most = context.frames if context.acts("projector") else context.num_frames
        if len(index_K) > most:
            index_K = index_K[torch.linspace(0, len(index_K) - 1, most, dtype=torch.float64).long()]
        if context.relevance is None or not context.acts("projector"):
            return FramePlan(index_K)
        return FramePlan(index_K, score_K=context.scores(index_K).cpu())

    # -- projector ------------------------------------------------------------------------------

    def shares(self, grid: Grid, budget: Budget) -> Shares:
        """How many frames are condensed by how much.

        Raises:
            ValueError: the frames differ in size.
        """
        T, height, width = grid.shape
        plane = grid.planes[0]
        if budget.published:
            return Shares(self.d1, self.d2, ops.round_half_even(self.alpha * T), T)

        def cells(factor: int) -> int:
            h, w = condensed(plane, factor)
            return h * w

        keep, side = max(1, budget.count(grid.num_patches)), max(height, width)
        factors, factor = {1, side}, float(self.d1)
        while factor > 1:
            factor /= self.d2 / self.d1
        while factor < side:
            factors.add(max(1, round(factor)))
            factor *= self.d2 / self.d1
        ladder = sorted(factors)
        for fine, coarse in pairwise(ladder):
            least = T * cells(coarse)
            if keep >= least:
                more = cells(fine) - cells(coarse)
                return Shares(fine, coarse, min(T, (keep - least) // more) if more else 0, T)
        return Shares(side, side, 0, min(T, keep))

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Cells of all frames and special tokens, exactly."""
        if grid.modality == "image" or budget.is_full:
            return Count(grid.num_tokens)
        shares, plane = self.shares(grid, budget), grid.planes[0]
        num_coarse = shares.num_shown - shares.num_fine
        total = grid.num_special
        for factor, num in ((shares.fine, shares.num_fine), (shares.coarse, num_coarse)):
            h, w = condensed(plane, factor)
            total += num * h * (w + plane.row_newline)
        return Count(total)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Average the cells of every frame, smaller ones where it fits the question.

        Raises:
            ValueError: the frames differ in size.
        """
        grid, device, plan = context.grid, tokens.device, context.plan
        if grid.modality == "image" or context.budget.is_full:
            return None
        shares = self.shares(grid, context.budget)
        if plan is not None and plan.score_K is not None:
            score_T = plan.score_K.float().to(device)
        else:
            score_T = context.signal("text.frame_similarity")[0].float()
        _, height, width = grid.shape
        rank_T = ops.top_k_ranked(score_T, shares.num_shown)
        factor_T = torch.zeros(len(grid.planes), dtype=torch.long, device=device)
        factor_T[rank_T] = shares.coarse
        factor_T[rank_T[: shares.num_fine]] = shares.fine
        plane_P, *place_P = grid.positions(device)[grid.patch_index(device)].unbind(1)
        factor_P1 = factor_T[plane_P][:, None]
        cell_P2 = torch.stack(place_P, dim=1) // factor_P1.clamp(min=1)
        reduction = average_cells(cell_P2.where(factor_P1 > 0, -1), grid, tokens.size_BN)
        context.note("relevance", lambda: score_T.repeat_interleave(height * width))
        context.note("cells", lambda: merged_groups(reduction), "label", "each is one token")
        return reduction
