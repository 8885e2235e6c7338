"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: images of any resolution as tiles.

An image is a thumbnail plane and a mosaic plane of tiles, unpadded, with a newline token behind
every row. What the model does to its features is done here to maps with one channel, by the model's
own code, so that grids and scores cannot drift from it.

Legend: P patches of a tile, T frames, V videos, S side of a tile in patches.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.grid import Grid, Modality, Plane
from foveate.errors import UnsupportedModelError
from foveate.models.llava import LlavaAdapter, kept_prefix, patch_grid
from foveate.models.maps import append_nan, checked_scores, stretch


class LlavaNextAdapter(LlavaAdapter):
    """LLaVA-NeXT (1.6): thumbnail, mosaic of tiles, a newline token behind every row."""

    family = "llava_next"
    model_types: ClassVar = ("llava_next",)
    docs_name = "LLaVA-NeXT"
    stream_modality: ClassVar[Modality | None] = None

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        height, width = self._tile_shape(model, modality, arguments)
        tiles = self._tiles_per_image(model, arguments)
        blank = torch.zeros(sum(tiles), height * width)
        grids = []
        for packed, count in zip(self._pack(model, blank, tiles, arguments), tiles, strict=True):
            if count == 1:
                grids.append(Grid.image(height, width, newlines_at_end=1))
                continue
            rest = packed[height * width :]
            rows = int(rest.isnan().sum())
            mosaic = Plane(rows, rest.numel() // rows - 1, row_newline=True)
            grids.append(Grid((Plane(height, width), mosaic), "image"))
        return grids

    def encoder_planes(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[list[int]]:
        if modality == "video":
            return super().encoder_planes(model, modality, arguments, grids)
        # The thumbnail, and all tiles of the mosaic.
        return [[0] + [1] * (count - 1) for count in self._tiles_per_image(model, arguments)]

    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        height, width = self._tile_shape(model, modality, arguments)
        tiles = self._tiles_per_image(model, arguments)
        scores = checked_scores(scores, sum(tiles) * height * width)
        return self._pack(model, scores.reshape(-1, height * width), tiles, arguments)

    def pixels(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        pixel_values = self._pixel_values(modality, arguments)
        tiles = self._tiles_per_image(model, arguments)
        images = (
            [image[:count] for image, count in zip(pixel_values, tiles, strict=True)]
            if pixel_values.dim() == 5
            else pixel_values.split(tiles)
        )
        sizes = arguments["image_sizes"]
        return [
            stretch(self._planes(model, image, size))
            for image, size in zip(images, sizes, strict=True)
        ]

    def _planes(self, model: nn.Module, tiles: Tensor, size: Any) -> Tensor:
        """Thumbnail and mosaic [2, 3, h, w] (or [1, 3, h, w]) of the tiles of one image."""
        if tiles.shape[0] == 1:
            return tiles
        base, code = self._base_and_code(model)
        side = tiles.shape[-1]
        rows, columns = code.get_anyres_image_grid_shape(
            size, base.config.image_grid_pinpoints, side
        )
        mosaic = tiles[1:].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        mosaic = mosaic.flatten(3).flatten(1, 2)
        # Cut where the tokens were cut, not where the pixels would be, so that both line up.
        patch = self.towers(model)["image"].patch_size
        where = torch.stack(
            torch.meshgrid(
                torch.arange(mosaic.shape[1] // patch[0]),
                torch.arange(mosaic.shape[2] // patch[1]),
                indexing="ij",
            )
        )
        where = code.unpad_image(where, size)
        top, left = where[:, 0, 0].tolist()
        bottom, right = where[:, -1, -1].tolist()
        mosaic = mosaic[
            :, top * patch[0] : (bottom + 1) * patch[0], left * patch[1] : (right + 1) * patch[1]
        ]
        thumbnail = nn.functional.interpolate(
            tiles[:1].float(), size=tuple(mosaic.shape[1:]), mode="bilinear"
        )
        return torch.cat([thumbnail, mosaic[None].float()])

    def _base_and_code(self, model: nn.Module) -> tuple[Any, Any]:
        """The model without its head, and the module its class comes from."""
        base: Any = self.base(model)
        return base, sys.modules[type(base).__module__]

    def _tile_shape(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any]
    ) -> tuple[int, int]:
        tower = self.towers(model)[modality]
        strategy = self._option(model, arguments, "vision_feature_select_strategy")
        if kept_prefix(tower, strategy):
            raise UnsupportedModelError(
                f"{self.docs_name} packs tiles of patches only, but its encoder's [CLS] token "
                'stays in the features; set vision_feature_select_strategy="default".'
            )
        return patch_grid(tower, self._pixel_values(modality, arguments))

    def _tiles_per_image(self, model: nn.Module, arguments: Mapping[str, Any]) -> list[int]:
        base, code = self._base_and_code(model)
        return [
            code.image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=base.config.image_grid_pinpoints,
                patch_size=base.config.vision_config.image_size,
            )
            for size in arguments["image_sizes"]
        ]

    def _pack(
        self, model: nn.Module, scores_TP: Tensor, tiles: list[int], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        """Maps of the model's own packing, NaN for newlines, float32 [N_i] per image."""
        images = scores_TP[..., None].split(tiles)
        packed, _ = self.base(model).pack_image_features(  # pyright: ignore[reportCallIssue]
            images,
            arguments["image_sizes"],
            image_newline=scores_TP.new_full((1,), float("nan")),
            **self._pack_options(model, arguments),
        )
        return [image[:, 0] for image in packed]

    def _pack_options(self, model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        name = "vision_feature_select_strategy"
        return {name: self._option(model, arguments, name)}


class _VideoPlanes(LlavaNextAdapter):
    """Videos [V, T, 3, h, w] whose frames are pooled, one plane each."""

    video_newlines: ClassVar[int] = 0
    stream_modality: ClassVar[Modality | None] = "video"
    video_in_chunks: ClassVar[bool] = True

    def open_ended(self) -> LlavaNextAdapter:
        part = copy.copy(self)
        # On the copy alone: the class keeps what closes its videos.
        vars(part)["video_newlines"] = 0
        return part

    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        if modality == "image":
            return super().grids(model, modality, arguments, features)
        videos, frames = self._pixel_values(modality, arguments).shape[:2]
        height, width = self._tile_shape(model, modality, arguments)
        rows, columns = self._pool(model, torch.zeros(1, height, width)).shape[1:]
        return [Grid.video(frames, rows, columns, newlines_at_end=self.video_newlines)] * videos

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
        videos, frames = self._pixel_values(modality, arguments).shape[:2]
        height, width = self._tile_shape(model, modality, arguments)
        scores = checked_scores(scores, videos * frames * height * width)
        pooled = self._pool(model, scores.reshape(-1, height, width)).reshape(videos, -1)
        return list(append_nan(pooled, self.video_newlines))

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

    def _pool(self, model: nn.Module, scores_Thw: Tensor) -> Tensor:
        """Frames of scores [T, h, w] pooled as the model pools features."""
        raise NotImplementedError


class LlavaNextVideoAdapter(_VideoPlanes):
    """LLaVA-NeXT-Video: frames pooled by a stride, no newline."""

    family = "llava_next_video"
    model_types: ClassVar = ("llava_next_video",)
    docs_name = "LLaVA-NeXT-Video"
    modalities: ClassVar = ("image", "video")
    tower_paths: ClassVar = {"image": "vision_tower", "video": "vision_tower"}

    def _pool(self, model: nn.Module, scores_Thw: Tensor) -> Tensor:
        config: Any = self.base(model).config
        stride = config.spatial_pool_stride
        # A learned pooling has a weight per channel; for scores its mean is what is left of it.
        pool = nn.functional.max_pool2d if config.spatial_pool_mode == "max" else _mean_pool
        return pool(scores_Thw[:, None], stride)[:, 0]


class LlavaOnevisionAdapter(_VideoPlanes):
    """LLaVA-OneVision: downscaled mosaics, videos pooled bilinearly and closed by one newline."""

    family = "llava_onevision"
    model_types: ClassVar = ("llava_onevision",)
    docs_name = "LLaVA-OneVision"
    modalities: ClassVar = ("image", "video")
    tower_paths: ClassVar = {"image": "vision_tower", "video": "vision_tower"}
    video_newlines = 1

    def _pool(self, model: nn.Module, scores_Thw: Tensor) -> Tensor:
        frames, height, width = scores_Thw.shape
        pooled = self.base(model).apply_pooling(scores_Thw.reshape(frames, -1, 1))  # pyright: ignore[reportCallIssue]
        return pooled.reshape(frames, -(-height // 2), -(-width // 2))

    def split_features(
        self, model: nn.Module, features: Any, grids: Sequence[Grid]
    ) -> list[Tensor]:
        total = sum(grid.num_tokens for grid in grids)
        # In transformers < 5.20 the forward, not the feature method, closes a video.
        if isinstance(features, Tensor) and features.shape[:-1].numel() == total - len(grids):
            newline: Any = self.base(model).image_newline
            newlines = newline.to(features).expand(len(grids), 1, -1)
            features = torch.cat([features, newlines], dim=1)
        return super().split_features(model, features, grids)

    def _tiles_per_image(self, model: nn.Module, arguments: Mapping[str, Any]) -> list[int]:
        tiles = super()._tiles_per_image(model, arguments)
        per_sample = arguments.get("batch_num_images")
        if per_sample is None:
            return tiles
        # Only a sample's lone image is tiled; of several, each is its thumbnail.
        lone = [int(n) == 1 for n in per_sample for _ in range(int(n))]
        return [count if tiled else 1 for count, tiled in zip(tiles, lone, strict=True)]

    def _pack_options(self, model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"vision_aspect_ratio": self._option(model, arguments, "vision_aspect_ratio")}


def _mean_pool(scores: Tensor, stride: int) -> Tensor:
    return nn.functional.avg_pool2d(scores, stride)
