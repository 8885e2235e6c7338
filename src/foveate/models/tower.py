"""Vision encoders as data: where their blocks, attention, MLP, queries and keys are.

Legend: B batch (images, tiles or frames), N tokens of one of them (all tokens of the call in packed
towers), H heads, D channels of a head, C channels of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import linear

from foveate.errors import UnsupportedModelError
from foveate.models.rotary import rotate


@dataclass(frozen=True, eq=False)
class TokenPool:
    """A head that makes one vector of all tokens an encoder gives.

    Args:
        module: what reads the tokens: of a "mean" its input is that vector, alone or behind other
            channels; of an "attention" it is the `nn.MultiheadAttention` with the tokens as keys.
        source: its output is the tokens.
        first: tokens in front of those that the vector is made of.
        kind: "mean", "attention", or "other" where it is something else of them.
    """

    module: nn.Module
    source: nn.Module
    first: int
    kind: Literal["mean", "attention", "other"]


@dataclass(frozen=True, eq=False)
class VisionTower:
    """One vision encoder of a model: the modules that an attachment hooks, and how to read them.

    Every block computes `x = x + attention(...)` and then `x = x + gain * mlp(norm(x))`; the input
    of `mlp_inputs[i]` is `x` between the two, the output of `mlp_outputs[i]` times `gains[i]` is
    what the second line adds. Dropout and drop path behind it are the identity in eval mode.

    Args:
        module: the encoder; its forward receives the pixels (and `grid_thw` where packed).
        blocks: its transformer blocks, first to last.
        attentions: the attention module of each block.
        mlp_inputs: the module of each block whose input is the residual stream after attention.
        mlp_outputs: the module of each block whose output is added to that stream.
        taps: per block, the modules whose outputs `assemble_qk` and `assemble_v` need, under "q",
            "k" and "v" or "qkv".
        gains: per block, the per-channel factor [C] on the output of `mlp_outputs`, or None.
        attention_outputs: the module of each block that projects what its attention gives, whose
            input is [B, N, H * D] with the heads side by side.
        num_heads: attention heads (keys and values have as many).
        head_dim: channels of a head.
        num_prefix: tokens before the patches ([CLS], registers, distillation).
        has_cls: the first of them is a [CLS] token.
        packed: hidden states are [N, C], all images of the call in one row, with `cu_seqlens`.
        feature_block: index of the block whose output becomes the features.
        patch_size: (height, width) of a patch in pixels.
        attention_inputs: the norm of each block in front of its attention; none: not known.
        projections: per block, the modules that make keys and values of what that norm gives, one
            after the other, under "k" and "v".
        head_norms: per block, norms of the "q" and "k" of one head that "qkv" gives; none: no norm.
        start: gets the pixels where `module` may be left out, its methods being called by
            themselves; None: `module`.
        end: runs behind the last block, likewise.
        refuses: names of methods of `module` that expect full length between the blocks.
        pools: heads behind the encoder that are known to make one vector of all tokens.
    """

    module: nn.Module
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    mlp_inputs: tuple[nn.Module, ...]
    mlp_outputs: tuple[nn.Module, ...]
    taps: tuple[Mapping[str, nn.Module], ...] = field(repr=False)
    gains: tuple[Tensor | None, ...] = field(repr=False)
    attention_outputs: tuple[nn.Module, ...] = field(repr=False)
    num_heads: int
    head_dim: int
    num_prefix: int
    has_cls: bool
    packed: bool
    feature_block: int
    patch_size: tuple[int, int]
    attention_inputs: tuple[nn.Module, ...] = field(default=(), repr=False)
    projections: tuple[Mapping[str, tuple[nn.Module, ...]], ...] = field(default=(), repr=False)
    head_norms: tuple[Mapping[str, nn.Module], ...] = field(default=(), repr=False)
    start: nn.Module | None = field(default=None, repr=False)
    end: nn.Module | None = field(default=None, repr=False)
    refuses: tuple[str, ...] = ()
    pools: tuple[TokenPool, ...] = field(default=(), repr=False)

    def qk_taps(self, block: int) -> dict[str, nn.Module]:
        """The modules of a block whose forward outputs `assemble_qk` takes, by name."""
        return {name: module for name, module in self.taps[block].items() if name != "v"}

    def v_taps(self, block: int) -> dict[str, nn.Module]:
        """The modules of a block whose forward outputs `assemble_v` takes, by name."""
        return {name: module for name, module in self.taps[block].items() if "v" in name}

    def mlp_gain(self, block: int) -> Tensor | None:
        """The factor [C] the block applies to the output of `mlp_outputs[block]`, if there is one.

        InternVL scales its MLP with a bare parameter; encoders whose scale is a module have it as
        `mlp_outputs` and need no factor.
        """
        return self.gains[block]

    def assemble_qk(
        self, block: int, captured: Mapping[str, Tensor], attention_kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, N, D] as the attention of `block` uses them.

        Args:
            block: index of the block.
            captured: outputs of the modules that `qk_taps(block)` names.
            attention_kwargs: keyword arguments of the attention's forward; packed towers need
                `position_embeddings` = (cos, sin), each [N, D].

        Returns:
            q and k, rotated where the tower has rotary positions; packed towers give B = 1 and all
            tokens of the call as N, and `segments` says which of them attend to each other.

        Raises:
            ValueError: an output that `qk_taps` asks for is missing.
        """
        _require("assemble_qk", block, self.qk_taps(block), captured)
        if "qkv" in self.taps[block]:
            parts = captured["qkv"].unflatten(-1, (3, self.num_heads, self.head_dim))
            q, k, _ = parts.unbind(-3)
            if self.head_norms:
                norms = self.head_norms[block]
                q, k = norms["q"].forward(q), norms["k"].forward(k)
        else:
            q, k = (self._split_heads(captured[name]) for name in ("q", "k"))
        if not self.packed:
            return q.transpose(1, 2), k.transpose(1, 2)
        cos_ND, sin_ND = attention_kwargs["position_embeddings"]
        q, k = (
            rotate(x_NHD.float(), cos_ND[:, None].float(), sin_ND[:, None].float()).to(x_NHD.dtype)
            for x_NHD in (q, k)
        )
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None]

    def assemble_v(self, block: int, captured: Mapping[str, Tensor]) -> Tensor:
        """Values [B, H, N, D] as the attention of `block` uses them; B = 1 in packed towers.

        Args:
            block: index of the block.
            captured: outputs of the modules that `v_taps(block)` names.

        Raises:
            ValueError: an output that `v_taps` asks for is missing.
        """
        _require("assemble_v", block, self.v_taps(block), captured)
        if "qkv" in self.taps[block]:
            parts = captured["qkv"].unflatten(-1, (3, self.num_heads, self.head_dim))
            v = parts.unbind(-3)[2]
        else:
            v = self._split_heads(captured["v"])
        return v.transpose(0, 1)[None] if self.packed else v.transpose(1, 2)

    def keys_values(self, block: int, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, D] that a block would make of other tokens; runs no hooks.

        Raises:
            ValueError: it is not known where the encoder makes them, or it is packed.
        """
        if self.packed or not self.attention_inputs:
            raise ValueError(
                f"It is not known how the blocks of {type(self.module).__name__} make keys and "
                "values of single tokens."
            )
        y_BNC = self.attention_inputs[block].forward(x_BNC)
        if "qkv" in self.taps[block]:
            return self._fused_keys_values(block, y_BNC)
        found = []
        for name in "kv":
            made = y_BNC
            for module in self.projections[block][name]:
                made = module.forward(made)
            found.append(self._split_heads(made).transpose(1, 2))
        return found[0], found[1]

    def _fused_keys_values(self, block: int, y_BNC: Tensor) -> tuple[Tensor, Tensor]:
        qkv, width = self.taps[block]["qkv"], self.num_heads * self.head_dim
        if type(qkv) is nn.Linear:  # what adapters put in its place has no rows to leave out
            bias = None if qkv.bias is None else qkv.bias[width:]
            made = linear(y_BNC, qkv.weight[width:], bias)
        else:
            made = qkv.forward(y_BNC)[..., width:]
        k, v = made.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        if self.head_norms:
            k = self.head_norms[block]["k"].forward(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def segments(self, block: int, attention_kwargs: Mapping[str, Any]) -> Tensor | None:
        """Boundaries [segments + 1] of the tokens that attend to each other in `block`.

        None for towers that are not packed: there every image attends within itself. Packed towers
        pass each block its own boundaries, windows or whole frames.
        """
        return attention_kwargs.get("cu_seqlens") if self.packed else None

    def _split_heads(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.head_dim and x.shape[-2] == self.num_heads:
            return x  # a per-head norm was tapped: heads are split already
        return x.unflatten(-1, (self.num_heads, self.head_dim))


@dataclass(frozen=True)
class VisionLayout:
    """Where things are in one kind of vision encoder; dotted paths, the first that exists counts.

    Args:
        blocks: paths of the block list below the encoder.
        attention: path of the attention below a block.
        mlp_input: path of the norm in front of the MLP below a block.
        mlp_output: path of the last module of the MLP branch below a block.
        taps: name -> paths below a block of the modules that give queries, keys and values.
        attention_output: paths below a block of the output projection of its attention.
        attention_input: path of the norm in front of the attention below a block.
        key_value: name -> paths of the modules that make "k" and "v" of what that norm gives, one
            after the other; None: those of `taps`.
        head_norms: "q" and "k" -> path below a block of the norm of one head that "qkv" gives.
        gain: name of a parameter of the block that scales the MLP branch.
        prefix: tokens before the patches.
        registers: name of a config field with the number of register tokens, added to `prefix`.
        has_cls: the first prefix token is [CLS].
        packed: hidden states are [N, C] with `cu_seqlens`.
    """

    blocks: tuple[str, ...]
    attention: str
    mlp_input: str
    mlp_output: str
    taps: Mapping[str, tuple[str, ...]]
    attention_output: tuple[str, ...]
    attention_input: str | None = None
    key_value: Mapping[str, tuple[str, ...]] | None = None
    head_norms: Mapping[str, str] | None = None
    gain: str | None = None
    prefix: int = 0
    registers: str | None = None
    has_cls: bool = False
    packed: bool = False


def _clip_like(prefix: int, packed: bool = False) -> VisionLayout:
    return VisionLayout(
        blocks=("encoder.layers", "vision_model.encoder.layers"),
        attention="self_attn",
        mlp_input="layer_norm2",
        mlp_output="mlp",
        taps={name: (f"self_attn.{name}_proj",) for name in "qkv"},
        attention_output=("self_attn.out_proj",),
        attention_input="layer_norm1",
        prefix=prefix,
        has_cls=prefix > 0,
        packed=packed,
    )


def _vit_like(prefix: int, *, dino: bool = False, registers: str | None = None) -> VisionLayout:
    return VisionLayout(
        blocks=("layers", "encoder.layer", "encoder.layers"),
        attention="attention",
        mlp_input="norm2" if dino else "layernorm_after",
        mlp_output="layer_scale2" if dino else "mlp",
        # transformers < 5.20 nests the projections of DINOv2 one level deeper.
        taps={
            "q": ("attention.q_proj", "attention.attention.query"),
            "k": ("attention.k_proj", "attention.attention.key"),
            "v": ("attention.v_proj", "attention.attention.value"),
        },
        attention_output=("attention.o_proj", "attention.output.dense"),
        attention_input="norm1" if dino else "layernorm_before",
        prefix=prefix,
        registers=registers,
        has_cls=True,
    )


_QWEN = VisionLayout(
    blocks=("blocks",),
    attention="attn",
    mlp_input="norm2",
    mlp_output="mlp",
    taps={"qkv": ("attn.qkv",)},
    attention_output=("attn.proj",),
    packed=True,
)

_INTERNVL = VisionLayout(
    blocks=("encoder.layer",),
    attention="attention",
    mlp_input="layernorm_after",
    mlp_output="mlp",
    # q_norm is the identity in most checkpoints, but always a module that can be hooked.
    taps={"q": ("attention.q_norm",), "k": ("attention.k_norm",), "v": ("attention.v_proj",)},
    attention_output=("attention.projection_layer",),
    attention_input="layernorm_before",
    key_value={"k": ("attention.k_proj", "attention.k_norm"), "v": ("attention.v_proj",)},
    gain="lambda_2",
    prefix=1,
    has_cls=True,
)

VISION_LAYOUTS: Mapping[str, VisionLayout] = {
    "clip_vision_model": _clip_like(prefix=1),
    "siglip_vision_model": _clip_like(prefix=0),
    "smolvlm_vision": _clip_like(prefix=0),
    "idefics3_vision": _clip_like(prefix=0),
    "video_llama_3_vision": _clip_like(prefix=0, packed=True),
    "vit": _vit_like(prefix=1),
    "deit": _vit_like(prefix=2),
    "dinov2": _vit_like(prefix=1, dino=True),
    "dinov2_with_registers": _vit_like(prefix=1, dino=True, registers="num_register_tokens"),
    "internvl_vision": _INTERNVL,
    "qwen_vision": _QWEN,
}


def build_tower(
    module: nn.Module, *, layout: str | None = None, feature_layer: int | list[int] = -1
) -> VisionTower:
    """Describe a vision encoder.

    Args:
        module: the encoder.
        layout: key of `VISION_LAYOUTS`; by default the `model_type` of the encoder's config.
        feature_layer: which hidden states become the features, as in `vision_feature_layer` of the
            config: -1 after the last block, -2 one before, 1 after the first; of several, the last.

    Raises:
        UnsupportedModelError: no layout describes this kind of encoder.
    """
    config: Any = getattr(module, "config", None)
    name = layout or getattr(config, "model_type", None) or ""
    if name not in VISION_LAYOUTS:
        raise UnsupportedModelError(
            f"The vision encoder {type(module).__name__} (model_type {name!r}) is of a kind that "
            f"foveate does not know; known are {', '.join(VISION_LAYOUTS)}."
        )
    spec = VISION_LAYOUTS[name]
    registers = getattr(config, spec.registers) if spec.registers else 0
    return lay_out(
        module,
        spec,
        num_prefix=spec.prefix + registers,
        patch_size=pair(config.patch_size),
        feature_layer=feature_layer,
    )


def lay_out(
    module: nn.Module,
    spec: VisionLayout,
    *,
    num_prefix: int,
    patch_size: tuple[int, int],
    feature_layer: int | list[int] = -1,
) -> VisionTower:
    """Describe a vision encoder of a known layout.

    Args:
        module: the encoder.
        spec: where its parts are.
        num_prefix: tokens before the patches.
        patch_size: (height, width) of a patch in pixels.
        feature_layer: as in `build_tower`.

    Raises:
        UnsupportedModelError: a part is missing.
    """
    blocks = tuple(submodule(module, spec.blocks).children())
    attentions = tuple(submodule(block, (spec.attention,)) for block in blocks)
    heads, head_dim = _head_shape(attentions[0])
    norms = spec.head_norms
    return VisionTower(
        module=module,
        blocks=blocks,
        attentions=attentions,
        mlp_inputs=tuple(submodule(block, (spec.mlp_input,)) for block in blocks),
        mlp_outputs=tuple(submodule(block, (spec.mlp_output,)) for block in blocks),
        taps=tuple(
            {key: submodule(block, paths) for key, paths in spec.taps.items()} for block in blocks
        ),
        gains=tuple(getattr(block, spec.gain) if spec.gain else None for block in blocks),
        attention_outputs=tuple(submodule(block, spec.attention_output) for block in blocks),
        num_heads=heads,
        head_dim=head_dim,
        num_prefix=num_prefix,
        has_cls=spec.has_cls,
        packed=spec.packed,
        feature_block=_feature_block(feature_layer, len(blocks)),
        patch_size=patch_size,
        attention_inputs=tuple(submodule(block, (spec.attention_input,)) for block in blocks)
        if spec.attention_input
        else (),
        projections=tuple(_projections(block, spec) for block in blocks),
        head_norms=tuple(
            {key: submodule(block, (path,)) for key, path in norms.items()} for block in blocks
        )
        if norms
        else (),
    )


def _projections(block: nn.Module, spec: VisionLayout) -> dict[str, tuple[nn.Module, ...]]:
    if spec.key_value is not None:
        chains = spec.key_value.items()
        return {name: tuple(submodule(block, (p,)) for p in chain) for name, chain in chains}
    return {name: (submodule(block, spec.taps[name]),) for name in "kv" if name in spec.taps}


def _require(
    what: str, block: int, taps: Mapping[str, nn.Module], captured: Mapping[str, Tensor]
) -> None:
    missing = taps.keys() - captured.keys()
    if missing:
        raise ValueError(
            f"{what} of block {block} needs the outputs of {sorted(taps)}, {sorted(missing)} were "
            "not captured."
        )


def pair(value: Any) -> tuple[int, int]:
    """(height, width) from a config field that holds one number or two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def submodule(module: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    """The first of the submodules that exists.

    Raises:
        UnsupportedModelError: none does.
    """
    for path in paths:
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    raise UnsupportedModelError(
        f"{type(module).__name__} has none of the submodules {', '.join(paths)}; this version of "
        "its library may lay it out in a way that foveate does not know yet."
    )


def _head_shape(attention: nn.Module) -> tuple[int, int]:
    for module in attention.modules():
        heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        width = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
        if heads and width:
            return int(heads), int(width)
    raise UnsupportedModelError(f"{type(attention).__name__} does not say how many heads it has.")


def _feature_block(layer: int | list[int] | tuple[int, ...], depth: int) -> int:
    """Index of the block whose output is entry `layer` of the depth + 1 hidden states."""
    layers = [layer] if isinstance(layer, int) else list(layer)
    block = max(index % (depth + 1) for index in layers) - 1
    if block < 0:
        raise UnsupportedModelError(
            "vision_feature_layer 0 takes the patch embeddings as features; foveate needs the "
            "output of a block."
        )
    return block
