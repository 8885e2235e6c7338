"""S5: a small mask generator decides which tokens of a long video the state spaces read.

Legend: B videos, L tokens of a video, K of them kept, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from foveate import ops
from foveate.core import (
    BackboneMethod,
    Budget,
    Card,
    EncoderContext,
    Reduction,
    Tokens,
    backbone_context,
)
from foveate.errors import AttachmentError
from foveate.methods._s5_loss import contrastive_loss, ratio_loss

__all__ = ["S5", "contrastive_loss", "keep_scores", "ratio_loss"]

Form = Literal["gather", "zero"]


def keep_scores(logits_BL2: torch.Tensor) -> torch.Tensor:
    """Log-probability that every token is kept, float32 [B, L].

    Example:
        >>> keep_scores(torch.zeros(1, 1, 2)).exp().tolist()
        [[0.5]]
    """
    return logits_BL2.float().log_softmax(-1)[..., 0]


@dataclass(frozen=True)
class S5(BackboneMethod):
    """Selective S4: the tokens that the mask generator would rather keep enter the S4 decoder.

    The generator (`ViS4merConfig.mask_generator`) reads a momentum copy of the first S4 layer. The
    kept tokens are gathered with their places in time, at whose true distances every kernel is
    evaluated.

    Args:
        form: "gather" goes on with the kept tokens; "zero" goes on at full length with zeros in
            place of the others, which saves nothing and is what training does.

    Raises:
        ValueError: `form` is not one of those.

    Example:
        >>> from foveate.core import Budget
        >>> S5().count_tokens(257, Budget(retain=0.5))
        129

    Source: arXiv 2303.14526; no code was published.
    """

    form: Form = "gather"

    card: ClassVar[Card] = Card(
        name="s5",
        title="S5",
        paper="Selective Structured State-Spaces for Long-Form Video Understanding",
        arxiv="2303.14526",
        year=2023,
        stages=("encoder",),
        kind="trained",
        summary="Lets a mask generator on a momentum copy of the first S4 layer decide which image "
        "tokens of a long video enter the S4 decoder.",
        defaults={
            "ViS4mer": "3 blocks, length and width halved by each, dropout 0.2",
            "mask generator (ours)": "half of the tokens, momentum 0.99, Gumbel temperature 1, "
            "weight of the ratio loss 2",
        },
        headline=(
            "LVU, COIN, Breakfast: up to 9.6 % more accuracy than ViS4mer with 23 % less memory",
        ),
        notes=(
            "Runs on ViS4mer with S4D layers (foveate.models.backbones).",
            "No code was published: depth of the generator, form of the losses and all numbers "
            "named above are ours.",
            "Without a mask generator there is nothing to choose by, and it says so.",
            "The generator is an S4 layer of its own at full length. In a ViS4mer of three blocks, "
            "whose first block is most of it, that pays in FLOPs below about a fifth of the "
            "tokens; the paper claims accuracy and memory.",
            "Ours: kept tokens are pooled in pairs of neighbours, a pair being where its second "
            "token is, so that the number of tokens depends on the budget alone.",
            "Ours: masked tokens are set to zero behind the first norm, too, whose bias would "
            "otherwise be an input.",
            "Equal probabilities: the earlier token stays.",
        ),
        retain=0.5,
    )
    kind: ClassVar = "s4"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            choices = ", ".join(map(repr, get_args(Form)))
            raise ValueError(f"form must be {choices}, got {self.form!r}.")

    @property
    def in_place(self) -> bool:
        """Whether what is dropped is set to zero in a sequence of full length."""
        return self.form == "zero"

    def cuts(self, num_blocks: int) -> tuple[int, ...]:
        """In front of the first block."""
        return (0,)

    def count_tokens(self, num_tokens: int, budget: Budget) -> int:
        """Tokens that stay; half a token is rounded up."""
        return max(1, budget.count(num_tokens, "ceil"))

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Choose by the probability of being kept."""
        context = backbone_context(self, context)
        L = tokens.num_tokens
        keep = self.count_tokens(L, context.budget)
        if keep >= L:
            return None
        logits_BL2 = context.signal("keep_logits")
        if logits_BL2 is None:
            raise AttachmentError(
                "s5 chooses tokens by a trained mask generator, and this ViS4mer has none: make it "
                "with ViS4merConfig(mask_generator=True) and load trained weights."
            )
        score_BL = keep_scores(logits_BL2)
        context.note("keep probability", lambda: score_BL.exp())
        return Reduction.select(ops.top_k(score_BL, keep), L)
