"""VFlowOpt: attention relevance and entropy rank visual tokens; what goes is recycled in part.

Legend: I images (frames, tiles) of an item, T planes of it, P patches of an image, N tokens of an
item or visual tokens of a sample, M tokens that stay, h and w pixels.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    DecoderContext,
    EncoderAttentionView,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    SearchRange,
    TokenKind,
    Tokens,
    relative_layer,
)

#: The published cuts come before layers 9 and 18 of 28.
_CUTS, _DEPTH = (9, 18), 28
_LEVELS = 256


@dataclass(frozen=True)
class Setting:
    """What was found for one mean share of visual tokens on LLaVA-OneVision-7B.

    Attributes:
        threshold: t, in multiples of the mean attention that a patch receives.
        alpha: weight of the entropy.
        cell: m, side of a recycling cell in tokens.
        keep_input: r_v, share of the tokens that enters the language model.
        keep_first: r_1, share of them that stays at the first cut.
    """

    threshold: float
    alpha: float
    cell: float
    keep_input: float
    keep_first: float


#: Published settings by budget; the share at the second cut follows from the budget.
PRESETS: Mapping[float, Setting] = {
    0.1: Setting(39.265, 0.0, 17.387, 0.11662, 1.0),
    0.25: Setting(34.760, 0.0, 15.581, 0.26510, 0.98334),
    0.5: Setting(28.683, 0.0, 11.757, 0.72332, 0.74875),
}


def attention_relevance(view: EncoderAttentionView, threshold: float) -> torch.Tensor:
    """What the globally important patches look at together, float32 [I, P].

    Important are patches that receive more than `threshold` times the mean attention of their
    image; where none does, all are. O(H P^2 d) time, O(P) memory: no attention matrix is stored.

    Source: VFlowOpt, importance map (arXiv 2508.05211).
    """
    received_IP = view.received()
    important_IP = received_IP > threshold * received_IP.mean(1, keepdim=True)
    some_I1 = important_IP.any(1, keepdim=True)
    # The mean over all rows is what every patch receives, which is known already.
    return torch.where(some_I1, view.mean_rows(important_IP), received_IP)


def patch_entropy(picture_T3hw: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Shannon entropy of the grey levels in every cell of a picture, in bits, [T, rows * columns].

    Args:
        picture_T3hw: values from 0 to 255; grey is the rounded mean of the three channels.
        rows, columns: cells; a pixel belongs to the cell that holds its upper left corner.

    Example:
        >>> black_and_white = torch.tensor([0, 255]).repeat(1, 3, 4, 4)
        >>> patch_entropy(black_and_white, 1, 2).tolist()
        [[1.0, 1.0]]
    """
    T, _, h, w = picture_T3hw.shape
    device = picture_T3hw.device
    grey_Thw = picture_T3hw.float().mean(1).round().long()
    row_h1 = torch.arange(h, device=device)[:, None] * rows // h
    column_w = torch.arange(w, device=device) * columns // w
    plane_T11 = torch.arange(T, device=device)[:, None, None]
    cell_Thw = (plane_T11 * rows + row_h1) * columns + column_w
    num = T * rows * columns
    count = (cell_Thw * _LEVELS + grey_Thw).flatten().bincount(minlength=num * _LEVELS)
    count = count.view(num, _LEVELS).float()
    share = count / count.sum(1, keepdim=True).clamp_min(1)
    return (torch.special.entr(share).sum(1) / math.log(2)).view(T, -1)


def recycle(importance_N: torch.Tensor, grid: Grid, keep: float, cell: float) -> Reduction:
    """Drop the least important patches and average those that share a coarse cell of their plane.

    `round(N * (1 - keep))` tokens go, and `N / cell^2` more whose places the averages take; an
    average stands at the most important token of its cell. About `keep` stays. O(N log N).

    Args:
        importance_N: one number per token of the item.
        grid: its layout; [CLS] and newline tokens always stay as they are.
        keep: share of the tokens that stays, r_v.
        cell: side of a cell in tokens, m; need not be whole.

    Example:
        >>> importance_N = torch.tensor([9.0, 1.0, 3.0, 8.0])
        >>> recycle(importance_N, Grid.image(1, 4), 0.5, 4.0).matrix().tolist()
        [[[1.0, 0.0, 0.0, 0.0], [0.0, 0.25, 0.75, 0.0], [0.0, 0.0, 0.0, 1.0]]]

    Source: VFlowOpt, prune and recycle (arXiv 2508.05211).
    """
    N, device = grid.num_tokens, importance_N.device
    patch_P = grid.patch_index(device)
    order_P = patch_P[importance_N[patch_P].argsort(descending=True, stable=True)]
    low_K = order_P[grid.num_patches - _num_low(grid, keep, cell) :]

    position_K3 = grid.positions(device)[low_K]
    height = max(plane.height for plane in grid.planes)
    width = max(plane.width for plane in grid.planes)
    row_K, column_K = (position_K3[:, 1:].double() / cell).long().unbind(1)
    key_K = (position_K3[:, 0] * height + row_K) * width + column_K

    # Tokens come by falling importance, so the first of a cell is its most important one.
    rank_K = torch.arange(len(low_K), device=device)
    blank = torch.full((len(grid.planes) * height * width,), N, device=device)
    anchor_K = low_K[blank.scatter_reduce(0, key_K, rank_K, "amin")[key_K]]
    home_N = torch.arange(N, device=device)
    home_N[low_K] = anchor_K
    kept_M = (home_N == torch.arange(N, device=device)).nonzero()[:, 0]
    slot_N = torch.empty(N, dtype=torch.long, device=device)
    slot_N[kept_M] = torch.arange(len(kept_M), device=device)

    # A negative weight of the entropy can make importances negative: those count nothing.
    weight_N = torch.ones(N, device=device)
    weight_N[low_K] = importance_N[low_K].float().clamp_min(0)
    total_N = torch.zeros(N, device=device).scatter_add_(0, home_N, weight_N)
    weight_N = weight_N.where(total_N[home_N] > 0, 1.0)
    return Reduction.merge(slot_N[home_N], len(kept_M), weight_N, kept_M)


def _num_low(grid: Grid, keep: float, cell: float) -> int:
    """Tokens that are dropped or averaged."""
    N = grid.num_tokens
    return min(round(N * (1 - keep)) + int(N / cell**2), grid.num_patches)


@dataclass(frozen=True)
class VFlowOpt(Method):
    """VFlowOpt: one importance map of the encoder prunes before the LLM and twice inside it.

    `retain` is the mean share of visual tokens over all decoder layers. Arguments left at None come
    from the published setting of the nearest budget. `foveate tune` searches them for a model.

    Args:
        threshold: t; patches that receive more than t times the mean attention are important.
        alpha: weight of the entropy of a patch's pixels.
        cell: m, side of a recycling cell in tokens.
        keep_input: r_v, share of the tokens that enters the language model.
        keep_first: r_1, share of them that stays at the first cut; that of the second follows.
        layers: the two layers before which tokens go: indices, or fractions of the depth.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> layers, (first, second) = VFlowOpt().schedule(0.25, 28)
        >>> layers, first, round(second, 5)
        ((9, 18), 0.98334, 0.87)
        >>> VFlowOpt().share_entering(0.1), VFlowOpt().decoder_layers(5)
        (0.11662, (2, 3))

    Source: arXiv 2508.05211.
    """

    threshold: float | None = None
    alpha: float | None = None
    cell: float | None = None
    keep_input: float | None = None
    keep_first: float | None = None
    layers: tuple[int | float, ...] | None = None

    card: ClassVar[Card] = Card(
        name="vflowopt",
        title="VFlowOpt",
        paper="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided "
        "Optimization",
        arxiv="2508.05211",
        year=2025,
        url="https://github.com/sihany077/VFlowOpt",
        licence="CC BY-NC 4.0",
        stages=("projector", "decoder"),
        kind="training-free",
        summary="Prunes by attention relevance and entropy, averages what goes per coarse cell, "
        "and cuts twice more in the LLM by the same map; its settings are searched.",
        defaults={
            "LLaVA-OneVision-7B, retain 0.5": "t 28.683, alpha 0, m 11.757, r_v 0.72332, "
            "r_1 0.74875, r_2 0.487",
            "LLaVA-OneVision-7B, retain 0.25": "t 34.760, alpha 0, m 15.581, r_v 0.26510, "
            "r_1 0.98334, r_2 0.87733",
            "LLaVA-OneVision-7B, retain 0.1": "t 39.265, alpha 0, m 17.387, r_v 0.11662, r_1 1, "
            "r_2 0.6011",
        },
        headline=(
            "Prunes 90 % of the visual tokens at about 90 % of the original score (README)",
            "KV cache 89 % smaller, inference 3.8 times faster (abstract)",
        ),
        notes=(
            "The released code is CC BY-NC; this was written from a description of it.",
            "Ours: threshold, alpha and cell are those of the nearest published budget. r_v / "
            "retain and r_1 lie on straight lines between the published budgets, below 0.1 they "
            "stay, above 0.5 they go to 1; r_2 is solved from the budget: 0.483, 0.870 and 0.601, "
            "where the published r_2 leave 0.501, 0.251 and 0.1 on average.",
            "The cuts lie at 9/28 and 18/28 of any depth, and the budget counts the layers between "
            "them there. Where a setting would exceed the budget, the later shares fall, down to "
            "one token; where r_2 would exceed 1 it is 1, and less than the budget stays.",
            "tokens=512 stands for the mean share 512 / tokens of each item.",
            "The map comes from the block whose output becomes the features. No patch above the "
            "threshold: all are important (the released code gives NaN). The published thresholds "
            "are for 729 patches; with few of them none can pass.",
            "Entropy is off in every published setting. It is taken from the pictures of the "
            "item's planes, stretched from the darkest value to the brightest: for one mean and "
            "deviation in all channels and a picture of full range these are the de-normalised "
            "0..255 values, else the levels lie further apart. The released code wraps negative "
            "values instead. A token's cell of the unpadded picture stands for the patch of a "
            "tile, and the softmax runs over a plane, scaled to the mean over a tile.",
            "Recycling is for the single image of a prompt, as released; videos and several images "
            "keep the best tokens of every item. Planes never mix.",
            "Newline and [CLS] tokens have importance 1. In recycling they always stay, and a "
            "video keeps at least one patch beside them.",
            "Negative importances (alpha below 0) count as 0 in an average; where all are, the "
            "mean is taken.",
        ),
        retain=0.25,
    )

    @property
    def needs(self) -> tuple[str | tuple[str, ...], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The pictures, where the entropy has a weight."""
        return ("encoder.pixels",) if self.alpha else ()

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold is a multiple of the mean, >= 0, got {self.threshold}.")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, got {self.alpha}.")
        if self.cell is not None and not self.cell >= 1:
            raise ValueError(f"cell is a side in tokens, at least 1, got {self.cell}.")
        for name in ("keep_input", "keep_first"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is a share of the tokens in (0, 1], got {value}.")
        if self.layers is not None and len(self.layers) != len(_CUTS):
            raise ValueError(f"layers names two layers, got {self.layers}.")

    # -- budget ---------------------------------------------------------------------------------

    def setting(self, share: float) -> Setting:
        """All five numbers for a mean share of visual tokens, in (0, 1).

        Example:
            >>> VFlowOpt(alpha=0.5).setting(0.2).alpha, VFlowOpt().setting(0.2).cell
            (0.5, 15.581)
        """
        near = PRESETS[min(PRESETS, key=lambda budget: abs(budget - share))]
        ratio, first = _between(share)

        def own(name: str, found: float) -> float:
            value = getattr(self, name)
            return found if value is None else value

        return Setting(
            own("threshold", near.threshold),
            own("alpha", near.alpha),
            own("cell", near.cell),
            own("keep_input", min(1.0, ratio * share)),
            own("keep_first", first),
        )

    def share_entering(self, share: float) -> float:
        """r_v for a mean share of visual tokens."""
        return self.setting(share).keep_input

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """The layers before which tokens go; models of fewer than three layers have fewer.

        Raises:
            ValueError: a layer does not exist, is the first, or does not come after the one before.

        Example:
            >>> VFlowOpt().cuts(28), VFlowOpt().cuts(32), VFlowOpt().cuts(4), VFlowOpt().cuts(2)
            ((9, 18), (10, 21), (1, 3), (1,))
        """
        if self.layers is not None:
            found = tuple(relative_layer(layer, num_layers, "layers") for layer in self.layers)
            if any(b <= a for a, b in pairwise((0, *found))):
                raise ValueError(
                    f"layers = {self.layers} are {found} of {num_layers}; they must rise, and what "
                    "enters layer 0 is keep_input's to say."
                )
            return found
        cuts: list[int] = []
        for layer in _CUTS:
            least = cuts[-1] + 1 if cuts else 1
            cuts.append(max(least, round(layer * num_layers / _DEPTH)))
        return tuple(cut for cut in cuts if cut < num_layers)

    def schedule(self, share: float, num_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The layers before which tokens go, and the share of those present that stays at each.

        The last share makes the mean over all layers `share`, where that is possible.

        Example:
            >>> layers, (first, second) = VFlowOpt().schedule(0.5, 28)
            >>> layers, first, round(second, 3)
            ((9, 18), 0.74875, 0.483)
        """
        cuts, setting = self.cuts(num_layers), self.setting(share)
        lengths = [b - a for a, b in pairwise((0, *cuts, num_layers))]
        left, present = share * num_layers - lengths[0] * setting.keep_input, setting.keep_input
        kept: list[float] = []
        for number, length in enumerate(lengths[1:], 1):
            wanted = setting.keep_first if number < len(cuts) else 1.0
            affordable = max(0.0, left) / (length * present) if present else 0.0
            kept.append(min(wanted, affordable))
            present *= kept[-1]
            left -= length * present
        return cuts, tuple(kept)

    def search_space(self, share: float) -> Mapping[str, SearchRange]:
        """The published box for a budget of 0.25, its r_v in proportion to the budget."""
        return {
            "threshold": SearchRange(0.0, 50.0),
            "alpha": SearchRange(-1.0, 1.0),
            "cell": SearchRange(3.0, 24.0),
            "keep_input": SearchRange(share, min(1.0, 1.5 * share)),
            "keep_first": SearchRange(8 / 15, 1.0),
        }

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Exact for videos; of images a bound, since empty cells and several images are unknown."""
        if budget.is_full:
            return Count(grid.num_tokens)
        setting = self.setting(budget.fraction(grid.num_tokens))
        best = _num_best(grid, setting.keep_input)
        if grid.modality == "video":
            return Count(best)
        low = _num_low(grid, setting.keep_input, setting.cell)
        cells = sum(
            math.ceil(plane.height / setting.cell) * math.ceil(plane.width / setting.cell)
            for plane in grid.planes
        )
        return Count(max(best, grid.num_tokens - low + min(low, cells)), exact=False)

    # -- stages ---------------------------------------------------------------------------------

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int]:
        """The block that makes the features."""
        return (feature_layer,)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Prune and recycle one image, or keep the best tokens of a video or of one of several."""
        if context.budget.is_full:
            return None
        grid, N = context.grid, tokens.num_tokens
        share = context.budget.fraction(N)
        setting = self.setting(share)
        importance_N = self.importance(context, setting)
        context.carry("importance", importance_N)
        context.note("importance", importance_N, "heat", "What both cuts in the LLM go by, too.")
        context.carry("share", torch.full((N,), share, device=importance_N.device))
        if grid.modality == "image" and len(context.grids) <= 1:
            reduction = recycle(importance_N, grid, setting.keep_input, setting.cell)
            context.note(
                "recycled groups", lambda: _groups(reduction), "label", "Patches averaged."
            )
            return reduction
        keep = _num_best(grid, setting.keep_input)
        return Reduction.select(ops.top_k(importance_N, keep), N) if keep < N else None

    def importance(self, context: ProjectorContext, setting: Setting) -> torch.Tensor:
        """Relevance plus `alpha` times the softmax of the entropy, per token, float32 [N]."""
        (view,) = context.encoder_attentions()
        importance_N = view.to_tokens(attention_relevance(view, setting.threshold))[0]
        if setting.alpha != 0:
            entropy_N = entropy_of(context.signal("encoder.pixels"), context.grid)
            context.note("entropy", entropy_N, "heat", "Bits of the grey levels of a patch.")
            weight_N = plane_softmax(entropy_N, context.grid) / view.num_patches
            importance_N = importance_N + setting.alpha * weight_N.to(importance_N.device)
        return importance_N.masked_fill(importance_N.isnan(), 1.0)

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The two cuts."""
        return self.cuts(num_layers)

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Drop the least important of the visual tokens that are left; O(N log N)."""
        N = tokens.num_tokens
        if context.budget.is_full or N == 0:
            return None
        if context.budget.tokens is None:
            share = context.budget.fraction(N)
        else:
            share = float(context.carried("share").mean())
        layers, kept = self.schedule(share, context.num_layers)
        keep = max(1, N - round(N * (1 - kept[layers.index(context.layer)])))
        if keep >= N:
            return None
        return Reduction.select(ops.top_k(context.carried("importance"), keep), N)


def entropy_of(picture_T3hw: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Entropy of the part of its plane's picture that every token shows, [N]; NaN: none."""
    entropy_N = torch.full((grid.num_tokens,), torch.nan)
    sizes = [plane.num_patches for plane in grid.planes]
    patches = grid.patch_index().split(sizes)
    for shape in dict.fromkeys((plane.height, plane.width) for plane in grid.planes):
        same = [i for i, p in enumerate(grid.planes) if (p.height, p.width) == shape]
        bits_TL = patch_entropy(picture_T3hw[same].cpu(), *shape)
        entropy_N[torch.cat([patches[i] for i in same])] = bits_TL.flatten()
    return entropy_N


def plane_softmax(entropy_N: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Softmax over the patches of every plane times their number, so that its mean is 1, [N]."""
    plane_N, device = grid.positions(entropy_N.device)[:, 0], entropy_N.device
    # Entropies are 8 bits at most, so nothing overflows.
    power_N = entropy_N.exp()
    total_T = torch.zeros(len(grid.planes), device=device)
    total_T.index_add_(0, plane_N, power_N.nan_to_num(0.0))
    size_T = torch.tensor([plane.num_patches for plane in grid.planes], device=device)
    return power_N / (total_T / size_T)[plane_N]


def _groups(reduction: Reduction) -> torch.Tensor:
    """The average that every token went into, int64 [N]; -1 for tokens that stay as they are."""
    group_N = reduction.groups_BN[0]
    return group_N.where(group_N.bincount(minlength=reduction.num_out)[group_N] > 1, -1)


def _num_best(grid: Grid, keep: float) -> int:
    """Tokens of a video, or of one image of several, that stay: one patch at least."""
    special = int((grid.kinds() != TokenKind.PATCH).sum())
    return min(grid.num_tokens, max(special + 1, round(grid.num_tokens * keep)))


def _between(share: float) -> tuple[float, float]:
    """r_v / retain and r_1 at a budget, on straight lines between the published ones and 1."""
    points = [(b, s.keep_input / b, s.keep_first) for b, s in PRESETS.items()] + [(1.0, 1.0, 1.0)]
    above = bisect_right([point[0] for point in points], share)
    if above in (0, len(points)):
        return points[min(above, len(points) - 1)][1:]
    (low, *first), (high, *last) = points[above - 1], points[above]
    part = (share - low) / (high - low)
    ratio, kept = (a + part * (b - a) for a, b in zip(first, last, strict=True))
    return ratio, kept
