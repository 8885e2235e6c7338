"""Encoder-stage methods for tests, and the forward pass of a shortened encoder written by hand.

Legend: B images, N tokens of one of them (prefix included), M tokens left, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from oracle_methods import _card

from foveate.core import Method, Reduction
from foveate.models.tower import VisionTower


@dataclass(frozen=True)
class Pairs(Method):
    """Block 1 averages neighbouring patches, weighted by size; block 2 drops every fourth one."""

    card = _card("pairs", "encoder")
    encoder_point: ClassVar = "after_attention"
    proportional: bool = True

    @property
    def proportional_attention(self) -> bool:
        return self.proportional

    def encoder(self, tokens, context):
        prefix, batch, num = context.num_prefix, tokens.batch, tokens.num_tokens
        if context.layer == 1:
            target_N = torch.arange(num)
            target_N[prefix:] = prefix + (target_N[prefix:] - prefix) // 2
            num_out = int(target_N[-1]) + 1
            return Reduction.merge(target_N.expand(batch, -1), num_out, tokens.size_BN)
        if context.layer == 2:
            keep_M = torch.tensor([i for i in range(num) if i < prefix or (i - prefix) % 4])
            return Reduction.select(keep_M.expand(batch, -1), num)
        return None


@dataclass(frozen=True)
class PairsAtStart(Pairs):
    card = _card("pairs_at_start", "encoder")
    encoder_point: ClassVar = "block_start"


@dataclass(frozen=True)
class PairsAtEnd(Pairs):
    card = _card("pairs_at_end", "encoder")
    encoder_point: ClassVar = "block_end"


@dataclass(frozen=True)
class Keep(Method):
    """Reduces nothing, in two ways."""

    card = _card("keep", "encoder")

    def encoder(self, tokens, context):
        if context.layer % 2:
            return None
        return Reduction.identity(tokens.num_tokens, tokens.batch)


@dataclass(frozen=True)
class Reverse(Method):
    """Block 0 turns the order of the patches round: as many tokens as before, all of them moved."""

    card = _card("reverse", "encoder")

    def encoder(self, tokens, context):
        if context.layer:
            return None
        prefix, num = context.num_prefix, tokens.num_tokens
        order_N = torch.cat([torch.arange(prefix), torch.arange(num - 1, prefix - 1, -1)])
        return Reduction.select(order_N.expand(tokens.batch, -1), num)


METHODS = (Pairs(), PairsAtStart(), PairsAtEnd())


class ByHand:
    """A block as its paper has it, with a reduction at one of its three points.

    Attributes:
        reduction: from all tokens to the present ones, or None.
        attention_rows: attention of the last block that ran (eager models only), [B, H, M, M].
        sizes_BM: sizes that block's attention was weighted with.
    """

    def __init__(self, tower: VisionTower, method: Method) -> None:
        self.tower = tower
        self.method = method
        self.reduction: Reduction | None = None
        self.size_BN: torch.Tensor | None = None
        self.attention_rows: torch.Tensor | None = None
        self.reduction_of_rows: Reduction | None = None
        self.sizes_of_rows: torch.Tensor | None = None

    def __call__(self, x_BNC: torch.Tensor, last: int) -> torch.Tensor:
        """The output of block `last`, shortened."""
        for index in range(last + 1):
            x_BNC = self.block(index, x_BNC)
        return x_BNC

    def block(self, index: int, x_BNC: torch.Tensor) -> torch.Tensor:
        block: Any = self.tower.blocks[index]
        names = (("layernorm_before", "layernorm_after"), ("norm1", "norm2"))
        names += (("layer_norm1", "layer_norm2"),)
        first, second = next(pair for pair in names if hasattr(block, pair[0]))
        x_BNC = self.reduce("block_start", index, x_BNC)
        mask = None
        if self.size_BN is not None and self.method.proportional_attention:
            mask = self.size_BN.log()[:, None, None]
        out = self.tower.attentions[index](getattr(block, first)(x_BNC), attention_mask=mask)
        self.attention_rows, self.sizes_of_rows = out[1], self.size_BN
        self.reduction_of_rows = self.reduction
        x_BNC = x_BNC + self.scaled(block, 1, out[0])
        x_BNC = self.reduce("after_attention", index, x_BNC)
        x_BNC = x_BNC + self.scaled(block, 2, block.mlp(getattr(block, second)(x_BNC)))
        return self.reduce("block_end", index, x_BNC)

    @staticmethod
    def scaled(block: Any, number: int, x: torch.Tensor) -> torch.Tensor:
        if hasattr(block, f"layer_scale{number}"):
            return getattr(block, f"layer_scale{number}")(x)
        return getattr(block, f"lambda_{number}", 1.0) * x

    def reduce(self, point: str, index: int, x_BNC: torch.Tensor) -> torch.Tensor:
        if point != self.method.encoder_point or index not in (1, 2):
            return x_BNC
        prefix = self.tower.num_prefix
        if index == 2:
            keep = [i for i in range(x_BNC.shape[1]) if i < prefix or (i - prefix) % 4]
            self.note(Reduction.select(torch.tensor([keep] * len(x_BNC)), x_BNC.shape[1]))
            assert self.size_BN is not None
            self.size_BN = self.size_BN[:, keep]
            return x_BNC[:, keep]
        patches = x_BNC[:, prefix:]
        parts = [patches[:, i : i + 2].mean(1) for i in range(0, patches.shape[1], 2)]
        sizes = [1.0] * prefix + [2.0] * (patches.shape[1] // 2) + [1.0] * (patches.shape[1] % 2)
        self.size_BN = torch.tensor([sizes] * len(x_BNC))
        group = [*range(prefix), *(prefix + i // 2 for i in range(patches.shape[1]))]
        self.note(Reduction.merge(torch.tensor([group] * len(x_BNC)), len(sizes)))
        return torch.cat([x_BNC[:, :prefix], torch.stack(parts, dim=1)], dim=1)

    def note(self, reduction: Reduction) -> None:
        self.reduction = reduction if self.reduction is None else self.reduction.then(reduction)
