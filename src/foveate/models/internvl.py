"""InternVL: tiles of one size, 2 x 2 patches shuffled into one token; frames are tiles too.

Legend: N tiles, P patches of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.grid import Grid, Modality
from foveate.models.llava import LlavaAdapter, patch_grid
from foveate.models.maps import checked_scores


class InternVLAdapter(LlavaAdapter):
    """InternVL 2.5 and 3: every tile is an item.

    The processor writes the tiles of an image in one run (its thumbnail last) and puts text between
    images and between the frames of a video; the model itself sees rows of tiles only.
    """

    family = "internvl"
    model_types: ClassVar = ("internvl",)
    docs_name = "InternVL"
    stream_modality: ClassVar[Modality | None] = None

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        base: Any = self.base(model)
        pixels = self._pixel_values(modality, arguments)
        height, width = patch_grid(self.towers(model)[modality], pixels)
        ratio = base.config.downsample_ratio
        return [Grid.image(int(height * ratio), int(width * ratio))] * pixels.shape[0]

    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        base: Any = self.base(model)
        pixels = self._pixel_values(modality, arguments)
        height, width = patch_grid(self.towers(model)[modality], pixels)
        scores = checked_scores(scores, pixels.shape[0] * height * width)
        shuffled = base.pixel_shuffle(
            scores.reshape(-1, height, width, 1), scale_factor=base.config.downsample_ratio
        )
        return list(shuffled.mean(-1).flatten(1))
