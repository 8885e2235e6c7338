"""Video-LLaVA: separate encoders for images and videos; [CLS] of every frame stays in the features.

Legend: V videos, T frames of one, P patches of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.grid import Grid, Modality, Plane
from foveate.models.llava import LlavaAdapter, patch_grid
from foveate.models.maps import checked_scores, prepend_nan, stretch


class VideoLlavaAdapter(LlavaAdapter):
    """Video-LLaVA: images as in LLaVA, videos as planes of [CLS] and patches."""

    family = "video_llava"
    model_types: ClassVar = ("video_llava",)
    docs_name = "Video-LLaVA"
    stream_modality: ClassVar[Modality | None] = "video"
    video_in_chunks: ClassVar[bool] = True
    modalities: ClassVar = ("image", "video")
    tower_paths: ClassVar = {"image": "image_tower", "video": "video_tower"}

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        if modality == "image":
            return super().grids(model, modality, arguments, features)
        tower = self.towers(model)["video"]
        pixels = self._pixel_values(modality, arguments)
        height, width = patch_grid(tower, pixels)
        # The select strategy is not applied to videos, whatever the config says.
        plane = Plane(height, width, prefix=tower.num_prefix)
        return [Grid((plane,) * pixels.shape[1], "video")] * pixels.shape[0]

    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        if modality == "image":
            return super().token_scores(model, modality, scores, arguments, grids)
        scores = checked_scores(scores, sum(grid.num_patches for grid in grids))
        plane = grids[0].planes[0]
        frames = prepend_nan(scores.reshape(-1, plane.num_patches), plane.prefix)
        return list(frames.reshape(len(grids), -1))

    def pixels(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        if modality == "image":
            return super().pixels(model, modality, arguments, grids)
        return [stretch(video) for video in self._pixel_values(modality, arguments)]
