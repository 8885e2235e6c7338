"""SmolVLM and Idefics3: images cut into blocks, each shuffled into fewer tokens; frames are blocks.

Legend: N blocks (padding left out), P patches of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.grid import Grid, Modality
from foveate.models.adapter import Adapter
from foveate.models.llava import patch_grid
from foveate.models.maps import checked_scores, stretch_each


class SmolVLMAdapter(Adapter):
    """SmolVLM, SmolVLM 2: every block of an image, its thumbnail and every frame is an item.

    The processor writes row and column marks between the blocks of an image.
    """

    family = "smolvlm"
    model_types: ClassVar = ("smolvlm",)
    docs_name = "SmolVLM"
    tower_paths: ClassVar = {"image": "vision_model"}
    language_path = "text_model"
    vision_layout = "smolvlm_vision"

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        base: Any = self.base(model)
        pixels = self._pixel_values(modality, arguments)
        height, width = patch_grid(self.towers(model)[modality], pixels)
        factor = base.config.scale_factor
        grid = Grid.image(height // factor, width // factor)
        # Padding is left out by the model; its features tell how many blocks are real, and before
        # there are any, the pixels do.
        if features is None:
            return [grid] * int((pixels.flatten(0, 1) != 0).flatten(1).any(1).sum())
        parts = [features] if isinstance(features, Tensor) else features
        tokens = sum(part.shape[:-1].numel() for part in parts)
        return [grid] * (tokens // grid.num_tokens)

    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        base: Any = self.base(model)
        factor = base.config.scale_factor
        scores = checked_scores(scores, sum(grid.num_patches for grid in grids) * factor**2)
        shuffled = base.connector.pixel_shuffle(scores.reshape(len(grids), -1, 1), factor)
        return list(shuffled.mean(-1))

    def pixels(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        blocks = self._pixel_values(modality, arguments).flatten(0, 1)
        return stretch_each(blocks[(blocks != 0).flatten(1).any(1)])


class Idefics3Adapter(SmolVLMAdapter):
    """Idefics3, of which SmolVLM is the small sibling."""

    family = "idefics3"
    model_types: ClassVar = ("idefics3",)
    docs_name = "Idefics3"
    vision_layout = "idefics3_vision"
