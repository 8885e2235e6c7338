"""The dimensions that FLOPs depend on, read from a transformers model or its configuration.

Configurations name the same thing differently from family to family, so every dimension is looked
up under a list of names. Nothing here runs or imports a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from foveate.core.dims import EncoderDims, ProjectorDims, TransformerDims

_HIDDEN = ("embed_dim", "hidden_size")  # Qwen2-VL's vision hidden_size is the language model's
_LAYERS = ("num_hidden_layers", "depth")
_HEADS = ("num_attention_heads", "num_heads")
_MLP = ("intermediate_size", "ffn_dim")
_CHANNELS = ("num_channels", "in_channels")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

# Configurations do not say how many matrices an MLP has. Language models of today have three
# (gate, up, down) and vision transformers two; these are the exceptions.
_PLAIN_TEXT_MLP = frozenset({"gpt_neox", "opt", "phi", "starcoder2"})
_GATED_VISION_MLP = frozenset({"qwen2_5_vl_vision", "qwen2_5_omni_vision_encoder"})
_POOLED = frozenset({"siglip_vision_model", "siglip2_vision_model"})

_PROJECTORS = frozenset(
    {
        "multi_modal_projector",  # the LLaVA family, Video-LLaVA, InternVL
        "connector",  # Idefics3, SmolVLM
        "merger",  # Qwen-VL
        "deepstack_merger_list",  # Qwen3-VL: one more merger per tapped encoder block
        "projector",  # VideoLLaMA 3
    }
)


def text_dims(model_or_config: Any) -> TransformerDims:
    """Dimensions of the language model inside `model_or_config`.

    Args:
        model_or_config: a transformers model or configuration, of a language model or of a
            multimodal model around one.

    Raises:
        ValueError: a dimension is missing (no language model inside), or the layers are mixtures of
            experts, whose cost depends on how many experts each token takes.

    Example:
        >>> from transformers import Qwen2Config
        >>> config = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
        ...                      num_key_value_heads=2, intermediate_size=4864)
        >>> dims = text_dims(config)
        >>> dims.num_layers, dims.kv_heads, dims.head_dim, dims.gated
        (24, 2, 64, True)
    """
    config = _config_of(model_or_config)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in _EXPERTS):
        raise ValueError(
            f"{_name(config)} is a mixture of experts, which the FLOPs rule does not cover; "
            "describe its active part with TransformerDims(...) yourself."
        )
    hidden, heads = _read(config, _HIDDEN[::-1]), _read(config, _HEADS)
    return TransformerDims(
        num_layers=_read(config, _LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=_read(config, _MLP),
        gated=getattr(config, "model_type", "") not in _PLAIN_TEXT_MLP,
        vocab=_read(config, ("vocab_size",)),
    )


def vision_dims(model_or_config: Any) -> EncoderDims:
    """Dimensions of the vision encoder inside `model_or_config`.

    Args:
        model_or_config: a transformers model or configuration, of an encoder (ViT, DeiT, DINOv2,
            CLIP, SigLIP) or of a multimodal model around one.

    Raises:
        ValueError: a dimension is missing (no vision transformer inside).

    Example:
        >>> from transformers import SiglipVisionConfig
        >>> config = SiglipVisionConfig(hidden_size=1152, num_hidden_layers=27, patch_size=14,
        ...                             num_attention_heads=16, intermediate_size=4304)
        >>> dims = vision_dims(config)
        >>> dims.num_blocks, dims.head_dim, dims.patch_inputs, dims.attention_pool
        (27, 72, 588, True)
    """
    config = _vision_config(_config_of(model_or_config))
    kind = getattr(config, "model_type", "")
    hidden, heads = _read(config, _HIDDEN), _read(config, _HEADS)
    rows, columns = _pair(_read(config, ("patch_size",)))
    frames = _pair(getattr(config, "temporal_patch_size", 1))[0]
    window, full_blocks = _windows(config, rows)
    swiglu = bool(getattr(config, "use_swiglu_ffn", False))
    return EncoderDims(
        num_blocks=_read(config, _LAYERS),
        hidden=hidden,
        heads=heads,
        head_dim=hidden // heads,
        intermediate=_vision_mlp(config, hidden, swiglu),
        patch_inputs=_read(config, _CHANNELS) * frames * rows * columns,
        gated=swiglu or kind in _GATED_VISION_MLP,
        attention_pool=kind in _POOLED and getattr(config, "vision_use_head", True),
        window=window,
        full_blocks=full_blocks,
    )


def projector_dims(model: nn.Module) -> ProjectorDims:
    """Linear layers between the encoder and the language model of `model`.

    The number of encoder tokens that are joined into one row is the input width of the first linear
    layer over the width of the encoder.

    Args:
        model: a multimodal transformers model, or an encoder alone, which has no projector.

    Raises:
        ValueError: a multimodal model without a projector under a known name, or one whose input
            width is no multiple of the encoder's width.
    """
    config = _config_of(model)
    linears = tuple(
        widths
        for projector in _projectors(model)
        for layer in projector.modules()
        if (widths := _linear_widths(layer)) is not None
    )
    if not linears:
        if getattr(config, "text_config", None) is None:
            return ProjectorDims(())
        raise ValueError(
            f"{type(model).__name__} has no projector under the names "
            f"{', '.join(sorted(_PROJECTORS))}; describe it with ProjectorDims(...) yourself."
        )
    layers = getattr(config, "vision_feature_layer", None)
    joined_layers = len(layers) if isinstance(layers, list | tuple) else 1
    width = _read(_vision_config(config), _HIDDEN) * joined_layers
    if linears[0][0] % width:
        raise ValueError(
            f"The projector of {type(model).__name__} takes {linears[0][0]} inputs, no multiple of "
            f"the encoder's width {width}; describe it with ProjectorDims(...) yourself."
        )
    return ProjectorDims(linears, tokens_factor=linears[0][0] // width)


def _projectors(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with a projector's name that are not inside another one."""
    found: list[str] = []
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer in found)
        if path.rpartition(".")[2] in _PROJECTORS and not is_inside:
            found.append(path)
            yield module


def _linear_widths(layer: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, quantised ones included: those are no `nn.Linear`."""
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def _windows(config: Any, patch: int) -> tuple[int, tuple[int, ...]]:
    """Side of the attention windows in patches and the blocks without them (Qwen2.5-VL)."""
    blocks = getattr(config, "fullatt_block_indexes", None)
    if blocks is None:
        return 0, ()
    merge = config.spatial_merge_size
    return config.window_size // merge // patch * merge, tuple(blocks)


def _vision_mlp(config: Any, hidden: int, swiglu: bool) -> int:
    width = getattr(config, "intermediate_size", None)
    width = int(hidden * _read(config, ("mlp_ratio",))) if width is None else width
    # DINOv2-giant keeps two thirds of the width for each of its matrices, rounded up to 8.
    return (int(width * 2 / 3) + 7) // 8 * 8 if swiglu else width


def _config_of(model_or_config: Any) -> Any:
    return getattr(model_or_config, "config", model_or_config)


def _vision_config(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[-1]) if isinstance(size, list | tuple) else (size, size)


def _name(config: Any) -> str:
    return getattr(config, "model_type", "") or type(config).__name__


def _read(config: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ValueError(
        f"{_name(config)} has no {' or '.join(names)}; pass a vision or language model that "
        "foveate knows, or describe it with EncoderDims(...) or TransformerDims(...) yourself."
    )
