"""Stages of an encoder whose blocks attend in windows: what a method may read and do there.

Legend: B images, N tokens of a stage's plane in raster order, M queries, L tokens they read, T
semantic tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from foveate.core.context import Context
from foveate.core.reduction import Reduction


class ReadingBlock(Protocol):
    """A transformer block whose tokens may read others than those of their window."""

    @property
    def inner(self) -> int:
        """Width inside its MLP."""
        ...

    def read(self, x_BMC: torch.Tensor, read_BLC: torch.Tensor) -> torch.Tensor:
        """The attention branch alone, [B, M, C]."""
        ...

    def think(self, x_BMC: torch.Tensor) -> torch.Tensor:
        """Tokens behind the MLP branch, [B, M, C]."""
        ...

    def __call__(self, x_BMC: torch.Tensor, read_BLC: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens behind the block; they read `read_BLC`, or one another, [B, M, C]."""
        ...


@dataclass(eq=False)
class WindowContext(Context):
    """Some consecutive blocks of a stage, that a method runs in its own way.

    Attributes:
        group: which of the stage's groups of blocks, from 0.
        layer: index of the group's first block among those of the encoder.
        plane: rows and columns of the stage's tokens.
        window: rows and columns of a window; windows fill the plane.
        blocks: the group's blocks with their own weights, without what they know of places in a
            window.
        num_heads: of their attention.
    """

    group: int = 0
    layer: int = 0
    plane: tuple[int, int] = (1, 1)
    window: tuple[int, int] = (1, 1)
    blocks: Sequence[ReadingBlock] = ()
    num_heads: int = 1


class WindowStep(NamedTuple):
    """What a method made of a stage's plane.

    Attributes:
        x_BNC: the plane, whole again.
        reduction: from its N tokens to those that the blocks in between ran on.
        flops: of one image.
    """

    x_BNC: torch.Tensor
    reduction: Reduction
    flops: int


class WindowMethod(Protocol):
    """A method that can take blocks of a windowed stage over.

    Attributes:
        window_group: blocks that it takes together; the first of them runs as ever.
    """

    window_group: int

    def encoder_windows(self, x_BNC: torch.Tensor, context: WindowContext) -> WindowStep | None:
        """Run the blocks behind the first of a group; None: they run as ever."""
        ...
