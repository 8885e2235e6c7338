"""PyramidDrop: drop image tokens stage by stage, by the attention of the last instruction token.

Legend: N visual tokens of one sample, S tokens of its sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from foveate import ops
from foveate.core import Card, DecoderContext, Method, Reduction, SearchRange, Tokens

#: Share of the image tokens that the published schedule keeps at the end of a stage.
_PUBLISHED_KEEP = 0.5


@dataclass(frozen=True)
class PyramidDrop(Method):
    """PyramidDrop: at the end of every stage of the LLM a share of the image tokens stays.

    `retain` is the mean share of visual tokens over all decoder layers; what stays at the end of a
    stage follows from it. `keep` sets that by hand, and `retain` has no say then.

    Args:
        parts: stages of equal depth; tokens go at the end of each but the last.
        keep: share of the tokens that stays at the end of a stage (lambda in the paper), in (0, 1).

    Raises:
        ValueError: fewer than two stages, or `keep` is out of range.

    Example:
        >>> PyramidDrop().schedule(0.46875, 32)
        ((8, 16, 24), (0.5, 0.25, 0.125))
        >>> PyramidDrop(keep=0.5).decoder_layers(28)
        (7, 14, 21)

    Source: arXiv 2410.17247, section 3.2.
    """

    parts: int = 4
    keep: float | None = None

    card: ClassVar[Card] = Card(
        name="pyramiddrop",
        title="PyramidDrop",
        paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual "
        "Redundancy Reduction",
        arxiv="2410.17247",
        year=2024,
        url="https://github.com/Cooperx521/PyramidDrop",
        stages=("decoder",),
        kind="training-free",
        summary="Halves the image tokens after every quarter of the LLM, by the attention of the "
        "last instruction token.",
        defaults={
            "LLaVA-1.5-7B, LLaVA-NeXT-7B": "4 stages, keep 0.5: before layers 8, 16 and 24 of 32 "
            "(retain 0.46875)",
        },
        headline=(
            "LLaVA-1.5-7B trained with it: 1.78 instead of 3.82 TFLOPs with 4 stages, 2.13 with "
            "3, 1.38 with 5 (ablation of the number of stages)",
            "LLaVA-NeXT: 55 % fewer inference FLOPs at comparable performance (abstract)",
        ),
        notes=(
            "Ours: `retain` is the mean share over all layers. Down to the published schedule "
            "only the share kept per stage changes; below it all stages but the last get shorter, "
            "and once they are one layer long the share falls again. The first layer always sees "
            "every token, so that is the least.",
            "Counts are of the tokens that enter the LLM, rounded down as in the released code; "
            "at least one token stays.",
            "As in the released code, queries and keys of the layer about to run rank the tokens, "
            "and that layer and all deeper ones number the rest anew (not on models with M-RoPE).",
            "All visual tokens of a sample are one pool; the released code takes one image per "
            "sample and right padding only, and cuts sequences to the tokenizer's length.",
            "The paper also trains with it; here it acts at inference.",
        ),
        positions="original",
        retain=0.46875,
    )
    renumbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.parts < 2:
            raise ValueError(f"parts = {self.parts}: tokens go between stages, so 2 at least.")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(
                f"keep = {self.keep}: the share that stays at the end of a stage lies in (0, 1)."
            )

    def ends(self, num_layers: int) -> tuple[int, ...]:
        """The layers before which stages of equal depth end.

        Example:
            >>> PyramidDrop().ends(32), PyramidDrop(parts=5).ends(32), PyramidDrop().ends(3)
            ((8, 16, 24), (6, 13, 19, 26), (1, 2))
        """
        layers = {max(1, round(n * num_layers / self.parts)) for n in range(1, self.parts)}
        return tuple(sorted(layer for layer in layers if layer < num_layers))

    def schedule(self, share: float, num_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The layers before which tokens go, and the share of all tokens left after each.

        Args:
            share: mean share over all layers.
            num_layers: decoder layers.
        """
        ends = self.ends(num_layers)
        if self.keep is not None:
            return ends, tuple(self.keep**n for n in range(1, len(ends) + 1))
        return _schedule(share, ends, num_layers)

    def search_space(self, share: float) -> Mapping[str, SearchRange]:
        """The number of stages, around the published one and those of its ablation."""
        return {"parts": SearchRange(2, 8, integer=True)}

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """Every layer at which some budget ends a stage."""
        ends = self.ends(num_layers)
        if self.keep is not None or not ends:
            return ends
        moved = [ops.earlier_layers(ends, first) for first in range(1, ends[0] + 1)]
        return tuple(sorted(set().union(*moved)))

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Keep the visual tokens that the last token would attend to most in the next layer.

        One projection of all keys and of one query, and O(H S d) for the attention.
        """
        N, total = tokens.num_tokens, context.num_visual
        if context.budget.is_full or N == 0:
            return None
        layers, shares = self.schedule(context.budget.fraction(total), context.num_layers)
        if context.layer not in layers:
            return None
        keep = max(1, int(total * shares[layers.index(context.layer)]))
        if keep >= N:
            return None
        row_S = context.attention_ahead().last_row()[0].mean(0)
        score_N = row_S[context.visual_N]
        context.note("attention", score_N, caption="of the last token, in the layer to come")
        return Reduction.select(ops.top_k(score_N, keep), N)


@lru_cache(maxsize=256)
def _schedule(
    share: float, ends: tuple[int, ...], num_layers: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if not ends:
        return (), ()

    def shares_at(keep: float) -> list[float]:
        return [keep**n for n in range(1, len(ends) + 1)]

    return ops.share_schedule(share, ends, num_layers, shares_at, _PUBLISHED_KEEP)
