"""ToMe: merge similar tokens in every block of a vision transformer.

Legend: B images, H heads, N tokens of the sequence (prefix included), d head channels, M tokens
after the merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import Budget, Card, EncoderContext, Method, Reduction, Tokens, merged_groups


@lru_cache
def merge_schedule(num_patches: int, num_layers: int, keep: int) -> tuple[int, ...]:
    """How many tokens each block merges so that `keep` patches leave the last one.

    The same number in every block, the smallest that gets there, and less in the blocks at the end
    that would overshoot. Exactly `num_patches - sum(schedule)` patches remain; that is `keep`
    unless halving in all blocks, the most that a block can do, is not enough.

    Example:
        >>> merge_schedule(196, 12, 98)
        (9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 8, 0)
    """
    schedule = [0] * num_layers
    for r in range(-(-(num_patches - keep) // max(num_layers, 1)), num_patches):
        left = num_patches
        for layer in range(num_layers):
            schedule[layer] = min(r, left - keep, left // 2)
            left -= schedule[layer]
        if left == keep:
            break
    return tuple(schedule)


@dataclass(frozen=True)
class ToMe(Method):
    """ToMe: between attention and MLP of every block, average the most similar tokens in pairs.

    Keys, averaged over heads, tell how similar tokens are. Tokens carry their size, by which
    averages and, with `prop_attn`, attention are weighted.

    Args:
        r: tokens merged per block: a number; (r, inflection) with a float inflection in [-1, 1]
            for a linear schedule; or one number per block, zeros after the last. None derives a
            constant number from the budget, see `merge_schedule`.
        prop_attn: add log(size) of the keys to the attention logits of later blocks; switch it off
            for encoders with masked-autoencoder weights used as they are.

    Raises:
        ValueError: `r` is negative or malformed.

    Example:
        >>> from foveate.core import Budget
        >>> ToMe(r=8).schedule(196, 4, Budget(retain=0.5))
        (8, 8, 8, 8)

    Source: arXiv 2210.09461, section 3; written from the paper's description.
    """

    r: int | tuple[int | float, ...] | None = None
    prop_attn: bool = True

    card: ClassVar[Card] = Card(
        name="tome",
        title="ToMe",
        paper="Token Merging: Your ViT But Faster",
        arxiv="2210.09461",
        year=2022,
        url="https://github.com/facebookresearch/ToMe",
        licence="CC BY-NC 4.0",
        stages=("encoder",),
        kind="training-free",
        summary="Merges the most similar tokens of every encoder block in pairs and weights "
        "attention by token size.",
        defaults={
            "ViT-S/16, ViT-B/16 at 224 (timm augreg)": "r = 13",
            "ViT-L/16 at 224": "r = 7",
            "ViT-L/16 at 384": "r = 23",
            "SWAG B/16 at 384, L/16 at 512, H/14 at 518": "r = 45, 40, 40",
            "DeiT-Ti, DeiT-S trained with ToMe": "r = 13",
            "MAE fine-tuned B, L, H": "r = 16, 8, 7 (prop_attn=False off the shelf)",
        },
        headline=(
            "ImageNet-1k top-1 and images/s on a V100: ViT-B 84.57 at 309 to 82.60 at 511; ViT-L "
            "85.82 at 95 to 84.26 at 167; ViT-L at 384 86.92 at 28 to 86.14 at 56",
            "DeiT-S trained with ToMe: 79.8 at 930 to 79.36 at 1550",
        ),
        notes=(
            "The output order is that of the paper's code: unmerged sources, then destinations. "
            "Without [CLS] the unmerged sources are in order of falling similarity.",
            "One or two tokens before the patches are protected in place ([CLS], distillation). "
            "More of them (registers) are set aside and matching runs on the patches alone, which "
            "is our choice.",
            "Equal similarities go to the lowest index; the paper leaves them to the sort.",
            "The retain default is near r = 13 in a ViT of 12 blocks on 196 patches.",
        ),
        retain=0.2,
    )

    def __post_init__(self) -> None:
        if isinstance(self.r, list):  # JSON has no tuples, and frozen methods stay hashable.
            object.__setattr__(self, "r", tuple(self.r))
        r, inflection = self._parts()
        counts = r if isinstance(r, list) else [r or 0]
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in counts):
            raise ValueError(
                "r must be a number of tokens >= 0, (r, inflection) with a float inflection, or "
                f"one number of tokens per block, got {self.r!r}."
            )
        if not -1 <= inflection <= 1:
            raise ValueError(f"The inflection of r must lie in [-1, 1], got {inflection}.")

    @property
    def proportional_attention(self) -> bool:
        """Whether later blocks add log(size) to their attention logits."""
        return self.prop_attn

    def schedule(self, num_patches: int, num_layers: int, budget: Budget) -> tuple[int, ...]:
        """Tokens that every block is asked to merge (each clamps it to half of what it has).

        Raises:
            ValueError: `r` lists more blocks than there are.
        """
        if budget.is_full:
            return (0,) * num_layers
        r, inflection = self._parts()
        if r is None:
            return merge_schedule(num_patches, num_layers, max(1, budget.count(num_patches)))
        return tuple(ops.parse_r(num_layers, r if isinstance(r, list) else (r, inflection)))

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when `r` lists more blocks than the encoder has."""
        if num_encoder_layers is not None and self.r is not None:
            self.schedule(2, num_encoder_layers, Budget(retain=0.5))

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Merge tokens of all images after the attention of one block."""
        prefix, N = context.num_prefix, tokens.num_tokens
        if context.keys_BHNd is None:
            raise ValueError("tome needs the keys of the block, and the context has none.")
        if tokens.mask_BN is not None and not bool(tokens.mask_BN.all()):
            raise ValueError("tome needs images of one size: padding would be merged into patches.")
        if context.layer == 0:
            context.state["num_patches"] = N - prefix
        patches = context.state.setdefault("num_patches", N - prefix)
        r = self.schedule(patches, context.num_layers, context.budget)[context.layer]
        if min(r, (N - prefix) // 2) <= 0:
            return None
        metric_BNd = context.keys_BHNd.mean(1)
        size_BN = tokens.size_BN
        if prefix <= 2:
            matching = ops.bipartite_matching(metric_BNd, r, num_protected=prefix)
            assignment_BN, kept_BM = matching.assignment_BN, matching.kept_BM
        else:
            matching = ops.bipartite_matching(metric_BNd[:, prefix:], r, sort_unmerged=True)
            own_BP = torch.arange(prefix, device=tokens.device).expand(tokens.batch, prefix)
            assignment_BN = torch.cat([own_BP, matching.assignment_BN + prefix], dim=1)
            kept_BM = torch.cat([own_BP, matching.kept_BM + prefix], dim=1)
        reduction = Reduction.merge(assignment_BN, kept_BM.shape[1], size_BN, kept_BM)
        context.note("groups", lambda: merged_groups(reduction), "label", "merged in this block")
        return reduction

    def _parts(self) -> tuple[int | list[int] | None, float]:
        """`r` as one number or a list, and the inflection."""
        if not isinstance(self.r, tuple):
            return self.r, 0.0
        if len(self.r) == 2 and isinstance(self.r[1], float):
            return int(self.r[0]), self.r[1]
        return [value if isinstance(value, int) else -1 for value in self.r], 0.0
