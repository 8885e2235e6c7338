"""Where visual tokens sit: planes of rows and columns, and the special tokens between them.

Legend: N tokens of one visual item (one image or one video), in the order in which the language
model sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal

import torch

Modality = Literal["image", "video"]


class TokenKind(IntEnum):
    """What a visual token stands for; reductions carry it along."""

    PATCH = 0
    NEWLINE = 1
    CLS = 2
    STATIC = 3
    CONTEXT = 4


@dataclass(frozen=True)
class Plane:
    """One rectangle of tokens: a video frame, an image, or one tile mosaic.

    Args:
        height: rows of tokens.
        width: columns of tokens.
        row_newline: a newline token closes every row.
        prefix: special tokens ([CLS]) before the first row.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> Plane(2, 3, row_newline=True, prefix=1).num_tokens
        9
    """

    height: int
    width: int
    row_newline: bool = False
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.prefix < 0:
            raise ValueError(
                f"A plane needs height >= 1, width >= 1 and prefix >= 0, got {self.height} x "
                f"{self.width} with prefix {self.prefix}."
            )

    @property
    def num_patches(self) -> int:
        """Tokens that stand for pixels."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Patches, prefix and row newlines."""
        return self.num_patches + self.prefix + (self.height if self.row_newline else 0)


@dataclass(frozen=True)
class Grid:
    """The token layout of one visual item as the language model sees it.

    A video is one plane per frame (or per temporal patch); an image one plane; an any-resolution
    image a thumbnail plane and a mosaic plane; clips of different resolution planes of different
    size. `newlines_at_end` counts the newline tokens after the last plane.

    Args:
        planes: the planes in token order.
        modality: "image" or "video".
        newlines_at_end: newline tokens that close the item.

    Raises:
        ValueError: no plane, an unknown modality, or fewer than 0 newlines.

    Example:
        >>> grid = Grid.video(frames=4, height=14, width=14, newlines_at_end=1)
        >>> grid.num_tokens, grid.num_patches, grid.shape
        (785, 784, (4, 14, 14))
        >>> Grid((Plane(2, 2), Plane(3, 4, row_newline=True))).num_tokens
        19
    """

    planes: tuple[Plane, ...]
    modality: Modality = "image"
    newlines_at_end: int = 0

    def __post_init__(self) -> None:
        if not self.planes:
            raise ValueError("A grid needs at least one plane, got none.")
        if self.modality not in ("image", "video"):
            raise ValueError(f'modality must be "image" or "video", got {self.modality!r}.')
        if self.newlines_at_end < 0:
            raise ValueError(f"newlines_at_end must be >= 0, got {self.newlines_at_end}.")

    @classmethod
    def image(
        cls,
        height: int,
        width: int,
        *,
        row_newline: bool = False,
        prefix: int = 0,
        newlines_at_end: int = 0,
    ) -> Grid:
        """One image of `height` x `width` tokens; the options are those of `Plane` and `Grid`."""
        return cls((Plane(height, width, row_newline, prefix),), "image", newlines_at_end)

    @classmethod
    def video(
        cls,
        frames: int,
        height: int,
        width: int,
        *,
        row_newline: bool = False,
        prefix: int = 0,
        newlines_at_end: int = 0,
    ) -> Grid:
        """A video of `frames` planes of `height` x `width` tokens; options as for `image`."""
        return cls((Plane(height, width, row_newline, prefix),) * frames, "video", newlines_at_end)

    @property
    def num_tokens(self) -> int:
        """Tokens of the item, newline and [CLS] tokens included."""
        return sum(plane.num_tokens for plane in self.planes) + self.newlines_at_end

    @property
    def num_patches(self) -> int:
        """Tokens that stand for pixels."""
        return sum(plane.num_patches for plane in self.planes)

    @property
    def num_special(self) -> int:
        """Tokens that no row holds: [CLS] tokens and the newlines at the end."""
        return self.newlines_at_end + sum(plane.prefix for plane in self.planes)

    @property
    def is_uniform(self) -> bool:
        """Whether all planes are equal, so that patches reshape to [frames, height, width]."""
        return len(set(self.planes)) == 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of a uniform grid.

        Raises:
            ValueError: the planes differ in size.
        """
        if not self.is_uniform:
            sizes = sorted({(plane.height, plane.width) for plane in self.planes})
            raise ValueError(f"This grid has planes of different sizes {sizes}; read `planes`.")
        return len(self.planes), self.planes[0].height, self.planes[0].width

    @cached_property
    def _table(self) -> tuple[torch.Tensor, torch.Tensor]:
        # On the CPU whatever the default device: callers ask for theirs.
        rows: list[torch.Tensor] = []
        kinds: list[torch.Tensor] = []
        for index, plane in enumerate(self.planes):
            width = plane.width + int(plane.row_newline)
            yx = torch.cartesian_prod(
                torch.arange(plane.height, device="cpu"), torch.arange(width, device="cpu")
            )
            yx = torch.cat([yx.new_zeros(plane.prefix, 2), yx])
            kind = torch.full((plane.num_tokens,), TokenKind.PATCH.value, device="cpu")
            kind[yx[:, 1] == plane.width] = TokenKind.NEWLINE.value
            kind[: plane.prefix] = TokenKind.CLS.value
            rows.append(torch.nn.functional.pad(yx, (1, 0), value=index))
            kinds.append(kind)
        if self.newlines_at_end:
            last = self.planes[-1]
            end = torch.tensor([[len(self.planes) - 1, last.height - 1, last.width]], device="cpu")
            rows.append(end.expand(self.newlines_at_end, 3))
            newline = TokenKind.NEWLINE.value
            kinds.append(torch.full((self.newlines_at_end,), newline, device="cpu"))
        return torch.cat(rows), torch.cat(kinds)

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(time, row, column) of every token, int64 [N, 3], a tensor of the caller's own.

        A newline sits one column past its row, those at the end past the last row; a prefix token
        sits at row 0, column 0.
        """
        return self._table[0].to(device, copy=True)

    def kinds(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The `TokenKind` of every token, int64 [N], a tensor of the caller's own."""
        return self._table[1].to(device, copy=True)

    def patch_index(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Indices of the tokens that stand for pixels, int64 [num_patches], ascending."""
        return (self._table[1] == TokenKind.PATCH).nonzero()[:, 0].to(device)
