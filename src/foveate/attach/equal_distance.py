"""Attention of decoder layers whose keys are partly unrotated.

The rotary positions of queries and keys are applied inside a layer's attention module, where hooks
cannot reach, so its `forward` is replaced on the instance (the class and transformers' tables of
attention functions stay as they are) and put back on removal. Calls without unrotated keys run the
original.

Legend: B batch, Q new tokens, T cached slots, H query heads, G key heads, d head channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from foveate import ops
from foveate.attach.cache import join_flags
from foveate.attach.decoder import DecoderCall
from foveate.attach.rules import Embeddings, rotary_scaling, unrotated
from foveate.models.rotary import project_text_qk


class InstanceForward:
    """Stands in for the forward of one module until `remove()`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        self.previous = module.__dict__.get("forward")
        module.__dict__["forward"] = forward

    def remove(self) -> None:
        """Put back what the instance had."""
        if self.previous is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.previous


def replace_forwards(
    attentions: Sequence[nn.Module], running: Callable[[], DecoderCall | None]
) -> list[InstanceForward]:
    """Let the attention of all layers honour unrotated keys; `running` gives the call in flight."""
    return [replace_forward(attention, i, running) for i, attention in enumerate(attentions)]


def replace_forward(
    attention: nn.Module, layer: int, running: Callable[[], DecoderCall | None]
) -> InstanceForward:
    """Let the attention of one layer honour unrotated keys."""
    original = attention.forward
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = running()
        flags = None if call is None else unrotated_keys(call, layer)
        if call is None or flags is None:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        return mixed_attention(
            attention,
            given["hidden_states"],
            given["position_embeddings"],
            given.get("attention_mask"),
            flags,
            cache=given.get("past_key_values"),
            layer=layer,
            scaling=rotary_scaling(call),
        )

    return InstanceForward(attention, forward)


def unrotated_keys(call: DecoderCall, layer: int) -> torch.Tensor | None:
    """Keys of a layer about to run that are unrotated, cached ones first: bool [B, T + Q]."""
    new_BQ = None if call.rules is None else call.rules.unrotated_BL(call.sequence)
    past = call.layer_cache(layer)
    past_BT = None if past is None else past.unrotated_BT
    return join_flags(
        past_BT, new_BQ, 0 if past is None else past.length, call.sequence.length, default=False
    )


def mixed_attention(
    attention: nn.Module,
    hidden_BQD: torch.Tensor,
    position_embeddings: Embeddings,
    attention_mask: torch.Tensor | None,
    unrotated_BK: torch.Tensor,
    *,
    cache: Any = None,
    layer: int = 0,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a Llama-like attention module does, with some keys seen without rotary distance.

    Keys are cached in the form in which they are seen, so that the cache has its usual size.

    Args:
        attention: the module.
        hidden_BQD: its input.
        position_embeddings: (cos, sin) of the Q tokens.
        attention_mask: as sdpa or eager attention reads it.
        unrotated_BK: bool [B, T + Q], cached keys first.
        cache: the cache, updated as usual, or None.
        layer: the layer's number in the cache.
        scaling: what the model multiplies cos and sin with.

    Returns:
        Output [B, Q, D], and the weights [B, H, Q, T + Q] where eager attention would give them.
    """
    module: Any = attention
    q_raw, k_raw = module.q_proj(hidden_BQD), module.k_proj(hidden_BQD)
    q_rotated, k_rotated = project_text_qk(module, q_raw, k_raw, position_embeddings)
    plain = unrotated(position_embeddings, scaling)
    q_plain, k_plain = project_text_qk(module, q_raw, k_raw, plain)
    assert k_rotated is not None and k_plain is not None
    new_BQ = unrotated_BK[:, -hidden_BQD.shape[1] :]
    keys = torch.where(new_BQ[:, None, :, None], k_plain, k_rotated)
    values = module.v_proj(hidden_BQD).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    if cache is not None:
        keys, values = cache.update(keys, values, layer)
    eager = module.config._attn_implementation == "eager"
    out_BHQd, weights = ops.equal_distance_attention(
        q_rotated,
        q_plain,
        keys,
        values,
        unrotated_BK,
        attn_mask=attention_mask,
        scale=float(module.scaling),
        # Eager attention hands its weights out, all rows at once.
        **({"tile": 2**62} if eager else {}),
    )
    out_BQD = module.o_proj(out_BHQd.transpose(1, 2).flatten(2))
    return out_BQD, weights if eager else None
