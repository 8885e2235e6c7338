"""TransPrune: keep visual tokens that the layers transform strongly and in new directions.

Legend: N visual tokens of one sample, S tokens of its sequence, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch

from foveate import ops
from foveate.core import (
    Card,
    DecoderContext,
    LayerModule,
    Method,
    ModuleContext,
    Reduction,
    SearchRange,
    Tokens,
    relative_layer,
)

#: Depth of the models that the published layer numbers were written for, and those numbers.
_DEPTH = 32
_LAYERS = (7, 9, 12)
#: Published shares after each cut, from nothing to all; 0.5, 0.25, 0.0625 is inferred.
_PRESETS = ((0.0, 0.0, 0.0), (0.5, 0.25, 0.0625), (0.875, 0.625, 0.125), (1.0, 1.0, 1.0))
_MODULES: tuple[LayerModule, ...] = ("attention", "mlp")
#: Tokens converted to float32 at once.
_BLOCK = 4096


def transition_variation(
    input_1SD: torch.Tensor, output_1SD: torch.Tensor, absolute: bool = False
) -> torch.Tensor:
    """How much a module transforms every token, in length and in direction, float32 [S].

    `softmax(1 - cos(out, in))` over the S tokens, times `|out| / |in|`. O(S D).

    Args:
        input_1SD: what the module read, after the norm.
        output_1SD: what it gave, before the residual sum.
        absolute: use |cos|, as the paper writes it.

    Example:
        >>> x = torch.randn(1, 4, 8)
        >>> transition_variation(x, 2 * x)
        tensor([0.5000, 0.5000, 0.5000, 0.5000])

    Source: TransPrune, section 3.2 (arXiv 2507.20630).
    """
    cosines, ratios = [], []
    for x_BD, y_BD in zip(input_1SD[0].split(_BLOCK), output_1SD[0].split(_BLOCK), strict=True):
        x_BD, y_BD = x_BD.float(), y_BD.float()
        x_B, y_B = x_BD.norm(dim=-1), y_BD.norm(dim=-1)
        cosines.append((x_BD * y_BD).sum(-1) / (x_B * y_B).clamp(min=1e-8))
        ratios.append(y_B / x_B.clamp(min=1e-8))
    cosine_S = torch.cat(cosines)
    if absolute:
        cosine_S = cosine_S.abs()
    return (1 - cosine_S).softmax(dim=0) * torch.cat(ratios)


@dataclass(frozen=True)
class TransPrune(Method):
    """TransPrune: three cuts in the middle of the LLM by token transition and instruction.

    `retain` is the mean share of visual tokens over all decoder layers, from which the shares left
    after the cuts follow. `shares` sets them by hand, and `retain` has no say then.

    Args:
        layers: layers before which tokens go: indices, or fractions of the depth; default: 7, 9
            and 12 of 32.
        shares: shares of all visual tokens left after each of them.
        first: first layer whose transitions count; default: the one right before the first cut.
        alpha: weight of the transitions; that of the instruction's attention is 1 - alpha.
        absolute: measure directions by |cos|, as the paper writes it, instead of cos, as the
            released code does.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> TransPrune().schedule(0.41015625, 32)
        ((7, 9, 12), (0.875, 0.625, 0.125))
        >>> TransPrune(shares=(0.5, 0.25, 0.0625)).decoder_layers(28)
        (6, 8, 10)

    Source: arXiv 2507.20630, section 3.
    """

    layers: tuple[int | float, ...] | None = None
    shares: tuple[float, ...] | None = None
    first: int | float | None = None
    alpha: float = 0.5
    absolute: bool = False

    card: ClassVar[Card] = Card(
        name="transprune",
        title="TransPrune",
        paper="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
        arxiv="2507.20630",
        year=2025,
        url="https://github.com/liaolea/TransPrune",
        licence="MIT",
        stages=("decoder",),
        kind="training-free",
        summary="Drops visual tokens that middle layers hardly transform and the instruction "
        "hardly attends to, in three cuts.",
        defaults={
            "LLaVA-1.5-7B, LLaVA-NeXT-7B (High)": "before layers 7, 9 and 12 of 32, shares 0.875, "
            "0.625, 0.125 (retain 0.41)",
            "LLaVA-1.5-7B, LLaVA-NeXT-7B (Low)": "shares 0.5, 0.25, 0.0625, inferred from the "
            "published FLOPs (retain 0.3125)",
        },
        headline=(
            "LLaVA-1.5-7B at 1.56 of 3.82 TFLOPs (High): 100.0 % of the average, MME 1540 (base "
            "1506), GQA 61.4 (61.9), POPE 85.0 (85.9)",
            "LLaVA-1.5-7B at 1.19 TFLOPs (Low): 98.4 % of the average",
            "Qwen2.5-VL-7B at 45.1 %: MME 1580 (1634), POPE 87.5 (86.2)",
        ),
        notes=(
            "Ours: `retain` is the mean share over all layers. Shares lie on straight lines "
            "between the published schedules; below the lower one the cuts move towards the "
            "first layer, and once they are there the shares fall on. The first layer always "
            "sees every token, so that is the least.",
            "Directions follow the released code (1 - cos); the paper has 1 - |cos|: "
            "absolute=True.",
            "The softmax runs over the tokens of one sample, without padding and earlier turns; "
            "the released code lets the samples of a batch leak into each other.",
            "Counts are of the tokens that enter the LLM, rounded down; at least one stays.",
            "The released code leaves a timer running and cuts sequences to the tokenizer's "
            "length; neither is done here.",
            "Several items are one pool; the instruction is the text after the last of them, or "
            "the last token where there is none. Models with M-RoPE keep their positions.",
        ),
        positions="original",
        retain=0.41015625,
    )
    renumbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("layers", "shares"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.shares is not None:
            kept = (1.0, *self.shares)
            if len(kept) < 2 or any(not 0 <= b <= a for a, b in pairwise(kept)):
                raise ValueError(
                    f"shares holds fractions in [0, 1] that never rise, got {self.shares}."
                )
        num = len(_LAYERS) if self.layers is None else len(self.layers)
        if num != len(self.shares or _LAYERS):
            raise ValueError(
                f"{num} layers need {num} shares, got {self.shares or 'three published ones'}; "
                "give both layers and shares."
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha weighs two scores and lies in [0, 1], got {self.alpha}.")

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """The layers before which the published schedule drops tokens.

        Raises:
            ValueError: a layer does not exist, is the first, or does not come after the one before.

        Example:
            >>> TransPrune().cuts(32), TransPrune().cuts(28), TransPrune().cuts(4)
            ((7, 9, 12), (6, 8, 10), (1, 2, 3))
        """
        if self.layers is not None:
            found = tuple(relative_layer(layer, num_layers, "layers") for layer in self.layers)
            if any(b <= a for a, b in pairwise((0, *found))):
                raise ValueError(
                    f"layers = {self.layers} are {found} of {num_layers}; they must rise, and no "
                    "transition comes before layer 0."
                )
            return found
        cuts: list[int] = []
        for layer in _LAYERS:
            least = cuts[-1] + 1 if cuts else 1
            cuts.append(max(least, round(layer * num_layers / _DEPTH)))
        # Models of fewer than four layers have no room for all of them.
        return tuple(cut for cut in cuts if cut < num_layers)

    def schedule(self, share: float, num_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The layers before which tokens go, and the share of all tokens left after each.

        Args:
            share: mean share over all layers.
            num_layers: decoder layers.
        """
        cuts = self.cuts(num_layers)
        if self.shares is not None:
            return cuts, self.shares[len(self.shares) - len(cuts) :]
        return _schedule(share, cuts, num_layers)

    def search_space(self, share: float) -> Mapping[str, SearchRange]:
        """The weight of the transitions against the instruction's attention."""
        return {"alpha": SearchRange(0.0, 1.0)}

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """Every layer before which some budget cuts."""
        cuts = self.cuts(num_layers)
        if self.shares is not None or not cuts:
            return cuts
        moved = [ops.earlier_layers(cuts, first) for first in range(1, cuts[0] + 1)]
        return tuple(sorted(set().union(*moved)))

    def observe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Every layer whose transitions count under some budget."""
        cuts = self.decoder_layers(num_layers)
        return tuple(range(self._first(cuts, num_layers), cuts[-1])) if cuts else ()

    def observe(
        self, input_1SD: torch.Tensor, output_1SD: torch.Tensor, context: ModuleContext
    ) -> torch.Tensor | None:
        """The transition of every token in one module, [S]."""
        share = context.budget.fraction(context.num_visual)
        cuts, _ = self.schedule(share, context.num_layers)
        if not self._first(cuts, context.num_layers) <= context.layer < cuts[-1]:
            return None
        return transition_variation(input_1SD, output_1SD, self.absolute)

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Keep the visual tokens of high transition and attention, in order.

        One projection of all keys and of the instruction's queries, and their attention.
        """
        N, total = tokens.num_tokens, context.num_visual
        if context.budget.is_full or N == 0:
            return None
        cuts, shares = self.schedule(context.budget.fraction(total), context.num_layers)
        if context.layer not in cuts:
            return None
        keep = max(1, int(total * shares[cuts.index(context.layer)]))
        if keep >= N:
            return None
        first = self._first(cuts, context.num_layers)
        history = [context.observed(a, m) for a in range(first, context.layer) for m in _MODULES]
        transition_S = torch.stack(history).sum(0)
        # The instruction ends the sequence; without one, its last token speaks for it.
        num_rows = max(1, context.after_R.shape[0])
        attention_S = context.attention_ahead().mean_of_last(num_rows)[0]
        transition_N, attention_N = transition_S[context.visual_N], attention_S[context.visual_N]
        context.note("transition", transition_N, caption="of the layers so far, added up")
        context.note("attention", attention_N, caption="of the instruction, in the layer to come")
        score_N = self.score(transition_N, attention_N)
        return Reduction.select(ops.top_k(score_N, keep), N)

    def score(self, transition_N: torch.Tensor, attention_N: torch.Tensor) -> torch.Tensor:
        """Both scores, each made to sum to 1 over the visual tokens, weighed and added, [N]."""
        transition_N = transition_N / (transition_N.sum() + 1e-8)
        attention_N = attention_N / (attention_N.sum() + 1e-8)
        return self.alpha * transition_N + (1 - self.alpha) * attention_N

    def _first(self, cuts: tuple[int, ...], num_layers: int) -> int:
        before = cuts[0] - 1
        if self.first is None:
            return before
        return min(before, relative_layer(self.first, num_layers, "first"))


@lru_cache(maxsize=256)
def _schedule(
    share: float, cuts: tuple[int, ...], num_layers: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The published family: shares on straight lines between its schedules."""

    def shares_at(x: float) -> list[float]:
        below = min(int(x * (len(_PRESETS) - 1)), len(_PRESETS) - 2)
        part = x * (len(_PRESETS) - 1) - below
        pairs = zip(_PRESETS[below], _PRESETS[below + 1], strict=True)
        return [low + part * (high - low) for low, high in pairs][-len(cuts) :]

    if not cuts:
        return (), ()
    return ops.share_schedule(share, cuts, num_layers, shares_at, 1 / (len(_PRESETS) - 1))
