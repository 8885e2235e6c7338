"""DivPrune: keep the subset of visual tokens that is most diverse.

Legend: N tokens of one image or video, K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.core import Budget, Card, Count, Grid, Method, ProjectorContext, Reduction, Tokens


@dataclass(frozen=True)
class DivPrune(Method):
    """DivPrune: greedy max-min diversity over projected visual tokens, blind to the text.

    Newline tokens are candidates like any other. O(N^2 D).

    Example:
        >>> from foveate.core import Budget, Grid
        >>> DivPrune().count(Grid.image(24, 24), Budget(retain=0.098))
        Count(tokens=56, exact=True)

    Source: arXiv 2503.02175, section 3.
    """

    any_tokens: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="divprune",
        title="DivPrune",
        paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        arxiv="2503.02175",
        year=2025,
        url="https://github.com/vbdi/divprune",
        licence="CC BY-NC 4.0",
        stages=("projector",),
        kind="training-free",
        summary="Chooses the visual tokens whose smallest pairwise cosine distance is as large as "
        "possible, greedily.",
        defaults={
            "LLaVA-1.5-7B, LLaVA-1.5-13B, LLaVA-1.6-7B": "retain 0.098 (56 of 576 tokens)",
            "LLaVA-NeXT-Video-7B": "retain 0.10 of 8 frames x 144 tokens",
        },
        headline=(
            "LLaVA-1.5-7B, 11 image tasks: prefill 3.228 to 0.512 TFLOPs (15.6 %) by the official "
            "cost model",
            "LLaVA-NeXT-Video-7B: prefill 6.539 to 0.937 TFLOPs (14.1 %) by the official cost "
            "model",
        ),
        notes=(
            "Every image and every video is pruned on its own with the same ratio; the official "
            "code handles one image of one sample.",
            "Chosen tokens are masked, so exact duplicates never make it choose a token twice, "
            "and norms are clamped at 1e-12, so zero vectors are harmless.",
            "Positions are renumbered; M-RoPE models keep the original ones.",
        ),
        retain=0.098,
    )

    def count(self, grid: Grid, budget: Budget) -> Count:
        """`round(retain * N)`, half to even, newline tokens included; at least one."""
        return Count(max(1, budget.count(grid.num_tokens)))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep the most diverse tokens, in order; the order of choice is in `context.state`."""
        if context.budget.is_full:
            return None
        keep = max(1, context.budget.count(tokens.num_tokens))
        order_K = ops.max_min_diversity(tokens.x_BND[0], keep)
        context.state["order"] = order_K
        context.note(
            "order of choice",
            range(keep),
            caption="each is the farthest from those before it",
            at=order_K,
        )
        return Reduction.select(order_K.sort().values, tokens.num_tokens)
