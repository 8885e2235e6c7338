"""Attention of a decoder layer that has run, recomputed row by row from its projections.

Legend: B batch, L padded length, S tokens of a sample, H query heads, G key heads, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from foveate.core import AttentionView
from foveate.models.rotary import project_text_qk


@dataclass(eq=False)
class LayerAttention:
    """What is needed to recompute any attention row of a layer that has run.

    Attributes:
        module: the attention module.
        q_raw, k_raw: outputs of its projections, [B, L, H * d] and [B, L, G * d].
        position_embeddings: (cos, sin) of its tokens.
        past: keys that earlier calls left and their validity, or None.
        rows: per sample, the valid columns of that layer, int64 [S].
        ids: per sample, the stable numbers of those tokens.
        visual: per sample, the visual columns of that layer.
    """

    module: nn.Module
    q_raw: torch.Tensor
    k_raw: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    past: tuple[torch.Tensor, torch.Tensor | None] | None
    rows: list[torch.Tensor]
    ids: list[torch.Tensor]
    visual: list[torch.Tensor]

    def view(self, sample: int) -> AttentionView:
        rows_S = self.rows[sample]
        cos, sin = (take_rows(part, sample, rows_S) for part in self.position_embeddings)
        q_BHSd, k_BGSd = project_text_qk(
            self.module,
            self.q_raw[sample : sample + 1, rows_S],
            self.k_raw[sample : sample + 1, rows_S],
            (cos, sin),
        )
        assert k_BGSd is not None
        if self.past is not None:
            keys, valid = self.past
            past_BGTd = keys[sample : sample + 1]
            if valid is not None:
                past_BGTd = past_BGTd[:, :, valid[sample]]
            k_BGSd = torch.cat([past_BGTd, k_BGSd], dim=2)
        scale = float(getattr(self.module, "scaling", q_BHSd.shape[-1] ** -0.5))
        return AttentionView(q_BHSd, k_BGSd, scale, torch.searchsorted(rows_S, self.visual[sample]))


def take_rows(part: torch.Tensor, sample: int, rows_S: torch.Tensor) -> torch.Tensor:
    """(cos or sin) [.., B or 1, L, d] of one sample's rows, [.., 1, S, d]."""
    row = sample if part.shape[-3] > 1 else 0
    return part[..., row : row + 1, rows_S, :]
