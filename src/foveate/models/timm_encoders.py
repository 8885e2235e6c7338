"""Vision transformers of timm, which is never imported: they are known by class and interface.

Legend: d width of the stream, H heads, m width inside the MLP.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, ClassVar

from torch import nn

from foveate.core.dims import EncoderDims
from foveate.errors import UnsupportedModelError
from foveate.models.encoders import EncoderAdapter
from foveate.models.tower import TokenPool, VisionLayout, VisionTower, lay_out, pair

_LAYOUT = VisionLayout(
    blocks=("blocks",),
    attention="attn",
    mlp_input="norm2",
    # The last of the branch: layer scale and drop path in front of it are modules, too.
    mlp_output="drop_path2",
    taps={"qkv": ("attn.qkv",)},
    # Heads join in front of the norm (and the gate) that some models have before the projection.
    attention_output=("attn.norm", "attn.proj"),
    attention_input="norm1",
    head_norms={"q": "attn.q_norm", "k": "attn.k_norm"},
)


class TimmAdapter(EncoderAdapter):
    """VisionTransformer of timm (vit_*, deit_*), alone or as transformers wraps it."""

    family = "timm"
    model_types: ClassVar = ("timm_wrapper",)
    docs_name = "VisionTransformer of timm"
    roots: ClassVar = ("timm_model",)

    def tower(self, model: nn.Module) -> VisionTower:
        """The encoder.

        Raises:
            UnsupportedModelError: it is another model of timm, or has other blocks.
        """
        vit = self._vit(model)
        has_cls = vit.cls_token is not None
        tower = lay_out(
            vit,
            replace(_LAYOUT, has_cls=has_cls),
            num_prefix=int(vit.num_prefix_tokens),
            patch_size=_stride(vit.patch_embed),
        )
        # Whoever wants tokens calls forward_features(), and no hook of the model sees that.
        return replace(
            tower,
            start=vit.patch_embed,
            end=vit.norm,
            refuses=("forward_intermediates",),
            pools=_pools(vit),
        )

    def dims(self, model: nn.Module) -> EncoderDims:
        """What the FLOPs of the blocks depend on, read from the modules.

        Raises:
            ValueError: something in them is not covered by the rule that counts.
        """
        vit = self._vit(model)
        block, attention, embed = vit.blocks[0], vit.blocks[0].attn, vit.patch_embed
        linears = [m for m in block.mlp.modules() if hasattr(m, "in_features")]
        inner = int(linears[-1].in_features)
        matrices = sum(m.in_features * m.out_features for m in linears) / (vit.embed_dim * inner)
        if matrices not in (2, 3):
            raise ValueError(f"the MLP of {type(block).__name__} is of a kind that is not known.")
        if getattr(attention, "gate", None) is not None:
            raise ValueError("the attention of these blocks has a gate, which is not counted.")
        if not isinstance(getattr(embed, "proj", None), nn.Conv2d) or hasattr(embed, "backbone"):
            raise ValueError(f"{type(embed).__name__} is more than one convolution over patches.")
        if vit.global_pool == "prr":
            raise ValueError("its pooling head is of a kind that is not counted.")
        return EncoderDims(
            num_blocks=len(vit.blocks),
            hidden=vit.embed_dim,
            heads=attention.num_heads,
            head_dim=attention.head_dim,
            intermediate=inner,
            patch_inputs=prod(embed.proj.weight.shape[1:]),
            gated=matrices == 3,
            attention_pool=vit.global_pool == "map",
        )

    def _vit(self, model: nn.Module) -> Any:
        for name in self.roots:
            if isinstance(inner := model._modules.get(name), nn.Module):
                return self._vit(inner)
        if not _inherits(model, "VisionTransformer") or not hasattr(model, "cls_token"):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no VisionTransformer of timm. Of timm, foveate takes "
                "that class (vit_*, deit_*); others (EVA, BEiT, Swin, NaFlexViT, ConvNeXt) have "
                "windows, rotary positions or no blocks of tokens. Many have a counterpart in "
                "transformers; see docs/adapters.md."
            )
        for block in model.get_submodule("blocks").children():
            attention: Any = getattr(block, "attn", None)
            if not _inherits(block, "Block") or not _inherits(attention, "Attention"):
                raise UnsupportedModelError(
                    f"The blocks of this VisionTransformer are {type(block).__name__} with "
                    f"{type(attention).__name__}; methods act between the "
                    "attention and the MLP of timm's Block with its Attention, and foveate knows "
                    "no other."
                )
        return model


def _inherits(module: nn.Module | None, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _stride(embed: Any) -> tuple[int, int]:
    """Pixels between patches: behind a convolutional stem that is more than the patch size."""
    if hasattr(embed, "feat_ratio"):
        return pair(embed.feat_ratio(as_scalar=False))
    return pair(embed.patch_size)


def _pools(vit: Any) -> tuple[TokenPool, ...]:
    """The head, where it reads more than one token."""
    if vit.global_pool in ("", "token") or not hasattr(vit, "fc_norm"):
        return ()
    first = 0 if getattr(vit, "pool_include_prefix", False) else vit.num_prefix_tokens
    kind = "mean" if vit.global_pool == "avg" else "other"
    return (TokenPool(vit.fc_norm, vit.norm, int(first), kind),)
