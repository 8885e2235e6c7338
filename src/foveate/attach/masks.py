"""Attention masks for layers whose key lengths differ.

Legend: B batch, T keys, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

from foveate.attach.cache import join_valid
from foveate.errors import AttachmentError


class _Sizes:
    """Stands in for a cache that counts tokens when a mask needs physical lengths."""

    is_compileable = False
    is_sliding = (False,)
    layers = ()

    def __init__(self, num_past: int) -> None:
        self.num_past = num_past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.num_past + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.num_past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_past


def refuse_unmasked(config: Any) -> None:
    """Raise when the attention has no mask function: padding would be attended to, silently."""
    name = config._attn_implementation
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise AttachmentError(
            f"The attention {name!r} of this language model has no mask function, so columns that "
            "a reduction empties would be attended to. Register one under the same name with "
            'AttentionMaskInterface.register, or load the model with attn_implementation="sdpa".'
        )


class MaskMaker:
    """Builds one mask per distinct pair of past and new validity, shared by all such layers.

    None is returned only where the kernel's own causal form is right: never when several queries
    meet a longer past, where fused kernels would silently cut the keys.
    """

    def __init__(self, config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.batch = batch
        self.dtype = dtype
        self.device = device
        self._made: dict[tuple, torch.Tensor | None] = {}
        self._alive: list[torch.Tensor | None] = []

    def make(
        self,
        num_past: int,
        past_BT: torch.Tensor | None,
        num_new: int,
        new_BQ: torch.Tensor | None,
        visible_BQQ: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The mask in the form that the model's attention implementation reads.

        `visible_BQQ` replaces the causal order among the new tokens where a rule says who sees
        whom; all of them see the past.
        """
        if num_new == 1 and past_BT is None and new_BQ is None:
            return None  # one query that sees everything: every kernel does that unasked
        key = (num_past, num_new, *map(_fingerprint, (past_BT, new_BQ, visible_BQQ)))
        if key not in self._made:
            valid = join_valid(past_BT, num_past, new_BQ, num_new, self.batch, self.device)
            sees = None if visible_BQQ is None else _overlay(visible_BQQ, num_past)
            shape_only = torch.empty(self.batch, num_new, 0, dtype=self.dtype, device=self.device)
            self._made[key] = create_causal_mask(
                config=self.config,
                inputs_embeds=shape_only,
                attention_mask=valid,
                past_key_values=_Sizes(num_past),  # pyright: ignore[reportArgumentType]
                layer_idx=0,
                or_mask_function=sees,
                and_mask_function=sees,
            )
            # Fingerprints are addresses: the tensors must outlive them.
            self._alive += [past_BT, new_BQ, visible_BQQ]
        return self._made[key]


def _overlay(visible_BQQ: torch.Tensor, num_past: int) -> Callable[..., torch.Tensor]:
    """(causal or this) and this is this alone, in the index form that mask functions have."""
    visible_BQT = torch.nn.functional.pad(visible_BQQ, (num_past, 0), value=True)

    def sees(batch: Any, head: Any, row: Any, key: Any) -> torch.Tensor:
        return visible_BQT[batch, row - num_past, key]

    return sees


def _fingerprint(valid: torch.Tensor | None) -> tuple | None:
    return None if valid is None else (valid.data_ptr(), valid.storage_offset(), *valid.shape)
