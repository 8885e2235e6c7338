"""What runs between the blocks of a backbone, and the seams at which an attachment may change it.

Legend: B samples, K tokens that are left, N places of the full sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Stream:
    """A batch of sequences on their way through a backbone.

    Attributes:
        states: tensors [B, K, ...] that go from block to block together (hidden states, and the
            residual stream where a backbone has one of its own).
        length: N, places of the full sequence at this point.
        place_BK: place of every token there, int64 [B, K], ascending; None: all N, in order.
        mask_BK: 0 where a token is kept in its place but is no input; None: all are.
        gaps: scans step over the places between tokens; False: what is left counts as neighbours.
    """

    states: tuple[Tensor, ...]
    length: int
    place_BK: Tensor | None = None
    mask_BK: Tensor | None = None
    gaps: bool = True

    def behind(self, *states: Tensor) -> Stream:
        """The same tokens with what a block has made of them."""
        return replace(self, states=states)

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.states[0].shape[1]


class Seam(nn.Module):
    """Hands the stream on; a forward hook may hand on another one. It has no parameters.

    A backbone of L blocks has L + 1 of them: one before every block, and one behind the last.

    Example:
        >>> import torch
        >>> seam = Seam()
        >>> seam(Stream((torch.zeros(1, 4, 8),), 4)).num_tokens
        4
    """

    def forward(self, stream: Stream) -> Stream:
        """The stream as it is."""
        return stream


class Tap(nn.Module):
    """Hands on what it gets, for whoever wants to look at it."""

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


def seams(num_blocks: int) -> nn.ModuleList:
    """The seams of a backbone."""
    return nn.ModuleList(Seam() for _ in range(num_blocks + 1))
