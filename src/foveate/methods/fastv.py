"""FastV: drop visual tokens that the last token hardly attends to in an early decoder layer.

Legend: N visual tokens of one sample, S tokens of its sequence, K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.core import Card, DecoderContext, Method, Reduction, Tokens, relative_layer


@dataclass(frozen=True)
class FastV(Method):
    """FastV: before layer K, keep the visual tokens that the last token attends to most.

    Args:
        layer: the layer before which tokens go: an index (at least 1), or a fraction of the depth.

    Raises:
        ValueError: `layer` is below 1 (nothing has attended yet).

    Example:
        >>> FastV().decoder_layers(32), FastV().attention_layers(32)
        ((2,), (1,))

    Source: arXiv 2403.06764, section 4.
    """

    layer: int | float = 2

    card: ClassVar[Card] = Card(
        name="fastv",
        title="FastV",
        paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration "
        "for Large Vision-Language Models",
        arxiv="2403.06764",
        year=2024,
        url="https://github.com/pkunlp-icler/FastV",
        stages=("decoder",),
        kind="training-free",
        summary="Drops visual tokens of low attention after an early decoder layer.",
        defaults={"LLaVA-1.5, Qwen-VL, Video-LLaVA": "layer 2, retain 0.5"},
        headline=(
            "LLaVA-1.5-13B, layer 2, retain 0.5: 45 % fewer FLOPs without losing accuracy "
            "(abstract)",
        ),
        notes=(
            "Kept tokens hold their positions, in every sample of a batch; the official code "
            "reads the first sample only and needs eager attention.",
            "Attention is averaged over heads; `retain` is a fraction of the visual tokens that "
            "reach the layer, rounded half to even, at least one.",
        ),
        positions="original",
        retain=0.5,
    )

    def __post_init__(self) -> None:
        if self.layer <= 0:
            raise ValueError(
                f"layer = {self.layer}: tokens are ranked by the attention of the layer before, "
                "so it must be at least 1 (or a fraction of the depth)."
            )

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The one layer before which tokens are dropped.

        Raises:
            ValueError: the layer does not exist.
        """
        return (max(1, relative_layer(self.layer, num_layers)),) if num_layers > 1 else ()

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer before it, for the last row of its attention."""
        return tuple(layer - 1 for layer in self.decoder_layers(num_layers))

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Keep the most attended visual tokens of one sample, in order."""
        N = tokens.num_tokens
        if context.budget.is_full or N == 0:
            return None
        score_N = context.last_token_attention(context.layer - 1)
        context.note("attention", score_N, caption="of the last token, in the layer before")
        keep = max(1, context.budget.count(N))
        return Reduction.select(ops.top_k(score_N, keep), N)
