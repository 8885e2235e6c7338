"""F2C: key frames grown into short clips, paid for with resolution.

Legend: M candidate frames, A anchors, n frames of the clips, T frames (planes) of an item,
P patches, E channels of the scorer's space.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    ProjectorContext,
    Reduction,
    Tokens,
    average_cells,
    frames_of,
)
from foveate.errors import MissingSignalError


@dataclass(frozen=True, eq=False)
class Clips:
    """Frames of the chosen clips: places among the candidates, ascending, each once.

    Attributes:
        index_n: int64 [n].
        scale_n: side as a fraction of the full size, float64 [n].
        group_n: number of the clip, int64 [n], in the order of time.
    """

    index_n: torch.Tensor
    scale_n: torch.Tensor
    group_n: torch.Tensor


def peaks(relevance_M: torch.Tensor) -> torch.Tensor:
    """The most relevant frame of every basin between valleys, int64, ascending, each once.

    Valleys are both ends and every frame no more relevant than its neighbours; a basin includes
    both of its valleys, and the first of equal frames wins. O(M).

    Example:
        >>> peaks(torch.tensor([0.1, 0.5, 0.2, 0.3, 0.9, 0.4])).tolist()
        [1, 4]

    Source: Algorithm 1 of F2C (arXiv 2510.02262).
    """
    num = len(relevance_M)
    if num < 2:
        return torch.zeros(num, dtype=torch.long)
    before, after = relevance_M[:-1] >= relevance_M[1:], relevance_M[:-1] <= relevance_M[1:]
    valley_M = torch.ones(num, dtype=torch.bool)
    valley_M[1:-1] = before[:-1] & after[1:]
    end_V = valley_M.nonzero()[:, 0]
    basin_m = (valley_M.long().cumsum(0) - 1)[:-1]
    inner = relevance_M[:-1]
    high_B = inner.new_zeros(len(end_V) - 1).scatter_reduce(
        0, basin_m, inner, "amax", include_self=False
    )
    place_m = torch.arange(num - 1).where(inner == high_B[basin_m], num)
    first_B = torch.full((len(high_B),), num).scatter_reduce(0, basin_m, place_m, "amin")
    return first_B.where(relevance_M[end_V[1:]] <= high_B, end_V[1:]).unique()


def anchors(relevance_M: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` peaks that spread over time, int64 [A], ascending.

    K-means on the times of the peaks, from their quantiles; the most relevant peak of each cluster
    stays. O(M + iterations x peaks x most).
    """
    peak_C = peaks(relevance_M)
    if len(peak_C) <= most:
        return peak_C
    start = torch.linspace(0, len(peak_C) - 1, most, dtype=torch.float64).round().long()
    _, cluster_C = ops.kmeans(peak_C.double()[:, None], most, init=start)
    order = torch.sort(relevance_M[peak_C], descending=True, stable=True).indices
    cluster_C = cluster_C[order]
    by_cluster = torch.sort(cluster_C, stable=True)
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = by_cluster.values.diff() > 0
    return peak_C[order[by_cluster.indices[is_first]]].sort().values


def clip_lengths(
    relevance_M: torch.Tensor,
    place_ME: torch.Tensor,
    anchor_A: torch.Tensor,
    longest: int,
    redundancy: float = 0.5,
    length: float = 0.05,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and length of the clip around every anchor, int64 [A] each.

    A length l scores the mean relevance of its frames, less `redundancy` times their mean cosine
    with each other, plus `length * l / longest`; the shortest of equals. Windows are shifted
    inwards at the ends. O(M E + A longest E).

    Example:
        >>> r = torch.tensor([0.1, 0.9, 0.1, 0.1])
        >>> [t.tolist() for t in clip_lengths(r, torch.eye(4), torch.tensor([1]), 4, 0.0, 0.0)]
        [[1], [1]]

    Source: equation 8 of F2C (arXiv 2510.02262).
    """
    num = len(relevance_M)
    length_l = torch.arange(1, min(longest, num) + 1)
    start_Al = (anchor_A[:, None] - (length_l - 1) // 2).clamp(min=0).minimum(num - length_l)
    pad = (0, 0, 1, 0)
    unit_ME = torch.nn.functional.normalize(place_ME.double(), dim=1)
    sum_E = torch.nn.functional.pad(unit_ME.cumsum(0), pad)
    sum_r = torch.nn.functional.pad(relevance_M.double().cumsum(0), (1, 0))
    end_Al = start_Al + length_l
    mean_Al = (sum_r[end_Al] - sum_r[start_Al]) / length_l
    # The squared length of a sum of unit vectors holds every cosine twice, and l ones.
    joint_Al = (sum_E[end_Al] - sum_E[start_Al]).square().sum(-1) - length_l
    alike_Al = joint_Al / (length_l * (length_l - 1)).clamp(min=1)
    alike_Al[:, 0] = 0
    score_Al = mean_Al - redundancy * alike_Al + length * length_l / max(longest, 1)
    # Sums differ by rounding where scores are equal.
    is_best = score_Al >= score_Al.max(1, keepdim=True).values - 1e-9
    best_A = is_best.long().argmax(1)
    return start_Al.gather(1, best_A[:, None])[:, 0], length_l[best_A]


def choose_clips(
    relevance_M: torch.Tensor,
    place_ME: torch.Tensor,
    room: float,
    most: int | None = None,
    s_max: float = 2.0,
    redundancy: float = 0.5,
    length: float = 0.05,
) -> Clips:
    """The clips of a video whose frames together cost at most `room` frames of full size.

    Args:
        relevance_M: of candidate frames, float [M].
        place_ME: their features, [M, E].
        room: frames of full size, above 0.
        most: anchors; None: as many as there is room for.
        s_max: largest reduction per side; a single frame may fall below it where there is no room
            for it.
        redundancy: weight of the redundancy of a clip.
        length: weight of its length.
    """
    anchor_A = anchors(relevance_M, max(1, min(most or int(room), max(1, int(room)))))
    A, num = len(anchor_A), len(relevance_M)
    longest = max(1, int(s_max**2 * room / A + 1e-9))
    start_A, length_A = clip_lengths(relevance_M, place_ME, anchor_A, longest, redundancy, length)
    scale_A = (room / (A * length_A.double())).sqrt().clamp(max=1)
    merged: list[list[float]] = []
    spans = zip(scale_A.tolist(), start_A.tolist(), (start_A + length_A).tolist(), strict=True)
    for scale, start, end in sorted(spans):
        if merged and merged[-1][0] == scale and start < merged[-1][2]:
            merged[-1][2] = max(end, merged[-1][2])
        else:
            merged.append([scale, start, end])
    scale_M = torch.zeros(num, dtype=torch.float64)
    clip_M = torch.full((num,), -1)
    for scale, start, end in merged:  # sharper clips come later and take what they overlap
        scale_M[int(start) : int(end)] = scale
        clip_M[int(start) : int(end)] = int(start) * num + int(end)
    index_n = (clip_M >= 0).nonzero()[:, 0]
    group_n = clip_M[index_n].unique(return_inverse=True)[1]
    return Clips(index_n, scale_M[index_n], group_n)


@dataclass(frozen=True)
class F2C(Method):
    """F2C: relevant, spread-out key frames as short clips of reduced resolution.

    The frames stage chooses frames and scales; the projector stage pools every frame's tokens to
    its scale. Where no frames were chosen, the projector stage chooses among those that were
    encoded. Videos only; images pass untouched.

    Args:
        fps: candidate frames per second.
        most_candidates: at most so many candidates, evenly spread; 0: no limit.
        anchors: most clips; 0: one per frame of room.
        s_max: largest reduction of a side.
        redundancy: weight of the likeness of a clip's frames.
        length: weight of a clip's length.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> F2C().count(Grid.video(16, 14, 14), Budget(retain=0.25))
        Count(tokens=784, exact=False)

    Source: arXiv 2510.02262.
    """

    fps: float = 1.0
    most_candidates: int = 0
    anchors: int = 0
    s_max: float = 2.0
    redundancy: float = 0.5
    length: float = 0.05

    card: ClassVar[Card] = Card(
        name="f2c",
        title="F2C",
        paper="From Frames to Clips: Training-free Adaptive Key Clip Selection for Long-Form Video "
        "Understanding",
        arxiv="2510.02262",
        year=2025,
        stages=("frames", "projector"),
        kind="training-free",
        summary="Grows relevant, spread-out key frames into short clips and lowers their "
        "resolution, so that they cost as much as the key frames alone.",
        defaults={
            "all models": "1 candidate per second, lambda_r 0.5, lambda_l 0.05, s_max 2, one "
            "anchor per frame of the budget",
        },
        headline=(
            "Up to +8.1 % on Video-MME, +5.6 % on LongVideoBench and +10.3 % on MLVU against "
            "uniform sampling (abstract)",
        ),
        notes=(
            "Written from the abstract, published summaries and a third-party re-implementation; "
            "there is no official code.",
            "Every frame is encoded at full size, and its tokens are averaged on a grid that is "
            "smaller by its scale, rounded down: one tensor holds all frames of a video. Models of "
            "native resolution could encode small frames instead, which saves encoder time, too.",
            "K is the frames that the budget has room for; without a budget, the frames asked for. "
            "Where fewer candidates lie a second apart, as many frames are candidates.",
            "The longest clip is rounded down, and the number of anchors is that found, so that "
            "the budget holds. Of two clips of one frame the sharper one has it.",
            "At the projector without chosen frames, candidates are the frames of the video, by "
            "text.frame_similarity and their mean features; what is not chosen is dropped.",
            '"f2c@frames" leaves the projector alone: frames stay whole, and their number fits '
            "the budget.",
        ),
        retain=0.5,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("text.frame_similarity",)

    def __post_init__(self) -> None:
        if not self.fps > 0 or not self.s_max >= 1:
            raise ValueError(
                f"fps must be above 0 and s_max at least 1, got {self.fps} and {self.s_max}."
            )
        if self.most_candidates < 0 or self.anchors < 0:
            raise ValueError(
                "most_candidates and anchors must be at least 0, got "
                f"{self.most_candidates} and {self.anchors}."
            )

    def _clips(
        self, relevance_M: torch.Tensor, place_ME: torch.Tensor, room: float, s_max: float
    ) -> Clips:
        most = self.anchors or None
        return choose_clips(relevance_M, place_ME, room, most, s_max, self.redundancy, self.length)

    def frames(self, context: FramesContext) -> FramePlan:
        """Choose clips among candidates at a steady rate.

        Raises:
            MissingSignalError: there is no scorer.
        """
        index_M = context.at_rate(self.fps)
        if len(index_M) < min(context.frames, context.num_candidates):
            index_M = context.evenly(context.frames)
        if self.most_candidates and len(index_M) > self.most_candidates:
            place = torch.linspace(0, len(index_M) - 1, self.most_candidates, dtype=torch.float64)
            index_M = index_M[place.long()]
        if context.embeddings is None:
            reason = "no scorer was given; pass scorer=..."
            raise MissingSignalError(self.name, ("frames.relevance",), reason)
        relevance_M = context.scores(index_M).cpu()
        place_ME = context.embeddings(index_M).cpu()
        room = context.frames if context.budget.published else context.num_frames
        s_max = self.s_max if context.acts("projector") else 1.0
        found = self._clips(relevance_M, place_ME, float(room), s_max)
        return FramePlan(
            index_M[found.index_n], found.scale_n, None, found.group_n, relevance_M[found.index_n]
        )

    def count(self, grid: Grid, budget: Budget) -> Count:
        """At most the budget, special tokens and a newline for every row left."""
        if grid.modality == "image" or budget.is_full:
            return Count(grid.num_tokens)
        keep = max(1, budget.count(grid.num_patches, "floor"))
        has_rows = any(plane.row_newline for plane in grid.planes)
        rows = min(keep, sum(plane.height for plane in grid.planes)) if has_rows else 0
        return Count(keep + rows + grid.num_special, exact=False)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Average the tokens of every frame on a grid of its scale.

        Raises:
            ValueError: the frames differ in size.
        """
        grid, plan = context.grid, context.plan
        if grid.modality == "image" or context.budget.is_full:
            return None
        T, device = len(grid.planes), tokens.device
        if plan is not None:
            if plan.scale_K is None:
                return None
            scale_T, group_T, score_T = plan.scale_K.double(), plan.group_K, plan.score_K
        else:
            x_TLD = frames_of(tokens, grid, self.name)
            score_T = context.signal("text.frame_similarity")[0].float().cpu()
            keep = max(1, context.budget.count(grid.num_patches, "floor"))
            mean_TD = x_TLD.mean(1, dtype=torch.float32).cpu()
            found = self._clips(score_T, mean_TD, keep / x_TLD.shape[1], self.s_max)
            scale_T = torch.zeros(T, dtype=torch.float64)
            scale_T[found.index_n] = found.scale_n
            group_T = torch.full((T,), -1)
            group_T[found.index_n] = found.group_n
        self._note(context, score_T, group_T)
        plane_P, *place_P = grid.positions(device)[grid.patch_index(device)].unbind(1)
        shape_T2 = torch.tensor([(plane.height, plane.width) for plane in grid.planes])
        # A hair more, so that 14 * (6 / 7) stays 12.
        small_T2 = (shape_T2 * scale_T[:, None] + 1e-6).floor().long()
        small_T2 = torch.where(scale_T[:, None] > 0, small_T2.clamp(min=1), 0)
        before_P2, after_P2 = shape_T2.to(device)[plane_P], small_T2.to(device)[plane_P]
        cell_P2 = torch.stack(place_P, dim=1) * after_P2 // before_P2
        return average_cells(cell_P2.where(after_P2 > 0, -1), grid, tokens.size_BN)

    @staticmethod
    def _note(
        context: ProjectorContext, score_T: torch.Tensor | None, group_T: torch.Tensor | None
    ) -> None:
        sizes = torch.tensor([plane.num_patches for plane in context.grid.planes])
        if score_T is not None:
            context.note("relevance", lambda: score_T.float().repeat_interleave(sizes))
        if group_T is not None:
            context.note("clips", lambda: group_T.repeat_interleave(sizes), "label")
