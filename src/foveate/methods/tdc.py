"""TDC: whole first frames of short windows inside scenes, few tokens for every other frame.

Legend: T frames (planes) of an item, L patches of one, P tokens of one with its newlines and [CLS],
S scenes, W windows, K tokens of a compressed frame, f some frames, M tokens out, E pairs of a
token out and a token that feeds it, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    frames_of,
)

#: Layouts are made on the CPU, whatever the default device.
_arange = partial(torch.arange, device="cpu")


@dataclass(frozen=True, eq=False, repr=False)
class TDCWeights:
    """What training adds to the method; a recipe that holds it cannot be written down as text.

    Attributes:
        compress: `compress(query_fKD, x_fLD)` gives the K tokens of f frames, [f, K, D]; the
            queries are the static frame of each one's window, pooled to K.
        sep_D: a vector behind every frame, [D]; None: there is none.
    """

    compress: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sep_D: torch.Tensor | None = None

    def __repr__(self) -> str:
        return "TDCWeights(...)"


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a video and how many tokens each frame has; all on the CPU.

    Attributes:
        static_T: bool [T], frames that stay whole.
        window_T: the window of each frame, int64 [T], ascending from 0.
        count_T: tokens of each frame, int64 [T]; of a static one all, of the others K.
    """

    static_T: torch.Tensor
    window_T: torch.Tensor
    count_T: torch.Tensor


def static_frames(bounds_S2: torch.Tensor, window: int) -> torch.Tensor:
    """The first frame of every window of at most `window` frames inside every scene, bool [T].

    Args:
        bounds_S2: first and last frame of each scene, int64 [S, 2], without gaps, from frame 0.
        window: frames.

    Example:
        >>> static_frames(torch.tensor([[0, 3], [4, 4]]), 3).int().tolist()
        [1, 0, 0, 1, 1]
    """
    length_S = bounds_S2[:, 1] - bounds_S2[:, 0] + 1
    start_T = bounds_S2[:, 0].repeat_interleave(length_S)
    return (_arange(len(start_T)) - start_T) % window == 0


def most_windows(frames: int, scenes: int, window: int) -> int:
    """How many windows there are at most, wherever the cuts between the scenes lie.

    Example:
        >>> most_windows(224, 25, 8), most_windows(16, 1, 8), most_windows(20, 25, 8)
        (49, 2, 20)
    """
    scenes = min(scenes, frames)
    return scenes + (frames - scenes) // window


def fitting_window(bounds_S2: torch.Tensor, most: int) -> int:
    """The shortest window of which all scenes together need at most `most`, at least one each.

    Example:
        >>> fitting_window(torch.tensor([[0, 9], [10, 11]]), 4)
        4
    """
    length_S = bounds_S2[:, 1] - bounds_S2[:, 0] + 1
    window_w = _arange(1, int(length_S.max()) + 1)
    need_w = (length_S + window_w[:, None] - 1).div(window_w[:, None], rounding_mode="floor")
    return int((need_w.sum(1) <= most).nonzero()[0, 0]) + 1


def lay_out(
    tokens: Tokens,
    grid: Grid,
    windows: Windows,
    weights: TDCWeights | None = None,
    max_tokens: int | None = None,
) -> Reduction:
    """One reduction of a video: static frames whole, the others pooled, in the order of time.

    Without weights a compressed frame is its patches averaged to K along row-major order; with
    them it is what they make of it, and that pooling remains its provenance. Newlines at the end
    of the item stay; those of rows and [CLS] tokens stay with static frames. O(N D).

    Args:
        tokens: the item's tokens, [1, N, D].
        grid: its layout, of frames of one size.
        windows: which frames stay whole, and how many tokens the others get.
        weights: a trained compressor; None: pooling, and no vectors between frames.
        max_tokens: of the video at most; what is too many is cut off the end of every window.

    Source: TDC (arXiv 2504.10443), section 3, and its released code.
    """
    T, L = len(grid.planes), grid.planes[0].num_patches
    has_sep = weights is not None and weights.sep_D is not None
    size_T = windows.count_T + has_sep * (windows.count_T > 0)
    frame_M = _arange(T).repeat_interleave(size_T)
    slot_M = _arange(len(frame_M)) - (size_T.cumsum(0) - size_T)[frame_M]
    keep_M = _within(windows.window_T[frame_M], max_tokens)
    frame_M, slot_M = frame_M[keep_M], slot_M[keep_M]
    is_sep_M = slot_M == windows.count_T[frame_M]

    # The cell of every token among its frame's, as adaptive average pooling has it.
    static_M, count_M = windows.static_T[frame_M], windows.count_T[frame_M]
    first_M = slot_M.where(static_M, slot_M * L // count_M)
    end_M = (slot_M + 1).where(static_M, -(-(slot_M + 1) * L // count_M))
    num_M = (end_M - first_M).masked_fill(is_sep_M, 0)
    row_E = _arange(len(num_M)).repeat_interleave(num_M)
    place_E = _arange(len(row_E)) - (num_M.cumsum(0) - num_M)[row_E] + first_M[row_E]
    whole_TP = _arange(grid.num_tokens - grid.newlines_at_end).view(T, -1)
    patch_TL = grid.patch_index().view(T, L)
    column_E = _sources(whole_TP, patch_TL, frame_M[row_E], place_E, static_M[row_E])
    middle_M = (first_M + end_M - 1).div(2, rounding_mode="floor")
    middle_M = middle_M.where(~is_sep_M, whole_TP.shape[1] * static_M + L * ~static_M - 1)
    anchor_M = _sources(whole_TP, patch_TL, frame_M, middle_M, static_M)

    tail_E = _arange(grid.num_tokens - grid.newlines_at_end, grid.num_tokens)
    num_out = len(frame_M) + len(tail_E)
    row_E = torch.cat([row_E, len(frame_M) + _arange(len(tail_E))])
    weight_E = torch.cat([1 / num_M.clamp(min=1), torch.ones(len(tail_E), device="cpu")])[row_E]
    column_E, anchor_M = torch.cat([column_E, tail_E]), torch.cat([anchor_M, tail_E])
    device, index_E = tokens.device, (row_E, column_E, weight_E)
    if weights is None:
        return _pooled(*index_E, anchor_M, num_out, grid.num_tokens, device)
    x_MD = _compressed(tokens.x_BND[0], patch_TL, windows, weights, frame_M, slot_M)
    if weights.sep_D is not None:
        if weights.sep_D.shape != x_MD.shape[1:]:
            raise ValueError(
                f"sep_D must be [D] = {tuple(x_MD.shape[1:])}, got {tuple(weights.sep_D.shape)}."
            )
        x_MD[is_sep_M.to(device)] = weights.sep_D.to(x_MD)
    own_M = (static_M & ~is_sep_M).to(device)
    x_MD[own_M] = tokens.x_BND[0][anchor_M[: len(frame_M)].to(device)[own_M]]
    x_MD = torch.cat([x_MD, tokens.x_BND[0][tail_E.to(device)]])
    matrix = _matrix(*index_E, num_out, grid.num_tokens, device)
    return Reduction.synthesise(x_MD, grid.num_tokens, matrix, anchor_M[None].to(device))


def _within(window_M: torch.Tensor, max_tokens: int | None) -> torch.Tensor:
    """Tokens that are left when every window loses as many at its end; then the first ones."""
    place_M = _arange(len(window_M))
    if max_tokens is None or len(window_M) <= max_tokens:
        return place_M
    size_W = torch.bincount(window_M)
    cut = math.ceil((len(window_M) - max_tokens) / len(size_W))
    # Equal windows would all vanish where fewer tokens may stay than there are windows.
    cut = min(cut, int(size_W.max()) - 1)
    end_W = size_W.cumsum(0) - cut
    return place_M[place_M < end_W[window_M]][:max_tokens]


def _sources(
    whole_TP: torch.Tensor,
    patch_TL: torch.Tensor,
    frame_E: torch.Tensor,
    place_E: torch.Tensor,
    static_E: torch.Tensor,
) -> torch.Tensor:
    """Places among all tokens of a static frame, or among the patches of another, as tokens."""
    whole_E = whole_TP[frame_E, place_E]
    return whole_E.where(static_E, patch_TL[frame_E, place_E.clamp(max=patch_TL.shape[1] - 1)])


def _pooled(
    row_E: torch.Tensor,
    column_E: torch.Tensor,
    weight_E: torch.Tensor,
    anchor_M: torch.Tensor,
    num_out: int,
    num_in: int,
    device: torch.device,
) -> Reduction:
    """A merge where no token feeds two others, else a sparse transform."""
    anchor_1M = anchor_M[None].to(device)
    if len(column_E.unique()) < len(column_E):
        matrix = _matrix(row_E, column_E, weight_E, num_out, num_in, device)
        return Reduction.transform(matrix, anchor_1M)
    assignment_N = torch.full((num_in,), -1, device="cpu")
    assignment_N[column_E] = row_E
    return Reduction.merge(assignment_N.to(device), num_out, anchor_BM=anchor_1M)


def _matrix(
    row_E: torch.Tensor,
    column_E: torch.Tensor,
    weight_E: torch.Tensor,
    num_out: int,
    num_in: int,
    device: torch.device,
) -> torch.Tensor:
    index = torch.stack([torch.zeros_like(row_E), row_E, column_E]).to(device)
    size = (1, num_out, num_in)
    made = torch.sparse_coo_tensor(index, weight_E.to(device), size, check_invariants=False)
    return made.coalesce()


def _compressed(
    x_ND: torch.Tensor,
    patch_TL: torch.Tensor,
    windows: Windows,
    weights: TDCWeights,
    frame_M: torch.Tensor,
    slot_M: torch.Tensor,
) -> torch.Tensor:
    """What a trained compressor makes of all frames but the static ones, [M, D]; 0 elsewhere."""
    device, L = x_ND.device, patch_TL.shape[1]
    x_MD = x_ND.new_zeros(len(frame_M), x_ND.shape[1])
    frame_T = _arange(len(patch_TL))
    # The static frame of each one's window; a window without one asks with the frame itself.
    first_T = torch.searchsorted(windows.window_T, windows.window_T)
    asks_T = first_T.where(windows.static_T[first_T], frame_T)
    for K in windows.count_T[~windows.static_T].unique().tolist():
        own_T = (windows.count_T == K) & ~windows.static_T
        chosen_f = frame_T[own_T]
        rank_T = own_T.cumsum(0) - 1
        place_M = own_T[frame_M] & (slot_M < K)
        if K == 0 or not place_M.any():
            continue
        static_fLD = x_ND[patch_TL[asks_T[chosen_f]].to(device)]
        query_fKD = ops.average_matrix(L, K, device).to(x_ND.dtype) @ static_fLD
        made_fKD = weights.compress(query_fKD, x_ND[patch_TL[chosen_f].to(device)])
        if made_fKD.shape != query_fKD.shape:
            raise ValueError(
                f"The compressor must give [f, K, D] = {tuple(query_fKD.shape)}, got "
                f"{tuple(made_fKD.shape)}."
            )
        flat_M = (rank_T[frame_M] * K + slot_M)[place_M].to(device)
        x_MD[place_M.to(device)] = made_fKD.flatten(0, 1)[flat_M].to(x_MD.dtype)
    return x_MD


@dataclass(frozen=True)
class TDC(Method):
    """TDC without its trained compressor: scenes, windows, whole first frames, pooled others.

    Scenes are cut where consecutive frames are least alike; inside each, every window keeps its
    first frame whole and averages each other frame to K tokens. Videos only; images pass
    untouched. O(N D).

    Args:
        max_cuts: cuts between scenes, so that there is at most one scene more.
        window: frames of a window, the whole one among them.
        context_tokens: K; None: a ninth of a frame's, the published 16 of 144.
        short_videos: of at most max_cuts + 1 frames: "cut" makes as many scenes as there would be
            windows without any cut; "whole" makes every frame a scene of its own, as the released
            code does, so that nothing is compressed.
        max_tokens: of a video at most; the same number is cut off the end of every window, then
            the rest from the end of the video. None: no limit.
        weights: a trained compressor and separator; None: pooling and no separators.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> method, grid = TDC(), Grid.video(224, 12, 12)
        >>> method.count(grid, Budget(retain=method.card.retain, published=True))
        Count(tokens=9856, exact=False)
        >>> method.count(grid, Budget(retain=0.1))
        Count(tokens=3226, exact=True)

    Source: arXiv 2504.10443, section 3.
    """

    max_cuts: int = 24
    window: int = 8
    context_tokens: int | None = None
    short_videos: Literal["cut", "whole"] = "cut"
    max_tokens: int | None = None
    weights: TDCWeights | None = field(default=None, repr=False)

    card: ClassVar[Card] = Card(
        name="tdc",
        title="TDC",
        paper="Multimodal Long Video Modeling Based on Temporal Dynamic Context",
        arxiv="2504.10443",
        year=2025,
        url="https://github.com/Hoar012/TDC-Video",
        licence="none named (the repository has no licence file)",
        stages=("projector",),
        kind="trained",
        summary="Cuts scenes, keeps the first frame of every window whole and leaves few tokens "
        "of each other frame.",
        defaults={
            "Qwen2-7B, Llama3.2-3B; 144 tokens a frame": "1 frame a second, at most 224 frames; 24 "
            "cuts, windows of 8, 16 tokens for each other frame: about 32 a frame",
        },
        headline=(
            "7B: MVBench 68.3, PerceptionTest 67.5, EgoSchema 65.7, MLVU 64.1, VideoMME 57.8",
            "3B: MVBench 62.7; without scenes 53.5, with 32 tokens per frame 61.7",
            "LVCoT, 7B: VideoMME with subtitles 65.9 to 66.2",
        ),
        notes=(
            "The published compressor (a Q-Former that reads the instruction) and its separators "
            "are trained with the model. Without them a frame is pooled to K tokens as the "
            "published queries are, and nothing separates frames; `TDC(weights=...)` takes both.",
            "Scenes are cut on what the projector made of the frames, the published ones on "
            "DINOv2 features.",
            "The paper's 24 scenes are 24 cuts, so 25 scenes, in its code: `max_cuts`. The code "
            'never compresses videos of up to 25 frames: short_videos="whole". A model shown '
            "fewer frames than that would gain nothing, so they are cut by default.",
            "A budget of the call is met exactly: the published proportion of it buys whole "
            "frames, the starts of scenes first and then those of the shortest windows that fit; "
            "the other frames share the rest evenly. It overrides K, window and, where it must, "
            "the number of cuts. Below one token a frame, evenly spaced frames have one.",
            "Without a budget the published settings hold, and the count is a bound: how many "
            "windows there are depends on where the cuts lie.",
            "Newlines of rows and [CLS] tokens stay with whole frames, those at the end of the "
            "item always; all come on top of the budget. Audio is not read.",
            "LVCoT, its way with videos of ten minutes and more, is foveate.view.think.",
        ),
        retain=32 / 144,
    )

    def __post_init__(self) -> None:
        if self.max_cuts < 0 or self.window < 1:
            raise ValueError(
                f"max_cuts must be at least 0 and window at least 1 frame, got {self.max_cuts} "
                f"and {self.window}."
            )
        for name in ("context_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 token (or None), got {value}.")
        if self.short_videos not in ("cut", "whole"):
            raise ValueError(f'short_videos must be "cut" or "whole", got {self.short_videos!r}.')

    # -- counts ---------------------------------------------------------------------------------

    def cuts(self, num_frames: int) -> int:
        """Cuts of a video, where no budget was asked for.

        Example:
            >>> TDC().cuts(224), TDC().cuts(16), TDC(short_videos="whole").cuts(16)
            (24, 1, 24)
        """
        if num_frames <= self.max_cuts + 1 and self.short_videos == "cut":
            return (num_frames - 1) // self.window
        return self.max_cuts

    def static_share(self, grid: Grid) -> float:
        """The part of a window's tokens that its whole frame has: 144 of 256 as published."""
        whole = grid.planes[0].num_patches
        return whole / (whole + (self.window - 1) * self._context(whole))

    def most_static(self, grid: Grid, keep: int) -> int:
        """Frames that stay whole at most, where the video may keep so many tokens."""
        T, L = len(grid.planes), grid.planes[0].num_patches
        if keep < T:
            return 0
        affordable = T if L == 1 else (keep - T) // (L - 1)
        return min(ops.round_half_even(self.static_share(grid) * keep / L), affordable, T)

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Tokens of all frames, newlines at the end and separators."""
        if self._leaves_alone(grid, budget):
            return Count(grid.num_tokens)
        T, plane = len(grid.planes), grid.planes[0]
        L, special = plane.num_patches, plane.num_tokens - plane.num_patches
        if budget.published:
            scenes = min(T, self.cuts(T) + 1)
            whole = most_windows(T, scenes, self.window)
            tokens, exact = whole * L + (T - whole) * self._context(L), scenes in (1, T)
            shown = T
        else:
            tokens = max(1, budget.count(grid.num_patches))
            whole, shown = self.most_static(grid, tokens), min(T, tokens)
            exact = not special
        if self.weights is not None and self.weights.sep_D is not None:
            tokens += shown
        tokens += whole * special
        if self.max_tokens is not None and tokens > self.max_tokens:
            tokens, exact = self.max_tokens, False
        return Count(tokens + grid.newlines_at_end, exact)

    def _leaves_alone(self, grid: Grid, budget: Budget) -> bool:
        if grid.modality == "image" or budget.is_full:
            return True
        return not budget.published and budget.count(grid.num_patches) >= grid.num_patches

    def _context(self, whole: int) -> int:
        context = self.context_tokens
        return min(whole, max(1, ops.round_half_even(whole / 9)) if context is None else context)

    # -- projector ------------------------------------------------------------------------------

    def windows(self, x_TLD: torch.Tensor, grid: Grid, budget: Budget) -> Windows:
        """The windows of a video and how many tokens its frames have."""
        T, L = x_TLD.shape[:2]
        whole = grid.planes[0].num_tokens
        if budget.published:
            bounds_S2 = ops.scene_segments(x_TLD, self.cuts(T)).cpu()
            static_T = static_frames(bounds_S2, self.window)
            count_T = torch.full((T,), self._context(L), device="cpu").masked_fill(static_T, whole)
            return Windows(static_T, static_T.cumsum(0) - 1, count_T)
        keep = max(1, budget.count(grid.num_patches))
        most = self.most_static(grid, keep)
        if most:
            bounds_S2 = ops.scene_segments(x_TLD, min(self.max_cuts, most - 1)).cpu()
            static_T = static_frames(bounds_S2, fitting_window(bounds_S2, most))
        else:
            static_T = torch.zeros(T, dtype=torch.bool, device="cpu")
        others = int((~static_T).sum())
        count_T = torch.full((T,), whole, device="cpu")
        # Spread evenly, so that frames without a token, too, lie evenly.
        edge = _arange(others + 1) * (keep - (T - others) * L) // max(others, 1)
        count_T[~static_T] = edge.diff()
        return Windows(static_T, (static_T.cumsum(0) - 1).clamp(min=0), count_T)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Cut scenes, keep the first frames of windows and compress the others.

        Raises:
            ValueError: the frames differ in size.
        """
        grid, budget = context.grid, context.budget
        if self._leaves_alone(grid, budget):
            return None
        x_TLD = frames_of(tokens, grid, self.name)
        windows = self.windows(x_TLD, grid, budget)
        L = x_TLD.shape[1]
        context.note(
            "windows",
            lambda: windows.window_T.repeat_interleave(L),
            "label",
            "the first frame of each stays whole",
        )
        context.note("whole frames", lambda: windows.static_T.repeat_interleave(L), "mark")
        if self.weights is None and self.max_tokens is None and windows.static_T.all():
            return None
        return lay_out(tokens, grid, windows, self.weights, self.max_tokens)
