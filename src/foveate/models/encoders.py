"""Vision encoders on their own: ViT, DeiT, DINOv2, CLIP and SigLIP.

Legend: B images, h and w in pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.dims import EncoderDims
from foveate.core.grid import Grid, Plane
from foveate.models.dims import vision_dims
from foveate.models.llava import patch_grid
from foveate.models.maps import stretch_each
from foveate.models.tower import TokenPool, VisionTower, build_tower


class EncoderAdapter:
    """One kind of encoder; the encoder may be the model or a part of it (a classifier, CLIP).

    Attributes:
        family: short name, as users type it.
        model_types: values of `config.model_type` that this adapter serves.
        docs_name: name for people.
        roots: names under which models of the family hold the encoder; none of them: it is the
            model itself.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    docs_name: ClassVar[str]
    roots: ClassVar[tuple[str, ...]] = ()

    def tower(self, model: nn.Module) -> VisionTower:
        """The encoder; all of its blocks count, so `feature_block` is the last."""
        encoder = self.encoder(model)
        tower = build_tower(encoder)
        return replace(tower, pools=tuple(self.pools(model, encoder, tower)))

    def encoder(self, model: nn.Module) -> nn.Module:
        """The part of a model that is the encoder; the model itself where it has no such part."""
        for name in self.roots:
            if isinstance(inner := model._modules.get(name), nn.Module):
                return self.encoder(inner)
        return model

    def pools(self, model: Any, encoder: Any, tower: VisionTower) -> list[TokenPool]:
        """Heads of a model that read all tokens, so that merged ones weigh what they stand for."""
        return []

    def dims(self, model: nn.Module) -> EncoderDims:
        """What the encoder's FLOPs depend on.

        Raises:
            ValueError: a dimension cannot be read, or there is something that no rule counts.
        """
        return vision_dims(model)

    def grid(self, model: nn.Module, pixel_values: Tensor) -> Grid:
        """The grid of each of the images [B, 3, h, w]; [CLS] and the like are its prefix."""
        tower = self.tower(model)
        height, width = patch_grid(tower, pixel_values)
        return Grid((Plane(height, width, prefix=tower.num_prefix),))

    def pixels(self, pixel_values: Tensor) -> list[Tensor]:
        """The images for pictures, uint8 [1, 3, h, w] each, stretched from minimum to maximum."""
        return stretch_each(pixel_values)


class ViTAdapter(EncoderAdapter):
    """ViT, alone or under an image classifier."""

    family = "vit"
    model_types: ClassVar = ("vit",)
    docs_name = "ViT"
    roots: ClassVar = ("vit",)


class DeiTAdapter(EncoderAdapter):
    """DeiT: a ViT with a distillation token behind [CLS]."""

    family = "deit"
    model_types: ClassVar = ("deit",)
    docs_name = "DeiT"
    roots: ClassVar = ("deit",)


class Dinov2Adapter(EncoderAdapter):
    """DINOv2, with or without register tokens."""

    family = "dinov2"
    model_types: ClassVar = ("dinov2", "dinov2_with_registers")
    docs_name = "DINOv2"
    roots: ClassVar = ("dinov2", "dinov2_with_registers")

    def pools(self, model: Any, encoder: Any, tower: VisionTower) -> list[TokenPool]:
        """The classifier, which reads [CLS] and the mean of the patches."""
        return _classifier(model, encoder, encoder.layernorm, tower.num_prefix)


class CLIPAdapter(EncoderAdapter):
    """CLIP's vision encoder, alone or in the pair with its text encoder."""

    family = "clip"
    model_types: ClassVar = ("clip", "clip_vision_model")
    docs_name = "CLIP"
    roots: ClassVar = ("vision_model",)

    def pools(self, model: Any, encoder: Any, tower: VisionTower) -> list[TokenPool]:
        """The classifier, which reads the mean of the patches, not normalised."""
        return _classifier(model, encoder, encoder, tower.num_prefix)


class SiglipAdapter(EncoderAdapter):
    """SigLIP's vision encoder, which has no [CLS], alone or with its text encoder."""

    family = "siglip"
    model_types: ClassVar = ("siglip", "siglip_vision_model")
    docs_name = "SigLIP"
    roots: ClassVar = ("vision_model",)

    def pools(self, model: Any, encoder: Any, tower: VisionTower) -> list[TokenPool]:
        """The encoder's head, in which a learnt query attends to the patches; the classifier."""
        norm = encoder.post_layernorm
        pools = _classifier(model, encoder, norm, 0)
        if (head := getattr(encoder, "head", None)) is not None:
            pools.append(TokenPool(head.attention, norm, 0, "attention"))
        return pools


def _classifier(model: Any, encoder: nn.Module, source: nn.Module, first: int) -> list[TokenPool]:
    """The classifier of a model that has one around its encoder."""
    head = getattr(model, "classifier", None)
    if model is encoder or not isinstance(head, nn.Module):
        return []
    return [TokenPool(head, source, first, "mean")]
