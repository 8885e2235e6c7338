"""Swin: an encoder of stages whose blocks attend in windows, with merging in between.

Legend: B batch, M queries, L tokens they read, C channels of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from foveate.core.window_flops import WindowDims
from foveate.errors import UnsupportedModelError
from foveate.models.encoders import EncoderAdapter
from foveate.models.tower import VisionTower, pair, submodule

#: Paths below a block; the second of each is that of transformers < 5.20.
_PATHS = {
    "q": ("attention.q_proj", "attention.self.query"),
    "k": ("attention.k_proj", "attention.self.key"),
    "v": ("attention.v_proj", "attention.self.value"),
    "out": ("attention.o_proj", "attention.output.dense"),
}


class SwinReading:
    """A block of Swin whose tokens may read others, with its own weights.

    Its table of relative positions speaks of places in a window of image tokens, and is left out.

    Args:
        block: the block.
        num_heads: of its attention.

    Example:
        >>> import torch
        >>> from transformers import SwinConfig, SwinModel
        >>> model = SwinModel(SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1],
        ...                              num_heads=[2], window_size=4))
        >>> block = SwinReading(model.encoder.layers[0].blocks[0], num_heads=2)
        >>> block(torch.randn(1, 3, 8), torch.randn(1, 5, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, block: nn.Module, num_heads: int) -> None:
        self.block: Any = block
        self.num_heads = num_heads
        self.parts = {name: submodule(block, paths) for name, paths in _PATHS.items()}

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return int(submodule(self.block, ("mlp.fc1", "intermediate.dense")).out_features)  # pyright: ignore[reportArgumentType]

    def read(self, x_BMC: Tensor, read_BLC: Tensor) -> Tensor:
        """What the queries read, [B, M, C]. O(M L C + (M + L) C^2)."""
        norm = self.block.layernorm_before
        x_BMC, read_BLC = norm(x_BMC), norm(read_BLC)
        q, k, v = (
            self.parts[name](y).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for name, y in (("q", x_BMC), ("k", read_BLC), ("v", read_BLC))
        )
        out_BHMd = scaled_dot_product_attention(q, k, v)
        return self.parts["out"](out_BHMd.transpose(1, 2).flatten(2))

    def think(self, x_BMC: Tensor) -> Tensor:
        """Tokens behind the MLP branch, [B, M, C]."""
        y_BMC = self.block.layernorm_after(x_BMC)
        if hasattr(self.block, "mlp"):
            return x_BMC + self.block.mlp(y_BMC)
        return x_BMC + self.block.output(self.block.intermediate(y_BMC))

    def __call__(self, x_BMC: Tensor, read_BLC: Tensor | None = None) -> Tensor:
        """The tokens behind the block; they read `read_BLC`, or one another."""
        return self.think(x_BMC + self.read(x_BMC, x_BMC if read_BLC is None else read_BLC))


@dataclass(frozen=True, eq=False)
class SwinParts:
    """A Swin's stages, first to last.

    Attributes:
        module: the encoder; its forward receives the pixels.
        stages: the blocks of each.
        heads: attention heads in each.
        patch_size: (height, width) of a patch in pixels.
        dims: what its FLOPs depend on.
    """

    module: nn.Module
    stages: tuple[tuple[nn.Module, ...], ...]
    heads: tuple[int, ...]
    patch_size: tuple[int, int]
    dims: WindowDims

    def windows(self) -> tuple[int, ...]:
        """Side of the windows of every stage, as its last call had them."""
        return tuple(int(getattr(blocks[0], "window_size")) for blocks in self.stages)  # noqa: B009


class SwinAdapter(EncoderAdapter):
    """Swin, alone or under a classifier."""

    family = "swin"
    model_types: ClassVar = ("swin",)
    docs_name = "Swin"
    roots: ClassVar = ("swin",)

    def tower(self, model: nn.Module) -> VisionTower:
        """There is none.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "Swin's blocks attend in windows of a plane that shrinks from stage to stage, so there "
            'is no one sequence of tokens to follow. foveate.reduce takes it with "stvit"; for all '
            "else use an encoder whose blocks attend to the whole image (ViT, DeiT, DINOv2, CLIP, "
            "SigLIP)."
        )

    def parts(self, model: nn.Module) -> SwinParts:
        """The stages of the encoder in or below `model`."""
        for name in self.roots:
            if isinstance(inner := model._modules.get(name), nn.Module):
                return self.parts(inner)
        config: Any = model.config
        stages = model.get_submodule("encoder.layers").children()
        patch = pair(config.patch_size)
        return SwinParts(
            model,
            tuple(tuple(stage.get_submodule("blocks").children()) for stage in stages),
            tuple(config.num_heads),
            patch,
            WindowDims(
                config.embed_dim,
                tuple(config.depths),
                config.mlp_ratio,
                config.num_channels * patch[0] * patch[1],
            ),
        )
