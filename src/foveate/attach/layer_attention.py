"""Attention of a decoder layer, computed row by row from its projections.

Legend: B batch, L padded length, S tokens of a sample, R some of them, T keys with those of earlier
turns, D channels, H query heads, G key heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """Queries and keys of one sample, rotated as the layer did; queries when they are read."""
        rows_S = self.rows[sample]
        raw = {name: rows_of(part, sample, rows_S) for name, part in self.raw.items()}
        embeddings = embeddings_of_rows(self.position_embeddings, sample, rows_S)
        rule = self.rules[sample]
        k_BGSd = rule.keys(self.module, raw["k"], embeddings)
        v_BGSd = (
            raw["v"].unflatten(-1, (k_BGSd.shape[1], -1)).transpose(1, 2) if "v" in raw else None
        )
        k_BGTd, v_BGTd = _after_past(self.past[sample], k_BGSd, v_BGSd, rule)
        visual_N = torch.searchsorted(rows_S, self.visual[sample])
        projected = raw["q"]
        return LazyQueries(
            self.module,
            lambda index_R: projected if index_R is None else projected[:, index_R],
            projected.shape[1],
            k_BGTd,
            v_BGTd,
            embeddings,
            visual_N,
            rule,
        )


class LazyQueries(AttentionView):
    """An `AttentionView` whose queries are rotated when they are read, and only those.

    Most methods read a few rows of a long prompt.

    Args:
        module: the attention module.
        project: gives unrotated queries [1, R, H * d] of the tokens `index_R`; of all for None.
        num_queries: S.
        k_BGTd: rotated keys, earlier turns first.
        v_BGTd: values, or None.
        position_embeddings: (cos, sin) of the S tokens.
        visual_N: positions of the visual tokens among the S.
        rule: what the attention rule says of the tokens.
    """

    _module: nn.Module
    _project: Callable[[torch.Tensor | None], torch.Tensor]
    _num_queries: int
    _embeddings: Embeddings
    _rule: RuleOfRows

    def __init__(
        self,
        module: nn.Module,
        project: Callable[[torch.Tensor | None], torch.Tensor],
        num_queries: int,
        k_BGTd: torch.Tensor,
        v_BGTd: torch.Tensor | None,
        position_embeddings: Embeddings,
        visual_N: torch.Tensor,
        rule: RuleOfRows,
    ) -> None:
        # The base is frozen, and its `q_BHSd` is a property here.
        vars(self).update(
            k_BGTd=k_BGTd,
            v_BGTd=v_BGTd,
            scale=_scale(module),
            visual_N=visual_N,
            visible_SS=rule.visible_SS,
            _module=module,
            _project=project,
            _num_queries=num_queries,
            _embeddings=position_embeddings,
            _rule=rule,
        )

    @cached_property
    def q_BHSd(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rotated queries of all tokens, [1, H, S, d]."""
        return self._rule.queries(self._module, self._project(None), self._embeddings)

    @property
    def num_queries(self) -> int:
        """Tokens of this call, S."""
        return self._num_queries

    @torch.no_grad()
    def queries(self, index_R: torch.Tensor) -> torch.Tensor:
        """Rotated queries of the tokens `index_R`, [1, H, R, d]."""
        index_R = index_R.to(self.k_BGTd.device)
        embeddings = embeddings_of_rows(self._embeddings, 0, index_R)
        return self._rule.queries(self._module, self._project(index_R), embeddings)


def ahead_view(
    module: nn.Module,
    normed_1SD: torch.Tensor,
    position_embeddings: Embeddings,
    past: Past | None,
    visual_N: torch.Tensor,
    rule: RuleOfRows,
) -> AttentionView:
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
    k_raw = module.get_submodule("k_proj")(normed_1SD)
    k_BGSd = rule.keys(module, k_raw, position_embeddings)

    @torch.no_grad()
    def project(index_R: torch.Tensor | None) -> torch.Tensor:
        read_1RD = normed_1SD if index_R is None else normed_1SD[:, index_R]
        return module.get_submodule("q_proj")(read_1RD)

    return LazyQueries(
        module,
        project,
        normed_1SD.shape[1],
        _after_past(past, k_BGSd, None, rule)[0],
        None,
        position_embeddings,
        visual_N,
        rule,
    )


def rows_of(x_BLD: torch.Tensor, sample: int, rows_S: torch.Tensor) -> torch.Tensor:
    """Rows of one sample, [1, S, D]; without padding they are no copy."""
    one_1LD = x_BLD[sample : sample + 1]
    return one_1LD if rows_S.shape[0] == x_BLD.shape[1] else one_1LD[:, rows_S]


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
