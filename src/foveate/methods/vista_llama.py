"""Vista-LLaMA's attention: visual keys are seen without rotary distance.

Legend: S tokens of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import AttentionRule, Card, Method, RuleContext


@dataclass(frozen=True)
class VistaLLaMA(Method):
    """Vista-LLaMA: every visual token is equally near, however long the text behind it.

    In every decoder layer and head, the logit of query i and key j is `q_i . k_j` without rotary
    positions where j is visual, and the usual rotary one elsewhere; the softmax runs over both.
    Position ids stay as they are, so text is as far from text as ever. It reduces nothing and
    takes no budget: join it with any method that does, "divprune + vista_llama".

    Example:
        >>> import torch
        >>> context = RuleContext(None, visual_N=torch.tensor([1, 2]), column_S=torch.arange(4))
        >>> VistaLLaMA().attention_rule(context).unrotated_S.tolist()
        [False, True, True, False]

    Source: arXiv 2312.08870, section 3.2 (equal-distance to visual tokens), and the released
    attention.
    """

    card: ClassVar[Card] = Card(
        name="vista_llama",
        title="Vista-LLaMA",
        paper="Vista-LLaMA: Reducing Hallucination in Video Language Models via Equal Distance to "
        "Visual Tokens",
        arxiv="2312.08870",
        year=2023,
        url="https://github.com/Flowerfan/VistaLLaMA",
        stages=("decoder",),
        kind="trained",
        summary="Lets every token see visual tokens without rotary distance; reduces nothing.",
        defaults={"LLaVA-7B, 8 frames": "all layers, all heads, rotary base 10000"},
        headline=(
            "Zero-shot NExT-QA 60.7, MSRVTT-QA 60.5, with its own trained projector (abstract)",
        ),
        notes=(
            "Only the attention; the sequential visual projector, which has to be trained, will "
            "join this class.",
            "The published model was trained with this attention. Switched on in a model that was "
            "not, it changes what the model computes, and answers may get worse.",
            "The rule depends on the key alone, as in the released code: visual queries see visual "
            "keys without distance, too, and text keys with it.",
            "With M-RoPE, visual keys lose their distance in time, rows and columns alike (our "
            "choice; the paper knows one-dimensional positions only).",
            "Visual keys are cached unrotated and every logit is computed once. The released code "
            "computes all logits twice and caches three tensors per layer instead of two.",
            "A budget of 1 switches it off like everything else; none switches it on.",
        ),
        positions="original",
    )

    def attention_rule(self, context: RuleContext) -> AttentionRule:
        """Unrotated keys where the tokens are visual."""
        return AttentionRule(unrotated_S=context.is_visual_S)
