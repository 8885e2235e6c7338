"""LLaVA: one image is one plane of patches.

Legend: N images, P patches of an image, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.grid import Grid, Modality, Plane
from foveate.errors import UnsupportedModelError
from foveate.models.adapter import Adapter
from foveate.models.maps import checked_scores, prepend_nan, stretch_each
from foveate.models.tower import VisionTower


class LlavaAdapter(Adapter):
    """LLaVA 1.5 and models of its shape: encoder, two-layer projector, language model."""

    family = "llava"
    model_types: ClassVar = ("llava",)
    docs_name = "LLaVA"
    feature_layer_key: ClassVar[str | None] = "vision_feature_layer"
    stream_modality: ClassVar[Modality | None] = "image"

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        plane = self._feature_plane(model, modality, arguments)
        return [Grid((plane,), modality)] * self._pixel_values(modality, arguments).shape[0]

    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        scores = checked_scores(scores, sum(grid.num_patches for grid in grids))
        scores_NP = scores.reshape(len(grids), -1)
        return list(prepend_nan(scores_NP, grids[0].planes[0].prefix))

    def pixels(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        return stretch_each(self._pixel_values(modality, arguments))

    def _feature_plane(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any]
    ) -> Plane:
        """The tokens of one image or frame that the projector gets."""
        tower = self.towers(model)[modality]
        height, width = patch_grid(tower, self._pixel_values(modality, arguments))
        strategy = self._option(model, arguments, "vision_feature_select_strategy") or "default"
        return Plane(height, width, prefix=kept_prefix(tower, strategy))


def patch_grid(tower: VisionTower, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of images [..., h, w]."""
    height, width = pixel_values.shape[-2:]
    return height // tower.patch_size[0], width // tower.patch_size[1]


def kept_prefix(tower: VisionTower, strategy: str) -> int:
    """Prefix tokens that stay in the features under a `vision_feature_select_strategy`.

    Raises:
        UnsupportedModelError: "default" on an encoder without [CLS] would cut off the first patch.
    """
    if strategy == "full":
        return tower.num_prefix
    if tower.num_prefix == 0:
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={strategy!r} removes the first token of an encoder "
            'without [CLS], which is a patch; set it to "full" in the config.'
        )
    return tower.num_prefix - 1
