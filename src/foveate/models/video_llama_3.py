"""VideoLLaMA 3: packed patches of native resolution; videos are averaged over 2 x 2, images not.

Legend: P patches of all items of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.grid import Grid, Modality, Plane
from foveate.errors import UnsupportedModelError
from foveate.models.adapter import Adapter
from foveate.models.maps import checked_scores, grid_rows, stretch, unpatchify


class VideoLlama3Adapter(Adapter):
    """VideoLLaMA 3: every image or frame is one plane, shrunk by its merge size.

    Placeholders of a video are split by timestamps between its frames; the grid is the whole video.
    """

    family = "video_llama_3"
    model_types: ClassVar = ("video_llama_3",)
    docs_name = "VideoLLaMA 3"
    modalities: ClassVar = ("image", "video")
    tower_paths: ClassVar = {"image": "vision_model", "video": "vision_model"}
    vision_layout = "video_llama_3_vision"

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        return [
            Grid((Plane(h // merge, w // merge),) * t, modality)
            for (t, h, w), merge in self._rows(modality, arguments)
        ]

    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        rows = self._rows(modality, arguments)
        scores = checked_scores(scores, sum(t * h * w for (t, h, w), _ in rows))
        tower: Any = self.base(model).get_submodule("vision_model")
        grid_thw, merge_sizes = self._layout(modality, arguments)
        shrunk = tower.pixel_unshuffle(scores.reshape(-1, 1), grid_thw, merge_sizes)
        return list(shrunk[:, 0].split([grid.num_tokens for grid in grids]))

    def pixels(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        patch = self.towers(model)[modality].patch_size
        rows = self._rows(modality, arguments)
        counts = [t * h * w for (t, h, w), _ in rows]
        patches = self._pixel_values(modality, arguments).split(counts)
        return [
            stretch(unpatchify(item, thw, merge, patch))
            for item, (thw, merge) in zip(patches, rows, strict=True)
        ]

    def _layout(self, modality: Modality, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
        """Grids and merge sizes of the call.

        `get_video_features` hands its arguments on to `get_image_features`, so both names count.
        """
        names = (modality, "image")
        thw = next(v for n in names if (v := arguments.get(f"{n}_grid_thw")) is not None)
        merge = next(v for n in names if (v := arguments.get(f"{n}_merge_sizes")) is not None)
        return thw, merge

    def _rows(
        self, modality: Modality, arguments: Mapping[str, Any]
    ) -> list[tuple[tuple[int, int, int], int]]:
        thw, merge = self._layout(modality, arguments)
        sizes = merge.tolist() if isinstance(merge, Tensor) else list(merge)
        if len(sizes) != len(thw):
            raise UnsupportedModelError(
                f"The call has {len(thw)} grids but {len(sizes)} merge sizes; one each is needed."
            )
        return list(zip(grid_rows(thw), map(int, sizes), strict=True))
