"""A cache rebuilt under the question: keys before rotary positions, reduced, rotated anew.

Legend: G key heads, C context tokens of one sample (all up to its last visual token), N visual
tokens among them, T text tokens among them, M entries of the rebuilt cache, d head channels, P rows
of position ids.
"""

from __future__ import annotations

import torch

from foveate.core import Reduction
from foveate.models.rotary import rotate

Rotation = tuple[torch.Tensor, torch.Tensor]


def unrotate(k_BGCd: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Keys as they were before rotary positions, in float32.

    Args:
        k_BGCd: rotated keys.
        rotation: (cos, sin) they were rotated with, [B or 1, C, R]; a factor that scales both
            (as YaRN's) is taken out again, and rounding of cos and sin cancels.
    """
    cos, sin = (part[:, None].float() for part in rotation)
    norm = cos.square() + sin.square()
    return rotate(k_BGCd.float(), cos / norm, -sin / norm)


class Rebuilt:
    """Where the entries of one sample's rebuilt cache come from; text stays as it is.

    Args:
        visual_N: places of the visual tokens in the context, ascending.
        num_context: C.
        reduction: what becomes of the visual tokens; None leaves all.
        position_PC: position ids of the context.
        first: renumber contiguously from here; None: entries keep their positions, averages take
            the mean of theirs.

    Attributes:
        slot_M: place in the context that each entry takes, ascending.
        position_PM: its position ids; real numbers where they are means.
        kept_M: entries that are one token at its old position.
    """

    def __init__(
        self,
        visual_N: torch.Tensor,
        num_context: int,
        reduction: Reduction | None,
        position_PC: torch.Tensor,
        first: torch.Tensor | None,
    ) -> None:
        device = visual_N.device
        is_text_C = torch.ones(num_context, dtype=torch.bool, device=device)
        is_text_C[visual_N] = False
        self.text_T, self.visual_N = is_text_C.nonzero()[:, 0], visual_N
        if reduction is None:
            reduction = Reduction.identity(visual_N.shape[0], device=device)
        self.reduction = reduction
        anchor_M = visual_N[reduction.anchor_BM[0]]
        self.slot_M, self.order_M = torch.cat([self.text_T, anchor_M]).sort()
        single_M = torch.ones(self.text_T.shape[0], dtype=torch.bool, device=device)
        if reduction.kind != "select":
            group_N = reduction.groups_BN[0]
            sources_M = torch.bincount(group_N[group_N >= 0], minlength=anchor_M.shape[0])
            single_M = torch.cat([single_M, sources_M == 1])[self.order_M]
        else:
            single_M = torch.ones_like(self.slot_M, dtype=torch.bool)
        if first is None:
            self.position_PM = torch.stack(
                [
                    self.take(row_C[None, None, :, None].double())[0, 0, :, 0]
                    for row_C in position_PC
                ]
            )
            if not bool(self.position_PM.frac().any()):
                self.position_PM = self.position_PM.long()
        else:
            count = torch.arange(self.slot_M.shape[0], device=device)
            self.position_PM = (first + count).expand(position_PC.shape[0], -1)
        same_M = (self.position_PM == position_PC[:, self.slot_M]).all(dim=0)
        self.kept_M = single_M & same_M

    @property
    def length(self) -> int:
        """M."""
        return self.slot_M.shape[0]

    def take(self, x_1GCd: torch.Tensor) -> torch.Tensor:
        """Text rows as they are and visual rows reduced, in the order of the prompt."""
        visual_1NGd = x_1GCd[:, :, self.visual_N].transpose(1, 2)
        reduced_1GMd = self.reduction.apply(visual_1NGd).transpose(1, 2)
        return torch.cat([x_1GCd[:, :, self.text_T], reduced_1GMd], dim=2)[:, :, self.order_M]

    def keys(
        self, rotated_1GCd: torch.Tensor, bare_1GCd: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        """Keys of the rebuilt cache, [1, G, M, d]; entries that did not change are bit-exact.

        Args:
            rotated_1GCd: keys of the context at their old positions.
            bare_1GCd: the same before rotation (see `unrotate`).
            rotation: (cos, sin) of `position_PM`, [1, M, R].
        """
        cos, sin = (part[:, None].float() for part in rotation)
        moved_1GMd = rotate(self.take(bare_1GCd), cos, sin).to(rotated_1GCd.dtype)
        return rotated_1GCd[:, :, self.slot_M].where(self.kept_M[:, None], moved_1GMd)
