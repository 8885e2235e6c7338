"""What an attachment has to know of a model family: where its parts are and how its tokens lie.

Adapters are stateless; a family is mostly class attributes, and code only where its layout of
visual tokens needs some. See docs/adapters.md for one in ten lines.

Legend: N_i tokens of visual item i as the language model sees them, C channels, T planes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core.grid import Grid, Modality
from foveate.errors import UnsupportedModelError
from foveate.models.tower import VisionTower, build_tower

__all__ = ["Adapter", "VisionTower"]

PIXEL_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos", "pixel_values"),  # the latter in transformers < 5.20
}


class Adapter(ABC):
    """One family of multimodal models; every method takes the model, none keeps anything of it.

    `arguments` is always the mapping of bound arguments of the feature method of the modality
    (`get_image_features(pixel_values=..., image_sizes=..., ...)`), defaults left out or None.

    Attributes:
        family: short name, as users type it.
        model_types: values of `config.model_type` that this adapter serves.
        docs_name: name for people.
        modalities: what the family takes, "image" and "video"; families that feed frames as images
            (InternVL, SmolVLM) have "image" alone.
        mrope: positions have time, row and column (M-RoPE).
        tower_paths: modality -> path of its vision encoder below `base`.
        language_path: path of the text model below `base`.
        feature_layer_key: config field that says which hidden states become features, if any does.
        vision_layout: key of `foveate.models.tower.VISION_LAYOUTS`, where the encoder's own
            `model_type` does not name it.
        stream_modality: as what frames can be read a few at a time, their tokens one run in the
            prompt: "image", an item each, or "video", a plane each; None: they cannot.
        video_in_chunks: a video's planes can be encoded some at a time, with what closes it behind
            the last, and their tokens stand in the prompt in that order.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    docs_name: ClassVar[str]
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    mrope: ClassVar[bool] = False
    tower_paths: ClassVar[Mapping[str, str]] = {"image": "vision_tower"}
    language_path: ClassVar[str] = "language_model"
    feature_layer_key: ClassVar[str | None] = None
    vision_layout: ClassVar[str | None] = None
    stream_modality: ClassVar[Modality | None] = None
    video_in_chunks: ClassVar[bool] = False

    # --- parts of the model -------------------------------------------------------------------

    def base(self, model: nn.Module) -> nn.Module:
        """The module whose forward takes `input_ids` and `pixel_values`, found in or below `model`.

        Raises:
            UnsupportedModelError: no module of the model has this family's parts.
        """
        parts = {path.split(".")[0] for path in (*self.tower_paths.values(), self.language_path)}
        for module in model.modules():
            # _modules, not attributes: heads of older versions forward these names as properties.
            if parts <= module._modules.keys():
                return module
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module with {', '.join(sorted(parts))}, which models "
            f"of the family {self.family!r} have."
        )

    def language_model(self, model: nn.Module) -> nn.Module:
        """The text model that is called with `inputs_embeds`; its `layers` is a ModuleList."""
        return self.base(model).get_submodule(self.language_path)

    def layers(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The decoder layers, first to last."""
        return tuple(self.language_model(model).get_submodule("layers").children())

    def text_attentions(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The attention module of every decoder layer."""
        return tuple(layer.get_submodule("self_attn") for layer in self.layers(model))

    def text_norms(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The norm before the attention of every decoder layer."""
        return tuple(layer.get_submodule("input_layernorm") for layer in self.layers(model))

    def text_mlps(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The MLP of every decoder layer."""
        return tuple(layer.get_submodule("mlp") for layer in self.layers(model))

    def text_config(self, model: nn.Module) -> Any:
        """The configuration of the text model."""
        return self.language_model(model).config

    def towers(self, model: nn.Module) -> dict[str, VisionTower]:
        """modality -> vision encoder; modalities that share an encoder share the object."""
        base: Any = self.base(model)
        layer = getattr(base.config, self.feature_layer_key, -1) if self.feature_layer_key else -1
        built = {
            path: build_tower(
                base.get_submodule(path), layout=self.vision_layout, feature_layer=layer
            )
            for path in set(self.tower_paths.values())
        }
        return {modality: built[path] for modality, path in self.tower_paths.items()}

    def num_deepstack(self, model: nn.Module) -> int:
        """First decoder layers behind which visual features are added again (Qwen3-VL), else 0."""
        return 0

    def placeholder_ids(self, model: nn.Module) -> dict[str, int]:
        """modality -> id of the token that stands for one visual token in `input_ids`."""
        config: Any = self.base(model).config
        return {name: int(getattr(config, f"{name}_token_id")) for name in self.modalities}

    @property
    def feature_methods(self) -> dict[str, str]:
        """modality -> name of the method of `base(model)` that turns pixels into features.

        The video methods of Qwen3-VL and VideoLLaMA 3 call the image method of the same instance:
        whoever wraps both must act in the outer call only.
        """
        return {name: f"get_{name}_features" for name in self.modalities}

    # --- layout of the visual tokens ----------------------------------------------------------

    @abstractmethod
    def grids(
        self, model: nn.Module, modality: Modality, arguments: Mapping[str, Any], features: Any
    ) -> list[Grid]:
        """The grid of every visual item of a call, in the order of its placeholders.

        Args:
            features: what the feature method returned as `pooler_output`; None while it runs.

        Returns:
            One grid per item; their `num_tokens` add up to the number of placeholders.
        """

    def encoder_planes(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[list[int]]:
        """The plane of each item's grid that every image the encoder got belongs to.

        The default is one image (tile, frame) per plane, items in order.
        """
        return [list(range(len(grid.planes))) for grid in grids]

    @abstractmethod
    def token_scores(
        self,
        model: nn.Module,
        modality: Modality,
        scores: Tensor,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        """Scores of encoder tokens as scores of the language model's tokens.

        They go the way of the features: pooling, unpadding, mosaic, newlines; where several patches
        become one token, their mean. Tokens without a patch ([CLS], newlines) get NaN.

        Args:
            scores: one score per patch, without prefix tokens: [tiles, P] in the order in which the
                encoder got its images, or [P] in the order of the hidden states of packed towers.

        Returns:
            float32 [N_i] for every grid.

        Raises:
            ValueError: the number of scores is not the number of patches.
        """

    @abstractmethod
    def pixels(
        self,
        model: nn.Module,
        modality: Modality,
        arguments: Mapping[str, Any],
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        """The pixels of every item for pictures, uint8 [T, 3, h, w] on the CPU.

        Values are stretched per item from minimum to maximum; planes are cut to what the tokens of
        the grid cover, and planes of different sizes are resized to the last of them.
        """

    # --- features -----------------------------------------------------------------------------

    def open_ended(self) -> Adapter:
        """This adapter for a part of a video that goes on: its grids lack what closes the video."""
        return self

    def split_features(
        self, model: nn.Module, features: Any, grids: Sequence[Grid]
    ) -> list[Tensor]:
        """`pooler_output` of a feature method, whatever its shape, as one tensor [N_i, C] per item.

        Raises:
            ValueError: the features do not have as many rows as the grids have tokens.
        """
        parts = [features] if isinstance(features, Tensor) else list(features)
        rows = torch.cat([part.flatten(0, -2) for part in parts])
        counts = [grid.num_tokens for grid in grids]
        if rows.shape[0] != sum(counts):
            raise ValueError(
                f"The features of this call have {rows.shape[0]} tokens, the grids "
                f"{sum(counts)} ({counts}); the adapter {self.family!r} misreads the inputs."
            )
        return list(rows.split(counts))

    # --- helpers for families -----------------------------------------------------------------

    def _pixel_values(self, modality: Modality, arguments: Mapping[str, Any]) -> Tensor:
        for name in PIXEL_ARGUMENTS[modality]:
            if (pixels := arguments.get(name)) is not None:
                return pixels
        raise ValueError(
            f"The call of the {modality} feature method has no pixels: expected one of "
            f"{', '.join(PIXEL_ARGUMENTS[modality])} among its arguments, got "
            f"{', '.join(arguments) or 'none'}."
        )

    def _option(self, model: nn.Module, arguments: Mapping[str, Any], name: str) -> Any:
        """An argument of the call, or the default of the config where it was left out."""
        value = arguments.get(name)
        return getattr(self.base(model).config, name, None) if value is None else value
