"""Free Video-LLM: detail of the frames and the region the prompt is about, a coarse view of all.

Legend: T frames, F chosen frames, H and W patches of a frame, L = H W, D channels, E channels of
the space of text and pictures, P pooled patches (p one of them), B patches of a box, M tokens out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
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

Layout = Literal["true", "code"]
PUBLISHED = (
    "slow_3frms_spatial_1d_max_pool_roi8-middle_5frms_spatial_1d_max_pool_24x12-fast_50frms_4x4"
)
_SPEC = re.compile(
    r"slow_(\d+)frms_(\w+?)_roi(\d+)-middle_(\d+)frms_(\w+?)_(\d+)x(\d+)-fast_(\d+)frms_(\d+)x(\d+)"
)
_POOL = "spatial_1d_max_pool"


@dataclass(frozen=True)
class Paths:
    """The three paths: frames of each, the region of the first two and the grid of the last.

    Args:
        slow: frames that the text chooses, pooled in pairs and cropped.
        middle: evenly spaced frames, likewise.
        fast: frames pooled to `rows` x `columns` without a crop.
        rows, columns: of a frame of the fast path.
        roi: area of the crop in tenths of the frame, 1 to 10; 10 crops nothing.

    Example:
        >>> paths = Paths.parse(PUBLISHED)
        >>> paths
        Paths(slow=3, middle=5, fast=50, rows=4, columns=4, roi=8)
        >>> paths.num_tokens(pooled_shape(24, 24))
        2648
    """

    slow: int
    middle: int
    fast: int
    rows: int
    columns: int
    roi: int

    @classmethod
    def parse(cls, spec: str) -> Paths:
        """Read a spec as the released configurations write it.

        Raises:
            ValueError: it is no such text, names another pooling, or numbers that make no tokens.
        """
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise ValueError(
                f"Cannot read the spec {spec!r}; write it like {PUBLISHED!r}: frames, pooling and "
                "region of the slow path, frames, pooling and (unused) size of the middle one, "
                "frames and grid of the fast one."
            )
        slow, pool, roi, middle, other, _, _, fast, rows, columns = match.groups()
        for name in (pool, other):
            if name != _POOL:
                raise ValueError(f"The only pooling is {_POOL}, got {name!r} in {spec!r}.")
        paths = cls(*map(int, (slow, middle, fast, rows, columns, roi)))
        if not 1 <= paths.roi <= 10:
            raise ValueError(f"roi is in tenths of a frame, 1 to 10, got {paths.roi} in {spec!r}.")
        if min(paths.rows, paths.columns) < 1:
            raise ValueError(f"The fast grid needs a row and a column, got {spec!r}.")
        if paths.slow + paths.middle + paths.fast < 1:
            raise ValueError(f"A spec needs a frame, got {spec!r}.")
        return paths

    def box(self, pooled: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the crop of a frame of `pooled` rows and columns."""
        side = math.sqrt(self.roi / 10)
        height, width = (max(1, round(length * side)) for length in pooled)
        return height, width

    def num_tokens(self, pooled: tuple[int, int]) -> int:
        """Tokens of all paths."""
        detail = math.prod(self.box(pooled))
        return (self.slow + self.middle) * detail + self.fast * self.rows * self.columns

    def clipped(self, frames: int, height: int, width: int) -> Paths:
        """At most the frames, rows and columns there are."""
        slow, middle, fast = (min(n, frames) for n in (self.slow, self.middle, self.fast))
        return Paths(slow, middle, fast, min(self.rows, height), min(self.columns, width), self.roi)

    def scaled(self, keep: int, shape: tuple[int, int, int], pooled: tuple[int, int]) -> Paths:
        """The same mixture for `keep` tokens: the nearest that is not above.

        The fast path gets its share of the tokens and the finest grid of its form that fits in;
        what cannot be had at one token a frame is one token a frame, of fewer frames if it must be.
        The rest goes into whole slow and middle frames in the proportion of the spec, at least one
        of them slow; and what is left over into the fast grid.

        Args:
            keep: tokens, at least 1.
            shape: frames, rows and columns of the video.
            pooled: rows and columns of a pooled frame.

        Example:
            >>> paths, shape = Paths.parse(PUBLISHED), (50, 24, 24)
            >>> paths.scaled(2648, shape, pooled_shape(24, 24)) == paths
            True
            >>> paths.scaled(2000, shape, pooled_shape(24, 24))
            Paths(slow=2, middle=4, fast=50, rows=3, columns=3, roi=8)
            >>> paths.scaled(30, shape, pooled_shape(24, 24))
            Paths(slow=0, middle=0, fast=30, rows=1, columns=1, roi=8)
        """
        frames, height, width = shape
        base, detail = self.clipped(*shape), math.prod(self.box(pooled))
        overview = base.fast * base.rows * base.columns
        share = keep * overview // base.num_tokens(pooled)
        fast = min(base.fast, keep)
        paths = replace(base, fast=fast)._with_grid(self._grid(fast, share, height, width))
        wanted = base.slow + base.middle
        num = (keep - fast * paths.rows * paths.columns) // detail if wanted else 0
        slow = ops.round_half_even(num * base.slow / wanted) if num else 0
        slow = min(max(slow, min(base.slow, num, 1)), frames)
        middle = min(num - slow, frames) if base.middle else 0
        slow = min(num - middle, frames) if base.slow else 0
        left = keep - (slow + middle) * detail
        grid = self._grid(fast, left, height, width)
        return replace(paths, slow=slow, middle=middle)._with_grid(grid)

    def _with_grid(self, grid: tuple[int, int]) -> Paths:
        return replace(self, rows=grid[0], columns=grid[1])

    def _grid(self, frames: int, tokens: int, height: int, width: int) -> tuple[int, int]:
        """The finest grid of this form of which so many frames make at most so many tokens."""
        grids = [
            (min(rows, height), min(max(1, round(rows * self.columns / self.rows)), width))
            for rows in range(1, max(height, width) + 1)
        ]
        fitting = [grid for grid in grids if frames * math.prod(grid) <= tokens]
        return max(fitting, key=math.prod, default=(1, 1))


def pooled_shape(height: int, width: int, layout: Layout = "true") -> tuple[int, int]:
    """Rows and columns of a frame whose patches are pooled in pairs along its rows.

    "code" is what the released code takes them for: half the rows and all columns. A last column
    without a partner stays alone.

    Raises:
        ValueError: "code" and an odd number of rows.

    Example:
        >>> pooled_shape(24, 24), pooled_shape(24, 24, "code"), pooled_shape(3, 5)
        ((24, 12), (12, 24), (3, 3))
    """
    if layout == "true":
        return height, -(-width // 2)
    if height % 2:
        raise ValueError(
            f'layout="code" takes two rows of patches for one, and {height} rows are odd; use '
            'layout="true".'
        )
    return height // 2, width


def partners(height: int, width: int, layout: Layout = "true") -> torch.Tensor:
    """The two patches that make every pooled one, int64 [P, 2]; the same twice for one alone.

    Example:
        >>> partners(1, 3).tolist(), partners(2, 3, "code").tolist()
        ([[0, 1], [2, 2]], [[0, 1], [2, 3], [4, 5]])
    """
    if layout == "code":
        return torch.arange(height * width, device="cpu").view(-1, 2)
    column_p = torch.arange(0, width, 2, device="cpu")
    pair_p2 = torch.stack([column_p, (column_p + 1).clamp(max=width - 1)], dim=1)
    return (torch.arange(height, device="cpu")[:, None, None] * width + pair_p2).flatten(0, 1)


def top_change_frames(x_TLD: torch.Tensor, num: int) -> torch.Tensor:
    """The first frame and those least like the frame before (cosine of mean features), int64 [num].

    Ascending. O(T L D). In the released code, but not called there.
    """
    mean_TD = x_TLD.mean(1, dtype=torch.float32)
    change_T = -torch.nn.functional.cosine_similarity(mean_TD[1:], mean_TD[:-1], dim=1)
    return ops.top_k(torch.cat([change_T.new_full((1,), torch.inf), change_T]), num)


def middle_frames(num_frames: int, num: int) -> list[int]:
    """Frames at equal distances from the first on, as published.

    Example:
        >>> middle_frames(50, 5), middle_frames(10, 3)
        ([0, 10, 20, 30, 40], [0, 3, 6])
    """
    return [int(i * (num_frames / num)) for i in range(num)]


def region_boxes(
    similarity_FP: torch.Tensor, pooled: tuple[int, int], box: tuple[int, int], roi: int
) -> torch.Tensor:
    """The box of every frame around what is most like the text: (left, top) int64 [F, 2].

    Its centre is the mean place of the `roi` tenths of most similar pooled patches, cut to whole
    numbers; boxes are shifted into the frame, not shrunk. O(F P log P).

    Args:
        similarity_FP: of the text with every pooled patch.
        pooled: rows and columns of a pooled frame.
        box: rows and columns of the box.
        roi: tenths of a frame.

    Source: the released code of Free Video-LLM (arXiv 2410.10441).
    """
    (height, width), (rows, columns) = pooled, box
    top_FK = ops.top_k(similarity_FP, max(1, height * width * roi // 10))
    size_2 = top_FK.new_tensor([columns, rows])
    place_FK2 = torch.stack([top_FK % width, top_FK // width], dim=2)
    centre_F2 = place_FK2.sum(1) // top_FK.shape[1]
    most_2 = top_FK.new_tensor([width, height]) - size_2
    return (centre_F2 - size_2 // 2).clamp(min=0).minimum(most_2)


@dataclass(frozen=True)
class FreeVideoLLM(Method):
    """Free Video-LLM: text-guided frames and regions, a few even frames, a coarse view of all.

    Videos only; images pass untouched. A frame may stand in several paths, so its content comes
    more than once. O(T N (D + E)).

    Args:
        spec: frames, regions and grids of the three paths, as the released configurations write
            it. A budget of the call scales it, see `Paths.scaled`.
        layout: "true" crops pooled frames as they lie (24 rows of 12 columns); "code" reads them as
            12 rows of 24, as the released code does.
        choose_by: what chooses the frames of the slow path: "text", or "change" (the first and
            those least like the frame before).

    Raises:
        ValueError: the spec cannot be read, or a value is unknown.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> grid = Grid.video(50, 24, 24)
        >>> FreeVideoLLM().count(grid, Budget(retain=0.1, published=True)).tokens
        2648
        >>> FreeVideoLLM().count(grid, Budget(tokens=1000))
        Count(tokens=893, exact=True)

    Source: arXiv 2410.10441.
    """

    spec: str = PUBLISHED
    layout: Layout = "true"
    choose_by: Literal["text", "change"] = "text"

    card: ClassVar[Card] = Card(
        name="free_video_llm",
        title="Free Video-LLM",
        paper="Free Video-LLM: Prompt-guided Visual Perception for Efficient Training-free Video "
        "LLMs",
        arxiv="2410.10441",
        year=2024,
        url="https://github.com/contrastive/FreeVideoLLM",
        licence="MIT",
        stages=("projector",),
        kind="training-free",
        summary="Spends detail on the frames and the region that the prompt is about, beside a few "
        "even frames and a very coarse view of all.",
        defaults={
            "LLaVA-v1.6 7B and 34B": "50 frames of 24 x 24; 3 slow and 5 middle frames of 231 "
            "tokens (region 0.8), 50 fast ones of 4 x 4: 2648 tokens",
        },
        headline=(
            "Competitive with training-free video LLMs on MSVD-QA, MSRVTT-QA, TGIF-QA and "
            "ActivityNet-QA with fewer tokens and a faster prefill (abstract)",
        ),
        notes=(
            "Frames are chosen among those that were encoded, as in the released code, whose fast "
            "path needs them all. The frames to read, 50 from the middle of equal stretches, are "
            "`foveate.methods.ts_llava.frame_indices(num_source, 50)`.",
            "Without a budget the published spec holds, clipped to the frames, rows and columns "
            "there are; where it would have more tokens than the video, the video is left alone. "
            "With a budget it is scaled to the nearest mixture that is not above.",
            "Images are left alone: there are no frames to choose from.",
            "Give a CLIP-like model with foveate.reduce(..., companion=foveate.Companion(...)) for "
            "the published choice. Without one, frames and patches are compared with the mean "
            "embedding of the instruction's tokens in the language model's space.",
            "The released code reads pooled frames of 24 x 12 as 12 x 24, so that a row of its box "
            'holds two rows of patches side by side: layout="code". The default is the true '
            "layout.",
            'choose_by="change" is a rule that the released code has and does not call.',
            "The larger of two neighbouring patches, channel by channel, is no weighted sum: "
            "provenance and deepstack features of such a token are the mean of the two.",
            "Newlines that close an item stay, on top of the budget; those of rows and [CLS] "
            "tokens go. Dynamic rotary scaling (context 4096 to 8192) is the model's affair, and "
            "the sentence about key frames the prompt's.",
        ),
        retain=2648 / 28800,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = (
        "text.frame_similarity",
        "paired.text",
        "paired.patches",
    )

    def __post_init__(self) -> None:
        Paths.parse(self.spec)
        if self.layout not in ("true", "code"):
            raise ValueError(f'layout must be "true" or "code", got {self.layout!r}.')
        if self.choose_by not in ("text", "change"):
            raise ValueError(f'choose_by must be "text" or "change", got {self.choose_by!r}.')

    def paths(self, grid: Grid, budget: Budget) -> Paths | None:
        """The paths of a video; None leaves it alone.

        Raises:
            ValueError: its frames differ in size, or `layout` does not fit them.
        """
        if grid.modality == "image" or budget.is_full:
            return None
        T, H, W = grid.shape
        pooled, paths = pooled_shape(H, W, self.layout), Paths.parse(self.spec)
        if budget.published:
            paths = paths.clipped(T, H, W)
            return paths if paths.num_tokens(pooled) < grid.num_patches else None
        keep = max(1, budget.count(grid.num_patches))
        return paths.scaled(keep, (T, H, W), pooled) if keep < grid.num_patches else None

    def count(self, grid: Grid, budget: Budget) -> Count:
        """The tokens of all paths and the newlines at the end; exact."""
        paths = self.paths(grid, budget)
        if paths is None:
            return Count(grid.num_tokens)
        _, H, W = grid.shape
        return Count(paths.num_tokens(pooled_shape(H, W, self.layout)) + grid.newlines_at_end)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Choose frames and boxes, pool, and join the paths.

        Raises:
            ValueError: the frames differ in size.
        """
        grid, device = context.grid, tokens.device
        paths = self.paths(grid, context.budget)
        if paths is None:
            return None
        x_TLD = frames_of(tokens, grid, self.name)
        T, H, W = grid.shape
        patch_TL = grid.patch_index(device).view(T, -1)

        slow_F = self._choose(x_TLD, paths.slow, context)
        middle_F = torch.tensor(middle_frames(T, paths.middle), dtype=torch.long, device=device)
        detail_F = torch.cat([slow_F, middle_F])
        fast_F = self._choose(x_TLD, paths.fast, context)
        context.note("slow frames", lambda: [(t, t) for t in slow_F.tolist()], "frames")

        pair_FB2 = self._pairs(detail_F, paths, context, patch_TL)
        x_ND = tokens.x_BND[0]
        sharp_MD = torch.maximum(x_ND[pair_FB2[..., 0]], x_ND[pair_FB2[..., 1]]).flatten(0, 1)
        row_hH, column_wW = (
            ops.average_matrix(*sizes, device) for sizes in ((H, paths.rows), (W, paths.columns))
        )
        x_FHWD = x_TLD.index_select(0, fast_F).float().unflatten(1, (H, W))
        x_FhWD = (row_hH @ x_FHWD.flatten(2)).unflatten(2, (W, -1))
        coarse_MD = (column_wW @ x_FhWD).flatten(0, 2).to(x_ND.dtype)

        cell_CL = torch.kron(row_hH, column_wW)
        end_E = torch.arange(tokens.num_tokens - grid.newlines_at_end, tokens.num_tokens)
        end_E = end_E.to(device)
        anchor_C = self._anchors(H, W, paths, device)
        anchor_M = torch.cat(
            [pair_FB2[..., 0].flatten(), patch_TL[fast_F][:, anchor_C].flatten(), end_E]
        )
        matrix_1MN = _provenance(pair_FB2.flatten(0, 1), patch_TL[fast_F], cell_CL, end_E, tokens)
        features_1MD = torch.cat([sharp_MD, coarse_MD, x_ND[end_E]])[None]
        return Reduction.synthesise(features_1MD, tokens.num_tokens, matrix_1MN, anchor_M[None])

    def _choose(self, x_TLD: torch.Tensor, num: int, context: ProjectorContext) -> torch.Tensor:
        """Frames by text or change, in the order of time, int64 [num]."""
        if num >= len(x_TLD) or num == 0:
            return torch.arange(num, device=x_TLD.device)
        if self.choose_by == "change":
            return top_change_frames(x_TLD, num)
        return ops.top_k(context.signal("text.frame_similarity")[0], num)

    def _pairs(
        self,
        detail_F: torch.Tensor,
        paths: Paths,
        context: ProjectorContext,
        patch_TL: torch.Tensor,
    ) -> torch.Tensor:
        """The two tokens that make every token of the slow and middle frames, int64 [F, B, 2]."""
        _, H, W = context.grid.shape
        device, pooled = patch_TL.device, pooled_shape(H, W, self.layout)
        box, pair_P2 = paths.box(pooled), partners(H, W, self.layout).to(device)
        left_top_F2 = detail_F.new_zeros(len(detail_F), 2)
        if paths.roi < 10 and len(detail_F):
            text_E = context.signal("paired.text")[0]
            shown_FLE = context.signal("paired.patches")[0][patch_TL[detail_F]]
            shown_FPE = torch.maximum(shown_FLE[:, pair_P2[:, 0]], shown_FLE[:, pair_P2[:, 1]])
            similarity_FP = ops.cosine_similarity_matrix(
                shown_FPE, text_E.expand(len(detail_F), 1, -1)
            )
            left_top_F2 = region_boxes(similarity_FP[..., 0], pooled, box, paths.roi)
            if self.layout == "true":
                context.note("region", lambda: _cells(detail_F, left_top_F2, box, W), "boxes")
        row_b = torch.arange(box[0], device=device)[:, None]
        column_b = torch.arange(box[1], device=device)
        left_F, top_F = left_top_F2[:, 0, None, None], left_top_F2[:, 1, None, None]
        place_FB = ((top_F + row_b) * pooled[1] + left_F + column_b).flatten(1)
        frame_F11 = detail_F[:, None, None]
        return patch_TL[frame_F11, pair_P2[place_FB]]

    @staticmethod
    def _anchors(H: int, W: int, paths: Paths, device: torch.device) -> torch.Tensor:
        """The middle patch of every cell of the fast grid."""
        row_h, column_w = (
            (torch.arange(num, device=device) * 2 + 1) * length // (2 * num)
            for length, num in ((H, paths.rows), (W, paths.columns))
        )
        return (row_h[:, None] * W + column_w).flatten()


def _provenance(
    pair_M2: torch.Tensor,
    source_FL: torch.Tensor,
    cell_CL: torch.Tensor,
    end_E: torch.Tensor,
    tokens: Tokens,
) -> torch.Tensor:
    """What feeds every token, as a sparse matrix [1, M, N] of averages."""
    device = source_FL.device
    cell_K, place_K = cell_CL.nonzero(as_tuple=True)
    num, cells = len(pair_M2), len(cell_CL)
    first_F1 = num + cells * torch.arange(len(source_FL), device=device)[:, None]
    end = num + cells * len(source_FL)
    size = (1, end + len(end_E), tokens.num_tokens)
    row = torch.cat(
        [
            torch.arange(num, device=device).repeat_interleave(2),
            (first_F1 + cell_K).flatten(),
            end + torch.arange(len(end_E), device=device),
        ]
    )
    column = torch.cat([pair_M2.flatten(), source_FL[:, place_K].flatten(), end_E])
    weight = torch.cat(
        [
            torch.full((2 * num,), 0.5, device=device),
            cell_CL[cell_K, place_K].repeat(len(source_FL)),
            torch.ones(len(end_E), device=device),
        ]
    )
    index = torch.stack([torch.zeros_like(row), row, column])
    return torch.sparse_coo_tensor(index, weight, size, check_invariants=False).coalesce()


def _cells(
    frame_F: torch.Tensor, left_top_F2: torch.Tensor, box: tuple[int, int], width: int
) -> list[tuple[int, int, int, int, int]]:
    """Boxes as (plane, top, left, bottom, right) in patches."""
    rows, columns = box
    return [
        (plane, top, 2 * left, top + rows, min(2 * (left + columns), width))
        for plane, (left, top) in zip(frame_F.tolist(), left_top_F2.tolist(), strict=True)
    ]
