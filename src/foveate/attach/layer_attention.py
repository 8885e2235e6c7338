"""Attention of a decoder layer, computed row by row from its projections.

Legend: B batch, L padded length, S tokens of a sample, R some of them, T keys with those of earlier
turns, D channels, H query heads, G key heads, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.attach.rules import RuleOfRows
from foveate.core import AttentionView

if TYPE_CHECKING:
    from foveate.attach.cache import ReducedLayer

#: (keys, values) of one sample, each [1, G, T, d].
Past = tuple[torch.Tensor, torch.Tensor]
#: (cos, sin), each [.., B or 1, L, d].
Embeddings = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class LayerAttention:
    """What is needed to compute any attention row of a layer that has run.

    Attributes:
        module: the attention module.
        raw: outputs of its projections by name: "q" [B, L, H * d], "k" and, where it is read, "v"
            [B, L, G * d].
        position_embeddings: (cos, sin) of its tokens.
        past: per sample, keys and values that earlier calls left, or None.
        rows: per sample, the valid columns of that layer, int64 [S].
        ids: per sample, the stable numbers of those tokens.
        visual: per sample, the visual columns of that layer.
        rules: per sample, what the attention rule says of those tokens.
    """

    module: nn.Module
    raw: dict[str, torch.Tensor]
    position_embeddings: Embeddings
    past: list[Past | None]
    rows: list[torch.Tensor]
    ids: list[torch.Tensor]
    visual: list[torch.Tensor]
    rules: list[RuleOfRows]

    def view(self, sample: int) -> AttentionView:
        """Queries and keys of one sample, rotated as the layer did."""
        rows_S = self.rows[sample]
        raw = {name: part[sample : sample + 1, rows_S] for name, part in self.raw.items()}
        embeddings = embeddings_of_rows(self.position_embeddings, sample, rows_S)
        rule = self.rules[sample]
        q_BHSd = rule.queries(self.module, raw["q"], embeddings)
        k_BGSd = rule.keys(self.module, raw["k"], embeddings)
        v_BGSd = (
            raw["v"].unflatten(-1, (k_BGSd.shape[1], -1)).transpose(1, 2) if "v" in raw else None
        )
        k_BGTd, v_BGTd = _after_past(self.past[sample], k_BGSd, v_BGSd, rule)
        visual_N = torch.searchsorted(rows_S, self.visual[sample])
        return AttentionView(q_BHSd, k_BGTd, _scale(self.module), visual_N, v_BGTd, rule.visible_SS)


class AheadView(AttentionView):
    """Attention that a layer would have over one sample's tokens, before it runs.

    Keys are projected at once, queries when they are read.

    Args:
        module: the attention module.
        normed_1SD: what it would read.
        position_embeddings: (cos, sin) of the S tokens.
        past: keys and values that earlier calls left, or None.
        visual_N: positions of the visual tokens among the S.
        rule: what the attention rule says of the tokens.
    """

    _module: nn.Module
    _normed_1SD: torch.Tensor
    _embeddings: Embeddings
    _rule: RuleOfRows

    def __init__(
        self,
        module: nn.Module,
        normed_1SD: torch.Tensor,
        position_embeddings: Embeddings,
        past: Past | None,
        visual_N: torch.Tensor,
        rule: RuleOfRows,
    ) -> None:
        k_raw = module.get_submodule("k_proj")(normed_1SD)
        k_BGSd = rule.keys(module, k_raw, position_embeddings)
        # The base is frozen, and its `q_BHSd` is a property here.
        vars(self).update(
            k_BGTd=_after_past(past, k_BGSd, None, rule)[0],
            scale=_scale(module),
            visual_N=visual_N,
            visible_SS=rule.visible_SS,
            _module=module,
            _normed_1SD=normed_1SD,
            _embeddings=position_embeddings,
            _rule=rule,
        )

    @cached_property
    def q_BHSd(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rotated queries of all tokens, [1, H, S, d]."""
        return self.queries(torch.arange(self.num_queries))

    @property
    def num_queries(self) -> int:
        """Tokens of this call, S."""
        return self._normed_1SD.shape[1]

    @torch.no_grad()
    def queries(self, index_R: torch.Tensor) -> torch.Tensor:
        """Rotated queries of the tokens `index_R`, [1, H, R, d]."""
        index_R = index_R.to(self._normed_1SD.device)
        q_raw = self._module.get_submodule("q_proj")(self._normed_1SD[:, index_R])
        embeddings = embeddings_of_rows(self._embeddings, 0, index_R)
        return self._rule.queries(self._module, q_raw, embeddings)


def embeddings_of_rows(embeddings: Embeddings, sample: int, rows_S: torch.Tensor) -> Embeddings:
    """(cos, sin) of one sample's rows."""
    cos, sin = embeddings
    return take_rows(cos, sample, rows_S), take_rows(sin, sample, rows_S)


def take_rows(part: torch.Tensor, sample: int, rows_S: torch.Tensor) -> torch.Tensor:
    """(cos or sin) [.., B or 1, L, d] of one sample's rows, [.., 1, S, d]."""
    row = sample if part.shape[-3] > 1 else 0
    return part[..., row : row + 1, rows_S, :]


def past_of(cached: ReducedLayer | None, sample: int, num_past: int) -> Past | None:
    """Keys and values of one sample in the first `num_past` slots, without padding."""
    if cached is None or num_past == 0:
        return None
    past = []
    for part in cached.kv:
        part_BGTd = part[sample : sample + 1, :, :num_past]
        if cached.valid_BT is not None:
            part_BGTd = part_BGTd[:, :, cached.valid_BT[sample, :num_past]]
        past.append(part_BGTd)
    return past[0], past[1]


def _after_past(
    past: Past | None, k_BGSd: torch.Tensor, v_BGSd: torch.Tensor | None, rule: RuleOfRows
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if past is None:
        return k_BGSd, v_BGSd
    k_BGTd = torch.cat([rule.past(past[0]), k_BGSd], dim=2)
    return k_BGTd, None if v_BGSd is None else torch.cat([past[1], v_BGSd], dim=2)


def _scale(module: Any) -> float:
    return float(getattr(module, "scaling", module.head_dim**-0.5))
