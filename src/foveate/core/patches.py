"""What a method may read before the first block of a vision encoder.

Legend: B images of a call, P patches of one of them, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch

from foveate.core.context import Context
from foveate.core.grid import Grid


@dataclass(eq=False)
class PatchesContext(Context):
    """Before the first block of a vision encoder, all images of the call as one batch.

    Attributes:
        pixels_B3HW: the pictures as the encoder gets them, normalised.
        patch_size: (height, width) of a patch in pixels; patches are numbered row by row.
        num_prefix: [CLS] and register tokens at the front of the sequence.
        layouts: `layouts()` gives, for every image of the call, the grid of the visual item that it
            belongs to and its plane there; empty for an encoder alone.
        carried: what `carry` noted.

    Example:
        >>> from foveate.core import Budget
        >>> context = PatchesContext(Budget(0.5), pixels_B3HW=torch.zeros(4, 3, 8, 12),
        ...                          patch_size=(4, 4))
        >>> context.num_patches, context.clip_starts().tolist()
        (6, [True, False, False, False])
    """

    pixels_B3HW: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 3, 1, 1))
    patch_size: tuple[int, int] = (1, 1)
    num_prefix: int = 0
    layouts: Callable[[], Sequence[tuple[Grid, int]]] = tuple
    carried: MutableMapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of patches; a margin too narrow for a patch is in none."""
        height, width = self.pixels_B3HW.shape[-2:]
        return height // self.patch_size[0], width // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """P."""
        rows, columns = self.grid_shape
        return rows * columns

    def clip_starts(self) -> torch.Tensor:
        """Which images do not follow the one before them in a video, bool [B].

        Frames of one video follow each other; an image of its own, and a tile, follows nothing.
        Without layouts (an encoder alone) all images of the call are frames of one clip.
        """
        B, device = self.pixels_B3HW.shape[0], self.pixels_B3HW.device
        starts, before = [], None
        for grid, plane in self.layouts():
            follows = before is not None and before[0] is grid and before[1] + 1 == plane
            starts.append(not (follows and grid.modality == "video"))
            before = grid, plane
        starts = starts or [True] + [False] * (B - 1)
        return torch.tensor(starts, device=device)

    def carry(self, name: str, value_BP: torch.Tensor) -> None:
        """Hand one number per patch of every image, [B, P], to the same method's projector stage.

        As `EncoderContext.carry`: the numbers go the way of the features, and
        `ProjectorContext.carried_from_encoder(name)` has them per token of the language model.
        """
        self.carried[name] = value_BP
