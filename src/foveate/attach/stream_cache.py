"""Keys and values of a stream: the system prompt and what is remembered of past frames.

Legend: G key heads, d head channels, C system tokens, S slots of remembered frames, E remembered
frames (or planes of frames that are joined), T new frames, L new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.attach.stream_positions import GridClock
from foveate.core.stream import StreamStep
from foveate.models.rotary import rotate


@dataclass(frozen=True, eq=False)
class StreamLayer:
    """One layer's slots, the system prompt first.

    Attributes:
        keys: [1, G, C + S, d], rotated at `position_S`.
        values: alike.
        position_S: int64 [C + S], the position at which each key was computed; [3, C + S] where
            they have time, row and column.
    """

    keys: Tensor
    values: Tensor
    position_S: Tensor


class StreamCache:
    """What a stream remembers; nothing in it is ever changed in place.

    Every forward call gets a cache of its own from `open`, so that what is written there (a frame's
    tokens, a question and its answer) is gone with it unless `commit` takes it over.

    Args:
        layers: the system prompt's keys and values.
        renumber: keys are turned to contiguous positions whenever they are read.
        clock: of models that number by time, row and column; such keys are always turned.
    """

    def __init__(
        self, layers: list[StreamLayer], renumber: bool, clock: GridClock | None = None
    ) -> None:
        self.layers = layers
        self.renumber = renumber
        self.clock = clock
        self.num_system = layers[0].keys.shape[2]
        device = layers[0].keys.device
        self.entry_S = torch.empty(0, dtype=torch.long, device=device)
        self.num_entries = 0
        # Seconds and largest side of every remembered plane, where there is a clock; on the CPU,
        # because not every device has float64.
        self.plane_E2 = torch.empty(0, 2, dtype=torch.float64)

    @property
    def length(self) -> int:
        """Slots, the system prompt among them."""
        return self.layers[0].keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return sum(
            part.numel() * part.element_size()
            for layer in self.layers
            for part in (layer.keys, layer.values)
        )

    def open(self, rotary: Any, seen_S: Tensor | None = None) -> DynamicCache:
        """A cache for one call; writing to it leaves this one as it is.

        Args:
            rotary: the language model's rotary embedding.
            seen_S: bool [C + S], the slots that the call attends to; None: all.
        """
        cache = DynamicCache()
        turns: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(self.layers):
            keys = layer.keys
            if self.renumber:
                key = id(layer.position_S)
                if key not in turns:
                    turns[key] = rotary(
                        keys, (self._ranks(seen_S) - layer.position_S).unsqueeze(-2)
                    )
                cos, sin = turns[key]
                keys = rotate(keys, cos[:, None], sin[:, None])
            cache.update(keys, layer.values, index)
        return cache

    def _ranks(self, seen_S: Tensor | None) -> Tensor:
        if self.clock is not None:
            seen_E = torch.ones_like(self.plane_E2[:, 0], dtype=torch.bool)
            if seen_S is not None:
                seen_K = self.entry_S[seen_S[self.num_system :]].cpu()
                seen_E = torch.bincount(seen_K, minlength=self.num_entries).bool()
            # Rows and columns stay; time begins anew at the first plane that is seen.
            position_3S = self.layers[0].position_S.clone()
            time_E = self.clock.times(self.plane_E2[:, 0], seen_E)
            time_S = time_E.to(self.entry_S.device)[self.entry_S]
            position_3S[0, self.num_system :] = self.num_system + time_S
            return position_3S
        if seen_S is None:
            return torch.arange(self.length, device=self.entry_S.device)
        return seen_S.long().cumsum(0) - 1

    def starts(self, step: StreamStep, sees_TE: Tensor) -> Tensor:
        """The position of every new frame's first token, int64 [T]."""
        old_E = torch.bincount(self.entry_S, minlength=self.num_entries)
        new_T = torch.bincount(step.frame_L[step.kept_L], minlength=sees_TE.shape[0])
        return self.num_system + sees_TE.long() @ torch.cat([old_E, new_T])

    def place(self, step: StreamStep, place_L2: Tensor, plane_T2: Tensor) -> Tensor:
        """Positions of new tokens by time, row and column, int64 [3, L].

        Args:
            step: the new planes.
            place_L2: row and column of every token.
            plane_T2: seconds and largest side of every new plane.
        """
        assert self.clock is not None
        second_E = torch.cat([self.plane_E2, plane_T2])[:, 0]
        sees_TE = step.sees_TE.cpu()
        own_T = self.num_entries + torch.arange(len(sees_TE))
        time_T = [
            self.clock.times(second_E, seen_E.index_fill(0, own, True))[own]
            for seen_E, own in zip(sees_TE, own_T[:, None], strict=True)
        ]
        time_L = torch.cat(time_T).to(place_L2.device)[step.frame_L]
        return self.num_system + torch.cat([time_L[None], place_L2.t()])

    def text_positions(self, count: int) -> Tensor | None:
        """Where so many tokens of text behind the frames stand, int64 [3, count].

        None where a token's slot is its position.
        """
        if self.clock is None:
            return None
        position_3S = self._ranks(None)
        extent, time = 0, 0
        if self.num_entries:
            extent = int(self.plane_E2[:, 1].max())
            time = int(position_3S[0, self.num_system :].max()) - self.num_system
        first = self.clock.behind(self.num_system, extent, time)
        text_L = first + torch.arange(count, device=position_3S.device)
        return text_L.expand(3, -1)

    def allowed(self, step: StreamStep, sees_TE: Tensor) -> Tensor:
        """Which slot each new token attends to, bool [L, C + S + L]. O(L (C + S + L))."""
        frame_L, num_new = step.frame_L, len(step.frame_L)
        sees_LE = sees_TE[frame_L]
        system_LC = sees_LE.new_ones(num_new, self.num_system)
        past_LS = sees_LE[:, self.entry_S]
        others_LL = sees_LE[:, self.num_entries + frame_L] & step.kept_L
        own_LL = (frame_L[:, None] == frame_L).tril()
        return torch.cat([system_LC, past_LS, own_LL | others_LL], dim=1)

    def share_of_entries(self, rows: list[Tensor]) -> Tensor:
        """How attention [H, at least C + S] of every layer falls on frames, float32 [E], sum 1."""
        mean_S = torch.stack([row_HT.mean(0) for row_HT in rows]).mean(0)
        mean_S = mean_S[self.num_system : self.length]
        share_E = mean_S.new_zeros(self.num_entries).index_add_(0, self.entry_S, mean_S)
        return share_E / share_E.sum().clamp(min=1e-12)

    def commit(
        self,
        cache: DynamicCache,
        step: StreamStep,
        position_L: Tensor,
        kept: list[Tensor],
        plane_T2: Tensor | None = None,
    ) -> None:
        """Take over what stays of new frames, and let go of frames that do not remain.

        Args:
            cache: of `open`, after the call that read the new tokens.
            step: what was read.
            position_L: positions of the new tokens, [L] or [3, L].
            kept: per layer bool [L], as many True in all.
            plane_T2: seconds and largest side of every new plane, where there is a clock.
        """
        device, total = self.entry_S.device, self.num_entries + int(step.frame_L[-1]) + 1
        rank_E = torch.full((total,), -1, device=device)
        remains_K = step.remains_K.to(device)
        rank_E[remains_K] = torch.arange(len(remains_K), device=device)
        system_C = torch.arange(self.num_system, device=device)
        old_S = self.num_system + (rank_E[self.entry_S] >= 0).nonzero()[:, 0]
        new_L = rank_E[self.num_entries + step.frame_L]
        past, layers = self.length, []
        shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(self.layers):
            key = (id(layer.position_S), id(kept[index]))
            if key not in shared:
                fresh_K = (kept[index] & (new_L >= 0)).nonzero()[:, 0]
                old = layer.position_S
                parts = [old[..., system_C], old[..., old_S], position_L[..., fresh_K]]
                position_S = torch.cat(parts, dim=-1)
                shared[key] = fresh_K, position_S
            fresh_K, position_S = shared[key]
            stays_S = torch.cat([system_C, old_S])
            new: Any = cache.layers[index]
            parts = [
                torch.cat([old[:, :, stays_S], full[:, :, past + fresh_K]], dim=2)
                for old, full in ((layer.keys, new.keys), (layer.values, new.values))
            ]
            layers.append(StreamLayer(parts[0], parts[1], position_S))
        fresh_K = (kept[0] & (new_L >= 0)).nonzero()[:, 0]
        self.entry_S = torch.cat([rank_E[self.entry_S[old_S - self.num_system]], new_L[fresh_K]])
        self.num_entries = len(remains_K)
        if plane_T2 is not None:
            self.plane_E2 = torch.cat([self.plane_E2, plane_T2])[step.remains_K.cpu()]
        self.layers = layers
