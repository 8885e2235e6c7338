"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches, 2 x 2 of them merged into a token.

Legend: P patches of all items of a call, m side of a merged block in patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.grid import Grid, Modality, Plane
from foveate.models.adapter import Adapter
from foveate.models.maps import checked_scores, grid_rows, stretch, unpatchify


class Qwen2VLAdapter(Adapter):
    """Qwen2-VL: every image or temporal patch (two frames) of a video is one plane."""

    family = "qwen2_vl"
    model_types: ClassVar = ("qwen2_vl",)
    docs_name = "Qwen2-VL"
    modalities: ClassVar = ("image", "video")
    mrope = True
    stream_modality: ClassVar[Modality | None] = "video"
    video_in_chunks: ClassVar[bool] = True
    tower_paths: ClassVar = {"image": "visual", "video": "visual"}
    vision_layout = "qwen_vision"

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        merge = self._visual(model).spatial_merge_size
        return [
            Grid((Plane(h // merge, w // merge),) * t, modality)
            for t, h, w in grid_rows(arguments[f"{modality}_grid_thw"])
        ]

    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        merge = self._visual(model).spatial_merge_size
        counts = [grid.num_tokens for grid in grids]
        scores = checked_scores(scores, sum(counts) * merge**2)
        merged = scores.reshape(-1, merge**2).mean(-1)
        order = self._token_order(model, grid_rows(arguments[f"{modality}_grid_thw"]))
        if order is not None:
            merged = torch.empty_like(merged).index_copy_(0, order.to(merged.device), merged)
        return list(merged.split(counts))

    def pixels(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        visual = self._visual(model)
        temporal, *patch = visual.patch_embed.proj.kernel_size
        rows = grid_rows(arguments[f"{modality}_grid_thw"])
        patches = self._pixel_values(modality, arguments).split([t * h * w for t, h, w in rows])
        return [
            stretch(
                unpatchify(item, thw, visual.spatial_merge_size, (patch[0], patch[1]), temporal)
            )
            for item, thw in zip(patches, rows, strict=True)
        ]

    def _visual(self, model: nn.Module) -> Any:
        return self.base(model).get_submodule("visual")

    def _token_order(self, model: nn.Module, rows: list[tuple[int, int, int]]) -> Tensor | None:
        """Index of the merged token at each place of the encoder's order, None where equal."""
        return None


class Qwen25VLAdapter(Qwen2VLAdapter):
    """Qwen2.5-VL: as Qwen2-VL, with an encoder that works on tokens sorted into windows."""

    family = "qwen2_5_vl"
    model_types: ClassVar = ("qwen2_5_vl",)
    docs_name = "Qwen2.5-VL"

    def _token_order(self, model: nn.Module, rows: list[tuple[int, int, int]]) -> Tensor | None:
        visual = self._visual(model)
        merge = visual.spatial_merge_size
        side = visual.window_size // merge // visual.patch_size
        order, start = [], 0
        for t, h, w in rows:
            height, width = h // merge, w // merge
            plane, y, x = torch.meshgrid(
                torch.arange(t), torch.arange(height), torch.arange(width), indexing="ij"
            )
            # Windows in raster order, and within a window (the sort is stable) its tokens too.
            window = (plane * -(-height // side) + y // side) * -(-width // side) + x // side
            order.append(window.flatten().argsort(stable=True) + start)
            start += window.numel()
        return torch.cat(order)


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Qwen3-VL: features of early encoder blocks are added behind the first decoder layers.

    Placeholders of a video are split by timestamps between its frames; the grid is the whole video.
    """

    family = "qwen3_vl"
    model_types: ClassVar = ("qwen3_vl",)
    docs_name = "Qwen3-VL"
    stream_modality: ClassVar[Modality | None] = None

    def num_deepstack(self, model: nn.Module) -> int:
        return len(self._visual(model).deepstack_visual_indexes)
