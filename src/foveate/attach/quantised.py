"""A cache layer that stores old keys and values in few bits.

While a layer of the model runs, its cache is open: keys and values of all slots in full precision,
as every other part of the attachment expects them. `settle` closes it again. Codes belong to the
real tokens of a sample, counted from its first, so that padding and neighbours change nothing, and
what is stored once is never rounded again, unless stored tokens are taken away.

transformers' own QuantizedLayer is not the base: it stores a prompt to its last token, rounds again
whenever its buffer is full, and cannot leave out slots.

Legend: B batch, G key heads, T slots, Q stored tokens, R tokens in full precision, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from foveate import ops
from foveate.attach.cache import ReducedLayer
from foveate.attach.sequence import Sequence
from foveate.core import CacheStorage, Recipe, Report
from foveate.ops.quantise import Quantised

Pair = tuple[torch.Tensor, torch.Tensor]


def plan_storage(recipe: Recipe) -> Callable[[], ReducedLayer]:
    """Makes the cache layers that a recipe wants."""
    for index in recipe.at("cache"):
        storage = recipe.steps[index].method.cache_storage()
        if storage is not None:
            return lambda: QuantisedLayer(storage)
    return ReducedLayer


def exempt_samples(cache: Cache | None, sequence: Sequence) -> None:
    """Tell the layers at every prompt which samples have no visual tokens."""
    without_visual = [visual.num == 0 for visual in sequence.visual]
    for layer in () if cache is None else cache.layers:
        if isinstance(layer, QuantisedLayer):
            layer.exempt(without_visual)


def note_storage(cache: Cache, report: Report) -> None:
    """Say in the report how many bytes the cache takes, if it is stored in few bits."""
    layers = [layer for layer in cache.layers if isinstance(layer, QuantisedLayer)]
    if any(layer.packed is not None for layer in layers):
        held, full = (sum(getattr(x, n) for x in layers) for n in ("nbytes", "full_nbytes"))
        report.notes.append(f"the cache of the prompt takes {held:,} bytes instead of {full:,}")


class QuantisedLayer(ReducedLayer):
    """A `ReducedLayer` whose tokens are stored in few bits, but for the last ones.

    Attributes:
        storage: bits, group and number of recent tokens.
        exempt_B: bool [B], samples without visual tokens, which are left alone; None: none is.
        packed: stored keys and values of the first tokens of every sample, aligned on the left.
        recent: the others [B, G, R, d], aligned on the right.
    """

    def __init__(self, storage: CacheStorage, **kwargs: Any) -> None:
        self._whole: list[torch.Tensor | None] = [None, None]
        self.storage = storage
        super().__init__(**kwargs)
        self._forget()

    def _forget(self) -> None:
        self.packed: tuple[Quantised, Quantised] | None = None
        self.recent: Pair | None = None
        self.exempt_B: torch.Tensor | None = None
        self._asked = False
        self._packed_B: torch.Tensor | None = None
        self._whole = [None, None]
        self._slots = 0
        self._ragged = False
        # Real tokens that came since the layer was closed; None: slots changed otherwise.
        self._appended: int | None = 0
        # The most tokens that a sample holds in full precision and may have to store.
        self._waiting = 0

    # -- what the rest sees ---------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys of all slots, restored where they are stored."""
        return self._all(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._whole[0] = value

    @property
    def values(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Values of all slots, restored where they are stored."""
        return self._all(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._whole[1] = value

    @property
    def kv(self) -> Pair:
        self._open()
        keys, values = self._whole
        assert keys is not None and values is not None
        return keys, values

    @property
    def length(self) -> int:
        whole = self._whole[0]
        if whole is None:
            return self._slots
        return whole.shape[-2] if whole.numel() else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are stored now."""
        tensors = [x for x in (*self._whole, *(self.recent or ())) if x is not None]
        return sum(x.nbytes for x in (*tensors, *(self.packed or ())))

    @property
    def full_nbytes(self) -> int:
        """Bytes that the same slots take in full precision."""
        held = self.recent or self._whole
        return sum(
            x.shape[0] * x.shape[1] * self.length * x.shape[3] * x.element_size()
            for x in held
            if x is not None and x.dim() == 4
        )

    # -- open and closed ------------------------------------------------------------------------

    def _all(self, which: int) -> torch.Tensor | None:
        whole = self._whole[which]
        if whole is not None or self.recent is None:
            return whole
        recent = self.recent[which]
        if self.packed is None or self._packed_B is None:
            full, stored = recent, 0
        else:
            full = torch.cat([self.packed[which].dequantise(recent.dtype), recent], dim=2)
            stored = self.packed[which].num_tokens
        if self.valid_BT is None and not self._ragged:
            return full
        valid_BT = self._valid(full)
        rank_BT = valid_BT.cumsum(1) - 1
        shift_B1 = full.shape[2] - valid_BT.sum(1, keepdim=True)
        if stored and self._packed_B is not None:
            from_end_BT = rank_BT >= self._packed_B[:, None]
            rank_BT = torch.where(from_end_BT, rank_BT + shift_B1, rank_BT)
        else:
            rank_BT = rank_BT + shift_B1
        return _take(full, rank_BT.clamp(0, full.shape[2] - 1))

    def _valid(self, like: torch.Tensor) -> torch.Tensor:
        if self.valid_BT is not None:
            return self.valid_BT
        return torch.ones(like.shape[0], self.length, dtype=torch.bool, device=like.device)

    def _open(self) -> None:
        if self._whole[0] is None and self.recent is not None:
            self._whole = [self._all(0), self._all(1)]

    def exempt(self, without_visual: list[bool]) -> None:
        """Leave samples alone that have had no visual tokens so far; asked at every prompt."""
        if self._asked and self.exempt_B is None:
            return
        known = self._whole[0] if self.recent is None else self.recent[0]
        device = None if known is None else known.device
        without_B = torch.tensor(without_visual, device=device)
        if not self._asked:
            self.exempt_B = without_B if any(without_visual) else None
        elif self.exempt_B is not None:
            self.exempt_B = self.exempt_B & without_B
        self._asked = True

    @torch.no_grad()
    def settle(self) -> None:
        """Store what has become old and let go of the rest."""
        keys, values = self._whole
        if keys is None or values is None or not keys.numel():
            return
        if self._appended is not None and self.recent is not None:
            start = keys.shape[2] - self._appended
            old = self.recent
            recent = (
                torch.cat([old[0], keys[:, :, start:]], dim=2),
                torch.cat([old[1], values[:, :, start:]], dim=2),
            )
            self._waiting += self._appended
            if self._waiting < self.storage.recent + self.storage.group:
                self._close(recent)
                return
        if self.valid_BT is None and self.exempt_B is None and not self._ragged:
            self._close(self._pack_even((keys, values)))
        else:
            self._close(self._pack_ragged((keys, values)))

    def _close(self, recent: Pair) -> None:
        self._slots = self.length
        self.recent = recent
        self._whole, self._appended = [None, None], 0

    def _pack_even(self, whole: Pair) -> Pair:
        """Store samples of equal length; returns what stays in full precision."""
        length, group = whole[0].shape[2], self.storage.group
        known = 0 if self.packed is None else self.packed[0].num_tokens
        known = min(known, length // group * group)
        stored = max(known, (length - self.storage.recent) // group * group)
        if stored > 0:
            new = self._quantise((whole[0][:, :, known:stored], whole[1][:, :, known:stored]))
            if self.packed is not None:
                pairs = zip(self.packed, new, strict=True)
                new = tuple(_joined(old, more, known) for old, more in pairs)
            self.packed = new[0], new[1]
            self._packed_B = torch.full(whole[0].shape[:1], stored, device=whole[0].device)
        else:
            stored, self.packed, self._packed_B = 0, None, None
        self._waiting = length - stored
        # Copies: a slice would keep the whole alive.
        return whole[0][:, :, stored:].clone(), whole[1][:, :, stored:].clone()

    def _pack_ragged(self, whole: Pair) -> Pair:
        """Store samples of any length, each counted from its first real token."""
        group, device = self.storage.group, whole[0].device
        valid_BT = self._valid(whole[0])
        num_B = valid_BT.sum(1)
        known_B = torch.zeros_like(num_B) if self._packed_B is None else self._packed_B
        known_B = known_B.minimum(num_B // group * group)
        stored_B = (num_B - self.storage.recent).clamp(min=0) // group * group
        exempt_B = torch.zeros_like(num_B, dtype=torch.bool)
        if self.exempt_B is not None:
            exempt_B |= self.exempt_B.to(exempt_B.device)
        stored_B = stored_B.maximum(known_B).masked_fill(exempt_B, 0)
        rest_B = num_B - stored_B
        counts = [stored_B.max(), rest_B.max(), rest_B.masked_fill(exempt_B, 0).max()]
        stored, rest, self._waiting = torch.stack(counts).tolist()
        slot_BT = (~valid_BT).byte().argsort(dim=1, stable=True)
        self._ragged = True
        if stored:
            old_slots = slot_BT[:, :stored]
            new = self._quantise((_take(whole[0], old_slots), _take(whole[1], old_slots)))
            if self.packed is not None:
                pairs = zip(self.packed, new, strict=True)
                new = tuple(_kept(old, more, known_B) for old, more in pairs)
            self.packed, self._packed_B = (new[0], new[1]), stored_B
        else:
            self.packed = self._packed_B = None
        rank_BR = num_B[:, None] - rest + torch.arange(rest, device=device)
        slot_BR = slot_BT.gather(1, rank_BR.clamp(min=0))
        return _take(whole[0], slot_BR), _take(whole[1], slot_BR)

    def _quantise(self, pair: Pair) -> tuple[Quantised, Quantised]:
        bits, group = self.storage.bits, self.storage.group
        channels = _divisor(pair[1].shape[-1], group)
        return (
            ops.quantise(pair[0], bits=bits, group=group, dim=-2),
            ops.quantise(pair[1], bits=bits, group=channels, dim=-1),
        )

    # -- what changes slots ---------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        self._open()
        valid_BQ = None if self._expected is None else self._expected[0]
        if valid_BQ is not None:
            self._appended = None
        elif self._appended is not None:
            self._appended += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def keep(self, index_BK: torch.Tensor, valid_BK: torch.Tensor | None) -> None:
        if self.packed is not None and self._packed_B is not None:
            valid_BT = self._valid(index_BK)
            stored_BT = valid_BT & (valid_BT.cumsum(1) <= self._packed_B[:, None])
            still_BK = stored_BT.gather(1, index_BK)
            if valid_BK is not None:
                still_BK &= valid_BK
            if bool((still_BK.sum(1) != self._packed_B).any()):
                self._open()
                self.packed = self._packed_B = None
        super().keep(index_BK, valid_BK)
        self._appended = None

    def crop(self, tokens_to_remove: int) -> None:
        self._open()
        before = self.length
        super().crop(tokens_to_remove)
        if self.length != before:
            self._appended = None

    def reset(self) -> None:
        self._whole = [None, None]
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))
        self._reindex(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))
        self._repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])
        self._reindex(indices)

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Do the same to the samples of everything that is held."""
        self._whole = [None if x is None or not x.numel() else change(x) for x in self._whole]
        if self.recent is not None:
            self.recent = change(self.recent[0]), change(self.recent[1])
        if self.exempt_B is not None:
            self.exempt_B = change(self.exempt_B)
        if self.packed is not None and self._packed_B is not None:
            keys, values = (made.with_parts(*map(change, made.parts)) for made in self.packed)
            self.packed, self._packed_B = (keys, values), change(self._packed_B)


def _take(x_BGTd: torch.Tensor, slot_BK: torch.Tensor) -> torch.Tensor:
    """Slots of every sample, [B, G, K, d]."""
    index = slot_BK[:, None, :, None].expand(-1, x_BGTd.shape[1], -1, x_BGTd.shape[3])
    return x_BGTd.gather(2, index)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(part for part in range(min(size, most), 0, -1) if size % part == 0)


def _joined(old: Quantised, more: Quantised, num_tokens: int) -> Quantised:
    """The first tokens of one and all of the other."""
    parts = []
    for one, other in zip(old.parts, more.parts, strict=True):
        length = num_tokens * one.shape[2] // old.num_tokens
        parts.append(torch.cat([one[:, :, :length], other], dim=2))
    return more.with_parts(*parts)


def _kept(old: Quantised, new: Quantised, known_B: torch.Tensor) -> Quantised:
    """`new`, but the first `known_B` tokens of every sample as they were stored before."""
    parts = []
    for one, other in zip(old.parts, new.parts, strict=True):
        length = other.shape[2]
        one = pad(one, (0, 0, 0, max(length - one.shape[2], 0)))[:, :, :length]
        start = torch.arange(length, device=one.device) * (new.num_tokens // length)
        parts.append(one.where((start < known_B[:, None])[:, None, :, None], other))
    return new.with_parts(*parts)
