"""AIM: merge visual tokens before the language model, then drop them layer by layer inside it.

Legend: P planes (frames or tiles), L patches of a plane, N tokens of one item or visual tokens of
one sample, S tokens of the whole sequence, H heads, C and D channels, M target tokens.
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
    DecoderContext,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    count_by_plane,
    merge_by_plane,
    merged_groups,
    relative_layer,
    take_planes,
)

#: Depth of the model that the published schedule was written for.
_LAYERS = 28


def merge_rounds(num_tokens: int, keep: int) -> list[int]:
    """Tokens merged in every round until `keep` of `num_tokens` remain.

    Rounds of N/2, N/4, N/8 .. of the original number, the last one cut to fit.

    Example:
        >>> merge_rounds(196, 49), merge_rounds(49, 13), merge_rounds(196, 120)
        ([98, 49], [24, 12], [76])
    """
    rounds: list[int] = []
    left = num_tokens
    while left > keep:
        full = num_tokens >> (len(rounds) + 1) or left // 2
        rounds.append(min(full, left // 2, left - keep))
        left -= rounds[-1]
    return rounds


def merge_planes(x_PLC: torch.Tensor, keep: int) -> Reduction:
    """Merge the tokens of every plane down to `keep` by bipartite similarity, planes apart.

    Averages do not weigh tokens by size. Order of the output: unmerged sources by falling
    similarity, then destinations. O(P L^2 C / 4) for the first round, a quarter for each next.

    Source: AIM, section 3.2 (arXiv 2412.03248).
    """
    P, L, _ = x_PLC.shape
    reduction = Reduction.identity(L, P, x_PLC.device)
    for r in merge_rounds(L, keep):
        matching = ops.bipartite_matching(x_PLC, r)
        step = Reduction.merge(
            matching.assignment_BN, matching.num_kept, anchor_BM=matching.kept_BM
        )
        x_PLC = step.apply(x_PLC)
        reduction = reduction.then(step)
    return reduction


@dataclass(frozen=True)
class AIM(Method):
    """AIM: similarity merging before the LLM, page-rank pruning inside it, down to no tokens.

    `retain` is what the merging keeps of every frame; the schedule in the LLM is a matter of
    `first_layer` and `step`.

    Args:
        first_layer: layer after which dropping starts: an index, or a fraction of the depth.
        step: share of the visual tokens that every 28th of the depth drops.
        schedule: fraction of the visual tokens kept after every layer, instead of the two above.
        temperature: divides the attention logits of the walk.
        iterations: steps of the walk.
        damping: share of the walk's mass that restarts in every step.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> AIM().kept_after(28)[12:24]
        [1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0, 0.0]
        >>> AIM().decoder_layers(28)
        (15, 16, 17, 18, 19, 20, 21, 22)

    Source: arXiv 2412.03248, sections 3.2 and 3.3.
    """

    first_layer: int | float = 14 / _LAYERS
    step: float = 0.125
    schedule: tuple[float, ...] | None = None
    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    card: ClassVar[Card] = Card(
        name="aim",
        title="AIM",
        paper="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
        arxiv="2412.03248",
        year=2024,
        url="https://github.com/LaVi-Lab/AIM",
        licence="Apache-2.0",
        stages=("projector", "decoder"),
        kind="training-free",
        summary="Halves the tokens of every frame by similarity merging, then drops them layer by "
        "layer inside the LLM by page rank over its attention.",
        defaults={
            "LLaVA-OneVision-7B, video": "196 to 49 tokens per frame (retain 0.25), first layer "
            "14 of 28, step 0.125",
            "32-layer Vicuna (a comment in the released FLOPs script)": "first layer 13 of 32, "
            "0.125 per layer: step=0.143",
        },
        headline=(
            "About 7 times fewer FLOPs with a small loss; +4.6 on MLVU at similar compute with "
            "more frames (abstract)",
        ),
        notes=(
            "Tokens are removed, where the released code masks their keys; kept tokens see the "
            "same hidden states either way.",
            "The walk starts from the tokens that are left; the released masked form also starts "
            "one from every dropped row. `ops.page_rank(..., start='all')` is that form; a "
            "shortened sequence no longer has the rows.",
            "`step` scales with the depth, so that the same fraction of it reaches zero in "
            "every model; `schedule` sets every layer by hand.",
            "A keep ratio between halvings ends with one partial round, so that every frame "
            "keeps exactly its share.",
            "Newline tokens are not merged. Where rows end in newlines, tokens return to raster "
            "order and rows that still hold one keep their newline.",
            "Attention to earlier turns in a cache is left out of the walk.",
        ),
        retain=0.25,
    )

    def __post_init__(self) -> None:
        if self.first_layer < 0 or not self.step > 0:
            raise ValueError(
                f"first_layer must be >= 0 and step > 0, got {self.first_layer} and {self.step}."
            )
        if isinstance(self.schedule, list):
            object.__setattr__(self, "schedule", tuple(self.schedule))
        kept = (1.0, *(self.schedule or ()))
        if any(not 0 <= b <= a for a, b in pairwise(kept)):
            raise ValueError(
                f"schedule holds fractions in [0, 1] that never rise, got {self.schedule}."
            )
        if not self.temperature > 0 or self.iterations < 0 or not 0 <= self.damping <= 1:
            raise ValueError(
                "temperature must be above 0, iterations >= 0 and damping in [0, 1], got "
                f"{self.temperature}, {self.iterations} and {self.damping}."
            )

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Exact per plane; a bound where rows end in newlines."""
        if budget.is_full:
            return Count(grid.num_tokens)
        return count_by_plane(grid, budget.split([plane.num_patches for plane in grid.planes]))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Merge the patches of every plane of one item."""
        if context.budget.is_full:
            return None
        kept = context.budget.split([plane.num_patches for plane in context.grid.planes])
        reduction = merge_by_plane(
            context.grid,
            kept,
            lambda source_PL, keep: merge_planes(take_planes(tokens.x_BND[0], source_PL), keep),
            tokens.device,
        )
        context.note("groups", lambda: merged_groups(reduction), "label", "merged by similarity")
        return reduction

    def kept_after(self, num_layers: int) -> list[float]:
        """Fraction of the visual tokens kept after every layer.

        Raises:
            ValueError: the first layer does not exist or `schedule` has another length.
        """
        if self.schedule is not None:
            if len(self.schedule) != num_layers:
                raise ValueError(
                    f"schedule has {len(self.schedule)} entries for {num_layers} decoder layers."
                )
            return list(self.schedule)
        first = relative_layer(self.first_layer, num_layers, "first_layer")
        return ops.linear_decay_schedule(num_layers, first, self.step * _LAYERS / num_layers)

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers after those that lower the share; none once no token is left."""
        kept = [1.0, *self.kept_after(num_layers)[:-1]]
        return tuple(i for i in range(1, num_layers) if kept[i] < kept[i - 1])

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose attention ranks the tokens that go before the next one."""
        return tuple(layer - 1 for layer in self.decoder_layers(num_layers))

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Keep the visual tokens of highest page rank, perhaps none; O(H S^2) for S tokens."""
        N, before = tokens.num_tokens, context.layer - 1
        if context.budget.is_full or N == 0:
            return None
        share, text = self.kept_after(context.num_layers)[before], context.num_text
        # Text counts while rounding down, as in the released code: its sum absorbs rounding errors.
        keep = int(context.num_visual * share + text) - text
        if keep >= N:
            return None
        if keep == 0:
            return Reduction.select(torch.empty(0, dtype=torch.long, device=tokens.device), N)
        view = context.attention(before)
        importance_S = ops.page_rank_qk(
            view.q_BHSd,
            view.k_BGTd[:, :, view.num_past :],
            visible_NN=view.visible_SS,
            temperature=self.temperature,
            iterations=self.iterations,
            damping=self.damping,
            scale=view.scale,
        )[0]
        score_N = importance_S[context.survivors(before)[context.visual_N]]
        context.note("page rank", score_N, caption="of the layer's attention as a walk")
        return Reduction.select(ops.top_k(score_N, keep), N)
