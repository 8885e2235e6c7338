"""Recoverable Compression: patches that stand out, patches the question asks for, the rest merged.

Legend: T planes (frames or tiles) of one shape, L patches of a plane, C channels of the keys,
N tokens of one item, M output tokens, K centres at most, k neighbours, 3 the kinds of tokens:
kept by vision, recovered by text, centres.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    by_rank_in_planes,
    count_by_plane,
    take_planes,
)

#: LOF above which a score stands out.
THRESHOLD = 1.5
#: What the released code multiplies cosines of text and patches with, whatever the width.
TEXT_SCALE = 768**-0.5


@dataclass(frozen=True, eq=False)
class Recovery:
    """What becomes of the patches of T planes.

    Attributes:
        vision_TL: kept because they stand out in the encoder's attention, bool.
        text_TL: recovered because the text asks for them, bool.
        centre_TK: patches that gather others, best first, int64; -1 fills the rows.
        near_TKk: the patches that every centre takes in, int64; -1 for none.
        rest_TL: neither kept nor recovered, bool; centres are among them.
    """

    vision_TL: torch.Tensor
    text_TL: torch.Tensor
    centre_TK: torch.Tensor
    near_TKk: torch.Tensor
    rest_TL: torch.Tensor


def outlier_counts(
    vision_TL: torch.Tensor,
    text_TL: torch.Tensor,
    *,
    neighbours: int = 20,
    centre_neighbours: int = 10,
    released_width: int | None = None,
) -> torch.Tensor:
    """How many patches to keep by vision, by text and as centres: int64 [T, 3].

    As many as there are outliers (LOF above 1.5) among the visual scores, among the text scores of
    the patches not kept, and among the visual scores of those left after both. At least one is
    kept. O(T L log L).

    Args:
        vision_TL: attention of [CLS] to every patch.
        text_TL: similarity of the text with every patch.
        neighbours, centre_neighbours: of the outlier factors of scores and centres.
        released_width: the channels of the keys, C, for the released counts: text scores of kept
            patches are set to the least score instead of left out, the share of outliers among the
            rest is multiplied by C instead of by their number, and products are cut to whole
            numbers, so that rounding can lose one.

    Source: Recoverable Compression (arXiv 2409.01179), dynamic visual filter and recovery.
    """
    L = vision_TL.shape[1]

    def outliers(score_TL: torch.Tensor, k: int, mask_TL: torch.Tensor | None) -> torch.Tensor:
        return (ops.local_outlier_factor(score_TL, k, mask=mask_TL) > THRESHOLD).sum(1)

    def released(num_T: torch.Tensor | int, count_T: torch.Tensor, of_T: torch.Tensor | int):
        # A share of so many, cut to a whole number: 196 * (32 / 196) is a little less than 32.
        return (num_T * (count_T.double() / of_T)).long()

    vision_T = outliers(vision_TL, neighbours, None)
    if released_width is not None:
        vision_T = released(L, vision_T, L)
    kept_TL = _best(vision_TL, vision_T)
    if released_width is None:
        text_T = outliers(text_TL, neighbours, ~kept_TL)
    else:
        flat_TL = text_TL.where(~kept_TL, text_TL.amin(1, keepdim=True))
        text_T = released(L - vision_T, outliers(flat_TL, neighbours, None), L)
    vision_T = vision_T.where(vision_T + text_T > 0, 1)
    kept_TL = _best(vision_TL, vision_T)
    rest_TL = ~kept_TL & ~_best(text_TL, text_T, ~kept_TL)
    rest_T = rest_TL.sum(1)
    centre_T = outliers(vision_TL, centre_neighbours, rest_TL)
    if released_width is not None:
        centre_T = released(released_width, centre_T, rest_T.clamp(min=1)).minimum(rest_T)
    return torch.stack([vision_T, text_T, centre_T], dim=1)


def meet_budget(counts_T3: torch.Tensor, keep: int, size: int) -> torch.Tensor:
    """Scale the three counts in proportion, so that a plane leaves exactly `keep` tokens.

    The summary token counts as one where there are centres. Remainders go to the largest fractions;
    where no centre is left there is no summary either. A plane that keeps all is kept by vision.

    Args:
        counts_T3: what `outlier_counts` gave, at least one kept.
        keep: tokens of a plane, 1 <= keep <= size.
        size: L.

    Example:
        >>> meet_budget(torch.tensor([[6, 3, 1], [9, 0, 0]]), 12, 100).tolist()
        [[7, 3, 1], [12, 0, 0]]
    """
    if keep >= size:
        return torch.tensor([size, 0, 0], device=counts_T3.device).expand_as(counts_T3)

    def share(counts_T3: torch.Tensor, total: int) -> torch.Tensor:
        exact_T3, all_T1 = total * counts_T3, counts_T3.sum(1, keepdim=True)
        whole_T3, part_T3 = exact_T3 // all_T1, exact_T3 % all_T1
        left_T1 = total - whole_T3.sum(1, keepdim=True)
        return whole_T3 + (ops.ranks(part_T3) < left_T1)

    with_T3 = share(counts_T3, keep - 1)
    without_T3 = share(counts_T3 * counts_T3.new_tensor([1, 1, 0]), keep)
    summed_T1 = (with_T3[:, 2:] > 0) & (with_T3[:, :2].sum(1, keepdim=True) > 0)
    return with_T3.where(summed_T1, without_T3)


def recover(
    vision_TL: torch.Tensor,
    text_TL: torch.Tensor,
    key_TLC: torch.Tensor,
    counts_T3: torch.Tensor,
    *,
    merged: int = 32,
    text_weight: float = 50.0,
    released: bool = False,
) -> Recovery:
    """Choose the patches to keep, the centres among the rest and what each of these takes in.

    A centre takes in the patches of the rest that are most like it: cosine of the keys plus
    `text_weight` times the text score. O(T (L log L + K L C)) for K centres.

    Args:
        vision_TL: attention of [CLS] to every patch.
        text_TL: similarity of the text with every patch.
        key_TLC: keys of the same block, heads joined.
        counts_T3: how many are kept, recovered and centres.
        merged: patches that a centre takes in; all others where there are fewer.
        text_weight: of the text score.
        released: read the key of the i-th patch of the rest at place i of the whole plane, as the
            released code does.

    Source: Recoverable Compression (arXiv 2409.01179), secondary recovery and token merger.
    """
    vision_T, text_T, centre_T = counts_T3.unbind(1)
    kept_TL = _best(vision_TL, vision_T)
    found_TL = _best(text_TL, text_T, ~kept_TL)
    rest_TL = ~kept_TL & ~found_TL
    L = rest_TL.shape[1]
    num_centres = int(centre_T.max())
    centre_TK = ops.ranks(vision_TL, mask=rest_TL).argsort(1)[:, :num_centres]
    real_TK = torch.arange(num_centres, device=centre_TK.device) < centre_T[:, None]
    if released:
        key_TLC = ops.gather_tokens(key_TLC, (rest_TL.long().cumsum(1) - 1).clamp(min=0))
    alike_TKL = ops.cosine_similarity_matrix(ops.gather_tokens(key_TLC, centre_TK), key_TLC)
    alike_TKL = alike_TKL + text_weight * text_TL.float()[:, None]
    alike_TKL = alike_TKL.masked_fill(~rest_TL[:, None], -torch.inf)
    alike_TKL = alike_TKL.scatter(2, centre_TK[..., None], -torch.inf)
    near_TKk = ops.top_k_ranked(alike_TKL, min(merged, L))
    taken_TKk = alike_TKL.gather(2, near_TKk) > -torch.inf
    near_TKk = near_TKk.where(taken_TKk & real_TK[..., None], -1)
    return Recovery(kept_TL, found_TL, centre_TK.where(real_TK, -1), near_TKk, rest_TL)


def _best(
    score_TL: torch.Tensor, count_T: torch.Tensor, mask_TL: torch.Tensor | None = None
) -> torch.Tensor:
    """The `count_T[t]` largest scores of every row, bool [T, L]."""
    return ops.ranks(score_TL, mask=mask_TL) < count_T[:, None]


@dataclass(frozen=True)
class Recoverable(Method):
    """Recoverable Compression: patches that stand out, those the text asks for, the rest merged.

    Every frame or tile on its own, with the same text. Without a budget of the call the number of
    tokens follows from the outliers among the scores; with one it is met exactly.

    Args:
        neighbours: of the outlier factors that count the patches kept and recovered.
        centre_neighbours: of the outlier factors that count the centres.
        merged: patches that a centre takes in.
        text_weight: of the text score beside the cosine of keys, when a centre chooses.
        released: count and merge as the released code does, defects included: see the notes.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> Recoverable().count(Grid.image(24, 24), Budget(tokens=64))
        Count(tokens=64, exact=True)

    Source: arXiv 2409.01179.
    """

    neighbours: int = 20
    centre_neighbours: int = 10
    merged: int = 32
    text_weight: float = 50.0
    released: bool = False

    card: ClassVar[Card] = Card(
        name="recoverable",
        title="Recoverable Compression",
        paper="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by "
        "Text Information",
        arxiv="2409.01179",
        year=2024,
        url="https://github.com/banjiuyufen/Recoverable-Compression",
        licence="Apache-2.0",
        stages=("projector",),
        kind="training-free",
        summary="Keeps patches whose [CLS] attention stands out, recovers those that the question "
        "asks for, and merges the rest into a few centres and one summary.",
        defaults={
            "LLaVA-1.5 (576 patches)": "as many as outliers say, about 10 % on average; 20 and 10 "
            "neighbours, outliers above 1.5, 32 patches per centre, text weight 50",
        },
        headline=(
            "LLaVA-1.5-7B without training, about 10 % of the tokens (full model): ScienceQA 69.01 "
            "(68.40), TextVQA 55.51 (58.20), MME 1284.9 (1476.9), VQAv2 70.41 (79.10), POPE 72.00 "
            "(86.40), MMBench 57.90 (66.10)",
            "A100, FP16: 1.5 instead of 8.5 TFLOPs, prefill 9.2 instead of 30.3 ms, memory 14.4 "
            "instead of 22.2 GB",
        ),
        notes=(
            "The published system decides per image how many tokens stay; it does so here when "
            "nobody gives a budget. With one, the three counts of that rule (kept, recovered, "
            "centres) are scaled in proportion to meet it exactly, the summary counting as one "
            "token; where no centre is left there is no summary.",
            "Give a CLIP-like model with foveate.reduce(..., companion=foveate.Companion(...)) for "
            "the published text scores. Without one they are cosines between the mean embedding of "
            "the instruction's tokens and the projected features, in the language model's space.",
            "The guide is the text behind the last visual token; the released code takes the first "
            "line of the whole prompt, which usually is the system prompt, and the text tower's "
            "state at the last padded place instead of the end of the text. Neither is offered.",
            "released=True has what else the released code does: text scores of kept patches are "
            "set to the least score (equal values inflate densities) instead of left out, the "
            "share of centres is multiplied by the channels of the keys instead of by the number "
            "of patches left, products of shares are cut to whole numbers (which loses one here "
            "and there), and keys are read at wrong places when a centre chooses.",
            "Scores and keys are those of the last block of the encoder, heads joined; where it "
            "has rotary positions or norms of queries and keys, these are in them. Encoders "
            "without [CLS] are ranked by the attention that patches receive.",
            "Acts after the projector, on what it made of the patches; the released code acts in "
            "front of it. A centre and the summary are sums with the attention as weights, not "
            "averages, as published; they take the place of the centre and of the patch of most "
            "attention in the summary.",
            "Kept tokens come in order, then centres by attention, then the summary, plane by "
            "plane; where rows end in newlines, everything is in raster order.",
            "Defined by us: at least one patch of every plane stays; centres take in all others "
            "where there are fewer than 32.",
        ),
        retain=0.1,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("text.patch_similarity",)

    def __post_init__(self) -> None:
        for name in ("neighbours", "centre_neighbours", "merged"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 patch, got {getattr(self, name)}.")
        if not self.text_weight >= 0:
            raise ValueError(f"text_weight must not be negative, got {self.text_weight}.")

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """The last block of the encoder."""
        return (num_layers - 1,)

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Exact with a budget, but for layouts with row newlines; otherwise a bound."""
        if budget.is_full or budget.published:
            return Count(grid.num_tokens, exact=budget.is_full)
        return count_by_plane(grid, budget.split([plane.num_patches for plane in grid.planes]))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep, recover and merge the patches of every plane of one item."""
        budget, grid = context.budget, context.grid
        if budget.is_full:
            return None
        sizes = [plane.num_patches for plane in grid.planes]
        kept: Sequence[int | None] = [None] * len(sizes)
        if not budget.published:
            kept = budget.split(sizes)
        (view,) = context.encoder_attentions()
        view = view.joined()
        vision_N = view.to_tokens(view.cls() if view.has_cls else view.received())[0]
        key_NC = view.to_tokens(view.patch_keys()[:, 0])[0]
        text_N = context.signal("text.patch_similarity")[0] * TEXT_SCALE
        targets = _Targets(grid, tokens.device)
        for source_TL, keep in _batches(grid, kept, tokens.device):
            vision_TL, text_TL = vision_N[source_TL], text_N[source_TL]
            key_TLC = take_planes(key_NC, source_TL)
            recovery = self._recover(vision_TL, text_TL, key_TLC, keep)
            targets.add(source_TL, recovery, vision_TL)
        context.note("text similarity", text_N / TEXT_SCALE)
        context.note("[CLS] attention" if view.has_cls else "received attention", vision_N)
        for number, name in enumerate(("kept by vision", "recovered by text", "centres")):
            context.note(name, targets.kind_N == number, "mark")
        return targets.reduction()

    def _recover(
        self,
        vision_TL: torch.Tensor,
        text_TL: torch.Tensor,
        key_TLC: torch.Tensor,
        keep: int | None,
    ) -> Recovery:
        counts_T3 = outlier_counts(
            vision_TL,
            text_TL,
            neighbours=self.neighbours,
            centre_neighbours=self.centre_neighbours,
            released_width=key_TLC.shape[2] if self.released else None,
        )
        if keep is not None:
            counts_T3 = meet_budget(counts_T3, keep, vision_TL.shape[1])
        return recover(
            vision_TL,
            text_TL,
            key_TLC,
            counts_T3,
            merged=self.merged,
            text_weight=self.text_weight,
            released=self.released,
        )


class _Targets:
    """Collects what becomes of an item's patches; a target is known by the patch at its place."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.grid = grid
        self.rank_N = torch.zeros(grid.num_tokens, dtype=torch.long, device=device)
        #: 0 kept by vision, 1 recovered by text, 2 a centre, 3 the summary, -1 no target.
        self.kind_N = torch.full_like(self.rank_N, -1)
        self.entries: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, source_TL: torch.Tensor, found: Recovery, vision_TL: torch.Tensor) -> None:
        """Join some planes: their patches, what becomes of them, and the weights of sums."""
        centre_TK, near_TKk = found.centre_TK, found.near_TKk
        kept_TL, real_TK = found.vision_TL | found.text_TL, centre_TK >= 0
        num_T1, is_centre_TL = kept_TL.sum(1, keepdim=True), torch.zeros_like(kept_TL)
        plane_R, slot_R = real_TK.nonzero(as_tuple=True)
        centre_R = centre_TK[plane_R, slot_R]
        is_centre_TL[plane_R, centre_R] = True

        self._target(source_TL[found.vision_TL], 0)
        self._target(source_TL[found.text_TL], 1)
        self.rank_N[source_TL[kept_TL]] = (kept_TL.long().cumsum(1) - 1)[kept_TL]
        anchor_R = source_TL[plane_R, centre_R]
        self._target(anchor_R, 2)
        self.rank_N[anchor_R] = num_T1[plane_R, 0] + slot_R

        near_Rk = near_TKk[plane_R, slot_R]
        row_E, column_E = (near_Rk >= 0).nonzero(as_tuple=True)
        place_E = near_Rk[row_E, column_E]
        weight_E = vision_TL[plane_R[row_E], place_E]
        self._feed(anchor_R[row_E], source_TL[plane_R[row_E], place_E], weight_E)

        # One summary of all that is neither kept nor a centre, in planes that have centres.
        summed_TL = found.rest_TL & ~is_centre_TL & is_centre_TL.any(1, keepdim=True)
        most_T = vision_TL.masked_fill(~summed_TL, -torch.inf).argmax(1, keepdim=True)
        anchor_TL = source_TL.gather(1, most_T).expand_as(source_TL)
        summary_T = summed_TL.any(1)
        summary_S = anchor_TL[summary_T, 0]
        self.kind_N[summary_S] = 3
        self.rank_N[summary_S] = source_TL.shape[1]
        self._feed(anchor_TL[summed_TL], source_TL[summed_TL], vision_TL[summed_TL])

    def _target(self, anchor_R: torch.Tensor, kind: int) -> None:
        """A target that holds the patch at its place with weight one."""
        self.kind_N[anchor_R] = kind
        one_R = torch.ones(len(anchor_R), device=anchor_R.device)
        self._feed(anchor_R, anchor_R, one_R)

    def _feed(self, target_E: torch.Tensor, source_E: torch.Tensor, weight_E: torch.Tensor) -> None:
        self.entries.append((target_E, source_E, weight_E.float()))

    def reduction(self) -> Reduction:
        """From the item's tokens to the targets, special tokens among them."""
        anchor_M = by_rank_in_planes((self.kind_N >= 0).nonzero()[:, 0], self.rank_N, self.grid)
        special_S = anchor_M[self.kind_N[anchor_M] < 0]
        self._feed(special_S, special_S, torch.ones(len(special_S), device=special_S.device))
        target_E, source_E, weight_E = (
            torch.cat(parts) for parts in zip(*self.entries, strict=True)
        )
        slot_N = torch.zeros_like(self.rank_N)
        slot_N[anchor_M] = torch.arange(len(anchor_M), device=anchor_M.device)
        index_3E = torch.stack([torch.zeros_like(target_E), slot_N[target_E], source_E])
        size = (1, len(anchor_M), self.grid.num_tokens)
        matrix_1MN = torch.sparse_coo_tensor(index_3E, weight_E, size, check_invariants=False)
        return Reduction.transform(matrix_1MN.coalesce(), anchor_M[None])


def _batches(
    grid: Grid, kept: Sequence[int | None], device: torch.device
) -> list[tuple[torch.Tensor, int | None]]:
    """The patches of planes of equal size and share among the item's tokens, int64 [T, L]."""
    patch_P = grid.patch_index(device)
    starts: dict[tuple[int, int | None], list[int]] = defaultdict(list)
    first = 0
    for plane, keep in zip(grid.planes, kept, strict=True):
        starts[plane.num_patches, keep].append(first)
        first += plane.num_patches
    batches = []
    for (size, keep), start_T in starts.items():
        place_T1 = torch.tensor(start_T, device=device)[:, None]
        batches.append((patch_P[place_T1 + torch.arange(size, device=device)], keep))
    return batches
