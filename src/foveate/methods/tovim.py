"""ToP-ViM: prune tokens of a vision state-space model, and let its scans remember where they were.

Legend: B images, K tokens that are left ([CLS] included), P scan paths, E inner channels, C
channels of the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from foveate import ops
from foveate.core import (
    BackboneMethod,
    Budget,
    Card,
    EncoderContext,
    Reduction,
    Tokens,
    backbone_context,
    relative_layer,
)


def scan_importance(y_PBKE: torch.Tensor) -> torch.Tensor:
    """The positive part of what a block's scans give, summed over channels, float32 [B, K].

    Args:
        y_PBKE: gated output of every path, in the order of the tokens.

    Example:
        >>> scan_importance(torch.tensor([[[[1.0, -5.0], [-1.0, 0.5]]]])).tolist()
        [[1.0, 0.5]]

    Source: ToP-ViM, section 4 (arXiv 2409.18962).
    """
    return y_PBKE.detach().float().clamp_min(0).sum(-1).mean(0)


@dataclass(frozen=True)
class ToPViM(BackboneMethod):
    """Token pruning for Vision Mamba: drop by the positive part of the scans' output, keep places.

    Behind a few blocks the patches of the least importance leave hidden states and residual stream
    alike. In every later scan a dropped patch is a step without input: the state decays over it, so
    that those left do not become neighbours. [CLS] is never dropped and stays in the middle.

    Args:
        after: blocks that have run before each cut; numbers, or fractions of the depth.
        align: let scans step over what was dropped; False: as if it had never been there (naive).

    Raises:
        ValueError: `after` is empty, not ascending, or not above 0.

    Example:
        >>> from foveate.core import Budget
        >>> ToPViM().schedule(196, Budget(retain=0.512))
        (157, 126, 101)

    Source: arXiv 2409.18962.
    """

    after: tuple[int | float, ...] = (5 / 24, 10 / 24, 15 / 24)
    align: bool = True

    card: ClassVar[Card] = Card(
        name="tovim",
        title="ToP-ViM",
        paper="Exploring Token Pruning in Vision State Space Models",
        arxiv="2409.18962",
        year=2024,
        url="https://github.com/ZLKong/ToP-ViM",
        licence="Apache-2.0",
        stages=("encoder",),
        kind="trained",
        summary="Drops the patches of a vision state-space model whose scan output is least "
        "positive, and lets the scans step over them.",
        defaults={
            "Vim, released forward": "behind blocks 5, 10, 15: 0.8 of the patches each",
            "Vim-S, name of the script": "from block 5, every 9: 0.7 each",
            "Vim-T, name of the script": "from block 10, every 10: 0.75 each",
        },
        headline=("ImageNet-1k: PlainMamba-L3 81.7 top-1 with 41.6 % fewer FLOPs",),
        notes=(
            "Follows the paper, not the released research code, which aligns nothing, scores in "
            "flipped order without the clip, and protects the [CLS] of the first image alone.",
            "Ours: a dropped patch is a step with raw step size 0, so its decay depends on the "
            "bias alone; the convolution sees kept neighbours.",
            "An even number of patches stays where there is a [CLS], rounded up, so that it has as "
            "many on either side; it moves no further than that needs.",
            "Stepping over gaps assumes that what was dropped says nothing; where it says as much "
            "as the rest, the naive scan (align=False) is nearer to the full one.",
            "Trained by a fine-tuning of 30 epochs behind the pruning; without it accuracy falls.",
            "Equal importances: the earlier patch stays.",
        ),
        retain=0.512,
    )
    kind: ClassVar = "ssm"
    reads_scans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", tuple(self.after))  # JSON has no tuples.
        if not self.after or any(not value > 0 for value in self.after):
            raise ValueError(f"after must name blocks that have run, above 0, got {self.after}.")
        if list(self.after) != sorted(set(self.after)):
            raise ValueError(f"after must be ascending, each block once, got {self.after}.")

    @property
    def keeps_gaps(self) -> bool:
        """Whether scans step over what was dropped."""
        return self.align

    def cuts(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks in front of which patches leave; a shallow model may have fewer cuts."""
        found = {max(1, relative_layer(value, num_blocks, "after")) for value in self.after}
        return tuple(sorted(found)) if num_blocks > 1 else ()

    def schedule(
        self, num_patches: int, budget: Budget, cuts: int | None = None, even: bool = False
    ) -> tuple[int, ...]:
        """Patches left behind every cut; each keeps the same share, the last what `budget` says.

        Args:
            num_patches: of an image.
            budget: of the patches that leave the last block.
            cuts: how many cuts there are; None: as many as `after` names.
            even: only even numbers, rounded up.
        """
        cuts = len(self.after) if cuts is None else cuts
        keep = max(1, budget.count(num_patches, "ceil"))
        counts = []
        for number in range(1, cuts + 1):
            share = budget.fraction(num_patches) ** (number / cuts)
            # A count that is whole but for the rounding of a power is that count.
            left = keep if number == cuts else math.ceil(round(num_patches * share, 6))
            counts.append(min(num_patches, left + left % 2 if even else left))
        return tuple(counts)

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Choose the patches that go on, behind the block that has just run."""
        context = backbone_context(self, context)
        K, cls = tokens.num_tokens, context.signal("cls_index")
        cuts = self.cuts(context.num_layers)
        num_patches = context.num_source - (cls is not None)
        counts = self.schedule(num_patches, context.budget, len(cuts), cls is not None)
        keep = counts[cuts.index(context.layer)]
        if keep >= K - (cls is not None):
            return None
        y_PBKE = context.signal("scan_outputs")
        if y_PBKE is None:
            raise ValueError("tovim needs the scans of the block before, and none were seen.")
        score_BK = scan_importance(y_PBKE)
        context.note("importance", score_BK)
        if cls is None:
            return Reduction.select(ops.top_k(score_BK, keep), K)
        patch_K = torch.arange(K - 1, device=score_BK.device)
        patch_K = patch_K + (patch_K >= cls)
        index_BM = patch_K[ops.top_k(score_BK[:, patch_K], keep)]
        middle = keep // 2
        # A column of [CLS] between the two halves, whatever their places in the image.
        index_BM = torch.cat(
            [pad(index_BM[:, :middle], (0, 1), value=cls), index_BM[:, middle:]], 1
        )
        return Reduction.select(index_BM, K)
