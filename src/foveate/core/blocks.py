"""Block-wise prefill: what a method reads and says before the first layer of a long prompt.

Legend: N visual tokens of one sample, T text tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from foveate.core.context import CacheContext


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which visual tokens see one another while a prompt is read.

    A visual token sees the visual tokens before it in its own block and in the `previous` blocks
    before; text before the last visual token sees everything and is seen by all. What follows the
    last visual token (the question) attends to the reduced cache instead.

    Attributes:
        block_N: number of every visual token's block, int64 [N].
        previous: blocks before its own that a token sees.
    """

    block_N: torch.Tensor
    previous: int


@dataclass(eq=False)
class PrefillContext(CacheContext):
    """Before the first layer, one sample at a time; `state` is that of `Method.cache` later.

    Attributes:
        x_ND: visual tokens as they enter the language model.
        text_TD: embeddings of the text behind the last visual token, [T, D]; of all text where
            nothing follows.
    """

    x_ND: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    text_TD: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
