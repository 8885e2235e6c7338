"""Cache layers that know how many tokens they stand for and which of their slots are real.

The state that outlives a forward call lives here and not in hooks, so that beam search, several
sequences and second turns work: the cache object carries it.

Legend: B batch, G key heads, T cached slots, Q new slots, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from foveate.errors import AttachmentError


class ReducedLayer(DynamicLayer):
    """A dynamic cache layer whose physical length is shorter than the text it has read.

    `get_seq_length` keeps counting the tokens of the unreduced prompt, because generation slices
    inputs and numbers positions with it; `length` is what attention really sees.

    Attributes:
        valid_BT: bool [B, T], False for padding slots; None when all are real.
        unrotated_BT: bool [B, T], True for keys cached without rotary positions, as a method's
            attention rule asks; None: all are rotated.
        seen: tokens read so far, counted before any reduction.
        shift_B: int64 [B], how far positions moved down when the prompt was renumbered, the same
            in all layers; None: 0.
        extra_B: int64 [B], how far they moved further down in this layer, where a method renumbers
            inside the language model; None: 0.
        rotary_B: float64 [B] on the CPU, how far rotary positions are stretched, the same in all
            layers; None: 1.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.valid_BT: torch.Tensor | None = None
        self.unrotated_BT: torch.Tensor | None = None
        self.seen = 0
        self.shift_B: torch.Tensor | None = None
        self.extra_B: torch.Tensor | None = None
        self.rotary_B: torch.Tensor | None = None
        self._expected: tuple[torch.Tensor | None, int, torch.Tensor | None] | None = None

    @property
    def length(self) -> int:
        """Slots that attention sees."""
        if not self.is_initialized or self.keys is None or self.keys.numel() == 0:
            return 0
        return self.keys.shape[-2]

    @property
    def kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, T, d] of a layer that holds some."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def expect(
        self,
        valid_BQ: torch.Tensor | None,
        num_tokens: int,
        unrotated_BQ: torch.Tensor | None = None,
    ) -> None:
        """Announce the next update: validity of the new slots, tokens they stand for, and which
        keys come without rotary positions."""
        self._expected = (valid_BQ, num_tokens, unrotated_BQ)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_new = key_states.shape[-2]
        changed = any(
            x is not None for x in (self.shift_B, self.extra_B, self.unrotated_BT, self.rotary_B)
        )
        if self._expected is None and (changed or self.length != self.seen):
            raise AttachmentError(
                "This cache was shortened, stretched or attended to by a rule; without the recipe "
                "the model would mask, number and rotate it as if it were its own. Go on inside "
                "foveate.reduce(...), or start a new cache."
            )
        valid_BQ, num_tokens, unrotated_BQ = self._expected or (None, num_new, None)
        self._expected = None
        self.unrotated_BT = join_flags(
            self.unrotated_BT, unrotated_BQ, self.length, num_new, default=False
        )
        self.valid_BT = join_valid(
            self.valid_BT, self.length, valid_BQ, num_new, key_states.shape[0], key_states.device
        )
        self.seen += num_tokens
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def keep(self, index_BK: torch.Tensor, valid_BK: torch.Tensor | None) -> None:
        """Keep the slots `index_BK` (in that order); `valid_BK` marks the real ones."""
        self.keys, self.values = (_take_slots(part, index_BK) for part in self.kv)
        self.valid_BT = valid_BK
        if self.unrotated_BT is not None:
            self.unrotated_BT = self.unrotated_BT.gather(1, index_BK)

    def reset(self) -> None:
        super().reset()
        self.valid_BT = self.unrotated_BT = self._expected = None
        self.shift_B = self.extra_B = self.rotary_B = None
        self.seen = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._reindex(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._reindex(indices)

    def crop(self, tokens_to_remove: int) -> None:
        # Generated tokens are never reduced, so removing from the end is the same count in slots
        # and in tokens. Older releases pass the final length as a positive number instead.
        remove = -tokens_to_remove if tokens_to_remove < 0 else self.seen - tokens_to_remove
        if tokens_to_remove == 0 or remove <= 0 or not self.is_initialized:
            return
        keys, values = self.kv
        self.keys, self.values = keys[..., :-remove, :], values[..., :-remove, :]
        for name in ("valid_BT", "unrotated_BT"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[:, :-remove])
        self.seen -= remove

    def settle(self) -> None:
        """A layer of the model is done with its cache; nothing to do where it is stored as is."""

    def _repeat(self, repeats: int) -> None:
        for name in _STATE:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.repeat_interleave(repeats, dim=0))

    def _reindex(self, index: torch.Tensor) -> None:
        for name in _STATE:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[index.to(value.device)])


def _take_slots(x_BGTd: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
    """The slots `index_BK` of every sample, [B, G, K, d]."""
    if index_BK.shape[0] == 1:
        return x_BGTd.index_select(2, index_BK[0])  # copies whole rows
    index = index_BK[:, None, :, None]
    return x_BGTd.gather(2, index.expand(-1, x_BGTd.shape[1], -1, x_BGTd.shape[-1]))


#: What a layer knows of every sample or slot; the batch is its first dimension.
_STATE = ("valid_BT", "unrotated_BT", "shift_B", "extra_B", "rotary_B")


def join_flags(
    past_BT: torch.Tensor | None,
    new_BQ: torch.Tensor | None,
    num_past: int,
    num_new: int,
    default: bool,
) -> torch.Tensor | None:
    """Flags of past and new slots together, bool [B, T + Q]; None when neither has any."""
    if past_BT is None and new_BQ is None:
        return None
    if past_BT is None:
        assert new_BQ is not None
        past_BT = new_BQ.new_full((new_BQ.shape[0], num_past), default)
    if new_BQ is None:
        new_BQ = past_BT.new_full((past_BT.shape[0], num_new), default)
    return torch.cat([past_BT, new_BQ], dim=1)


def join_valid(
    past_BT: torch.Tensor | None,
    num_past: int,
    new_BQ: torch.Tensor | None,
    num_new: int,
    batch: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Validity of past and new slots together, bool [B, T + Q]; None when all are real."""
    return join_flags(past_BT, new_BQ, num_past, num_new, default=True)


def move_positions(
    cache: Cache, moved_B: torch.Tensor, name: str = "shift_B", first_layer: int = 0
) -> None:
    """Note that positions of all later tokens moved down by `moved_B`, from a layer on.

    Layers that were equal stay so by sharing one tensor, by which later steps know them.
    """
    sums: dict[int, torch.Tensor] = {}
    for layer in cache.layers[first_layer:]:
        old_B = getattr(layer, name)
        if id(old_B) not in sums:
            sums[id(old_B)] = moved_B if old_B is None else old_B + moved_B
        setattr(layer, name, sums[id(old_B)])


def is_managed(cache: Cache | None) -> bool:
    """Whether the cache already carries reduced layers."""
    return cache is not None and any(isinstance(layer, ReducedLayer) for layer in cache.layers)


def adopt(
    cache: Cache | None,
    config: Any,
    num_layers: int,
    attention_mask: torch.Tensor | None,
    make: Callable[[], ReducedLayer] = ReducedLayer,
) -> Cache:
    """Give a cache reduced layers as `make` makes them, keeping what it holds.

    None makes a new cache. One that has such layers keeps them.

    Raises:
        AttachmentError: the cache is static, quantised or slides: its slots cannot be removed.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if is_managed(cache):
        return cache
    refuse_unsupported(cache)
    layers: list[Any] = []
    for index in range(num_layers):
        layer = make()
        old: Any = cache.layers[index] if index < len(cache.layers) else None
        if old is not None and old.is_initialized and old.keys.numel():
            past = old.keys.shape[-2]
            valid = None if attention_mask is None else attention_mask[:, :past].bool()
            layer.expect(None if valid is None or bool(valid.all()) else valid, past)
            layer.update(old.keys, old.values)
        layers.append(layer)
    cache.layers = layers
    cache.layer_class_to_replicate = None
    return cache


def refuse_unsupported(cache: Cache) -> None:
    """Raise when a cache cannot hold layers of different lengths.

    A static cache would attend to the zero keys in the slots that pruned layers never wrote,
    without any error; a sliding window would count slots instead of positions.
    """
    if getattr(cache, "offloading", False):
        raise AttachmentError(
            "An offloaded cache moves its layers away before they can be reduced; use the default "
            "dynamic cache."
        )
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            raise AttachmentError(
                "A static cache cannot be reduced: pruned layers would leave slots that are "
                'attended to as zeros. Drop cache_implementation="static".'
            )
        if type(layer) is not DynamicLayer:
            raise AttachmentError(
                f"Cache layers of type {type(layer).__name__} cannot be reduced; "
                "use the default dynamic cache."
            )
