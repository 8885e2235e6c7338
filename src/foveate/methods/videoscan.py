"""VideoScan: one carrier token per frame; of past frames only carriers stay in the cache.

Legend: T frames, N tokens of a frame, M carriers in memory, L tokens of a sequence, D channels,
H query heads, E frames remembered before a group, K kept, S tokens of one frame with its carrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity

from foveate.core import Budget, Card, Count, Grid, Method, ProjectorContext, Reduction, Tokens
from foveate.core.stream import StreamMemory, StreamStep
from foveate.ops import scatter_mean


def frame_carriers(x_TND: torch.Tensor) -> torch.Tensor:
    """The carrier of every frame: the mean of its tokens, newlines among them. [T, D].

    Source: VideoScan, section 3.2 (arXiv 2503.09387).
    """
    return x_TND.mean(dim=1)


def neighbour_cosines(x_MD: torch.Tensor) -> torch.Tensor:
    """Cosine of every carrier with the next one, [M - 1]. O(M D)."""
    return cosine_similarity(x_MD[:-1], x_MD[1:], dim=-1)


def most_redundant(x_MD: torch.Tensor) -> int:
    """The carrier to forget: the older of the two neighbours that resemble each other most.

    Of equally alike pairs the first; the newest carrier is never taken. O(M D).

    Raises:
        ValueError: there are fewer than two carriers.

    Example:
        >>> most_redundant(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.0]]))
        1

    Source: VideoScan, section 3.3 (arXiv 2503.09387).
    """
    if len(x_MD) < 2:
        raise ValueError(f"a pair of carriers is needed to compare, got {len(x_MD)}.")
    return int(neighbour_cosines(x_MD).argmax())


def kept_slots(
    system_len: int, num_past: int, frame_len: int, picked: Sequence[int] = ()
) -> torch.Tensor:
    """Places in a layer's cache that stay behind a frame, ascending int64.

    Args:
        system_len: tokens of the system prompt.
        num_past: slots of past frames.
        frame_len: tokens of the frame; its carrier follows them, and text may follow the carrier.
        picked: places among the frame's tokens that stay, too, ascending.

    Example:
        >>> kept_slots(2, 3, 4).tolist(), kept_slots(2, 3, 4, [0, 2]).tolist()
        ([0, 1, 2, 3, 4, 9], [0, 1, 2, 3, 4, 5, 7, 9])

    Source: VideoScan, section 3.2 (arXiv 2503.09387); `picked` is VideoScan+ of the released code.
    """
    before = system_len + num_past
    return torch.tensor([*range(before), *(before + place for place in picked), before + frame_len])


def pick_frame_tokens(attention_HN: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens of a frame that its carrier attends to most, mean over heads; ascending int64.

    Equal ones go to the lower place.

    Example:
        >>> pick_frame_tokens(torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.2, 0.2]]), 2).tolist()
        [0, 1]
    """
    best_N = attention_HN.float().mean(0).sort(descending=True, stable=True).indices
    return best_N[:count].sort().values


def stage2_allow(
    system_len: int, num_frames: int, tokens_per_frame: int, text_len: int
) -> torch.Tensor:
    """Who sees whom in the second training stage, bool [L, L]; rows attend to columns.

    L = system_len + num_frames * (tokens_per_frame + 1) + text_len. The system prompt is causal;
    a frame's tokens and its carrier see the system prompt, earlier carriers and their own frame up
    to themselves; text sees the system prompt, all carriers and the text before it.

    Example:
        >>> stage2_allow(1, 2, 1, 1).int().tolist()[-3:]
        [[1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0], [1, 0, 1, 0, 1, 1]]

    Source: VideoScan, section 3.4 (arXiv 2503.09387).
    """
    size = tokens_per_frame + 1
    system_s = torch.full((system_len,), -1)
    text_x = torch.full((text_len,), num_frames)
    block_L = torch.cat([system_s, torch.arange(num_frames).repeat_interleave(size), text_x])
    carrier_L = torch.zeros(len(block_L), dtype=torch.bool)
    carrier_L[system_len + tokens_per_frame : system_len + num_frames * size : size] = True
    open_L = carrier_L | (block_L == -1)
    same_LL = block_L[:, None] == block_L
    return (same_LL | open_L).tril()


class CarrierMemory(StreamMemory):
    """The carriers of a stream: at `capacity` the most redundant one goes, so one less stays.

    Eviction reads embeddings only, so a group of frames is decided before the language model runs,
    exactly as if they came one by one. O(D) per frame, on the CPU.

    Args:
        capacity: carriers at which one is evicted, at least 2.
        add_kv: tokens of every frame that stay in the cache beside its carrier (VideoScan+).
        shared_layer: the layer whose choice holds for all from it on; None: each its own.
    """

    def __init__(self, capacity: int, add_kv: int = 0, shared_layer: int | None = None) -> None:
        self.capacity, self.add_kv, self.shared_layer = capacity, add_kv, shared_layer
        self._carriers: list[torch.Tensor] = []
        self._cosines: list[float] = []
        self._choice = torch.empty(0, dtype=torch.long)

    @property
    def picked(self) -> int:
        return self.add_kv

    @property
    def carriers_MD(self) -> torch.Tensor:
        """The carriers that are remembered, float32 on the CPU, oldest first."""
        return torch.stack(self._carriers)

    def add(self, carrier_D: torch.Tensor) -> int | None:
        """Remember one more carrier; the place of the one that went, None when none had to."""
        self._carriers.append(carrier_D)
        if len(self._carriers) > 1:
            self._cosines.append(self._cosine(len(self._carriers) - 2))
        if len(self._carriers) < self.capacity:
            return None
        place = self._cosines.index(max(self._cosines))
        del self._carriers[place], self._cosines[place]
        if place > 0:
            self._cosines[place - 1] = self._cosine(place - 1)
        return place

    def push(self, x_LD: torch.Tensor, frame_L: torch.Tensor, num_frames: int) -> StreamStep:
        """Put a carrier behind every frame and remember those."""
        device = x_LD.device
        carrier_TD = scatter_mean(x_LD[None], frame_L[None], num_frames)[0]
        all_LD = torch.cat([x_LD, carrier_TD])
        all_L = torch.cat([frame_L, torch.arange(num_frames, device=device)])
        order_L = all_L.sort(stable=True).indices
        kept_L = order_L >= len(x_LD)
        alive = list(range(len(self._carriers)))
        first_new = len(alive)
        sees_TE = torch.zeros(num_frames, first_new + num_frames, dtype=torch.bool)
        for frame, carrier_D in enumerate(carrier_TD.float().cpu()):
            sees_TE[frame, alive] = True
            alive.append(first_new + frame)
            gone = self.add(carrier_D)
            if gone is not None:
                del alive[gone]
        return StreamStep(all_LD[order_L], all_L[order_L], kept_L, sees_TE, torch.tensor(alive))

    def pick(self, layer: int, attention_HS: torch.Tensor, kept_S: torch.Tensor) -> torch.Tensor:
        """The tokens that the carrier attends to most, or those of the shared layer."""
        if self.shared_layer is None or layer <= self.shared_layer:
            self._choice = pick_frame_tokens(attention_HS[:, ~kept_S], self.add_kv)
        return self._choice

    def _cosine(self, place: int) -> float:
        pair_2D = torch.stack(self._carriers[place : place + 2])
        return float(neighbour_cosines(pair_2D)[0])


@dataclass(frozen=True)
class VideoScan(Method):
    """VideoScan: a carrier per frame, remembered up to a capacity.

    On a prompt (`foveate.reduce`) the carriers alone take the place of the frames, as in the first
    training stage; in `foveate.Stream` each carrier is computed with its frame in sight, and its
    keys and values in all layers are what stays.

    Args:
        capacity: carriers at which the most redundant one is evicted, so that at most one less is
            remembered.
        add_kv: tokens of every frame that stay in the cache of a stream beside its carrier, in
            every layer those that it attends to most (VideoScan+ has 16).
        shared_layer: with `add_kv`, the layer whose choice holds for all deeper ones; None: every
            layer has its own.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> VideoScan().count(Grid.video(16, 14, 14), Budget(retain=0.5))
        Count(tokens=16, exact=True)
        >>> VideoScan(capacity=9).count(Grid.video(16, 14, 14), Budget(retain=0.5)).tokens
        8

    Source: arXiv 2503.09387, sections 3.2 and 3.3.
    """

    capacity: int = 64
    add_kv: int = 0
    shared_layer: int | None = None

    card: ClassVar[Card] = Card(
        name="videoscan",
        title="VideoScan",
        paper="VideoScan: Enabling Efficient Streaming Video Understanding via Frame-level "
        "Semantic Carriers",
        arxiv="2503.09387",
        year=2025,
        url="https://github.com/LyliAgave/VideoScan",
        licence="Apache-2.0 (named in the README; the repository has no licence file)",
        stages=("projector",),
        kind="trained",
        summary="Averages every frame to one carrier token; in a stream only the carriers' keys "
        "and values stay, up to a capacity.",
        defaults={
            "LLaVA-Video-7B": "1 frame a second, capacity 64 or 128",
            "VideoScan+": "add_kv=16",
        },
        headline=(
            "LLaVA-Video-7B, capacity 128: MVBench 48.9, MLVU 61.3, LongVideoBench 49.5, VideoMME "
            "55.1 (untouched with 64 frames of 210 tokens: average 62.7, here 53.7)",
            "VStream-QA on an A100: Ego 60.9, Movie 54.1 at 2.1 s and a constant 18 GB",
            "VideoMME 54.0; without the carriers' embeddings 44.5, without their keys and values "
            "42.6",
        ),
        notes=(
            "Published weights were trained for this, in two stages; a model that was not loses "
            "much of what it could do.",
            "foveate.reduce(model, 'videoscan') is the form of the first training stage: carriers "
            "are the only visual tokens. Carriers computed beside their frames are foveate.Stream.",
            "In foveate.reduce every plane (frame, tile) becomes one token; the budget is an upper "
            "bound that makes the capacity smaller where it asks for fewer.",
            "In a stream positions follow the released code: new tokens start behind as many as "
            "are remembered, cached keys keep theirs. Stream(renumber=True) makes them contiguous.",
            "The paper speaks of a memory of M; as in the released code one less stays.",
            "The released code computes a dummy text behind every frame and throws it away; here "
            "it is not computed, which changes nothing.",
            "Only inference: neither training stage is part of this.",
        ),
        positions="compact",
        retain=0.0625,
    )

    def __post_init__(self) -> None:
        if self.capacity < 2:
            raise ValueError(f"capacity must be at least 2 carriers, got {self.capacity}.")
        if self.add_kv < 0:
            raise ValueError(f"add_kv must be 0 or more tokens, got {self.add_kv}.")
        if self.shared_layer is not None and self.shared_layer < 0:
            raise ValueError(f"shared_layer must be 0 or more, got {self.shared_layer}.")

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Refuse a shared layer that does not exist."""
        shared = self.shared_layer
        if shared is not None and num_layers is not None and shared >= num_layers:
            raise ValueError(
                f"shared_layer = {shared} does not exist in a model with {num_layers} layers."
            )

    def count(self, grid: Grid, budget: Budget) -> Count:
        """A token per plane that is remembered, and the newlines at the end."""
        if budget.is_full:
            return Count(grid.num_tokens)
        return Count(self._remembered(grid, budget) + grid.newlines_at_end)

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Average every plane with its newlines; evict carriers down to the capacity. O(N D)."""
        grid, x_ND = context.grid, tokens.x_BND[0]
        if context.budget.is_full:
            return None
        planes, device = len(grid.planes), x_ND.device
        num_rows = grid.num_tokens - grid.newlines_at_end
        plane_N = grid.positions(device)[:num_rows, 0]
        memory = CarrierMemory(self._remembered(grid, context.budget) + 1)
        remains_K = memory.push(x_ND[:num_rows], plane_N, planes).remains_K.to(device)
        num_kept = len(remains_K)
        target_T = torch.full((planes,), -1, device=device)
        target_T[remains_K] = torch.arange(num_kept, device=device)
        target_N = target_T[plane_N]
        tail = grid.newlines_at_end
        context.note(
            "carriers",
            lambda: torch.nn.functional.pad(target_N, (0, tail), value=-1),
            "label",
            "each is the mean of a frame; frames without one were evicted",
        )
        newline_n = torch.arange(num_kept, num_kept + tail, device=device)
        return Reduction.merge(torch.cat([target_N, newline_n]), num_kept + tail)

    def stream_memory(self) -> StreamMemory:
        """Carriers, evicted where neighbours resemble each other."""
        return CarrierMemory(self.capacity, self.add_kv, self.shared_layer)

    def _remembered(self, grid: Grid, budget: Budget) -> int:
        return min(len(grid.planes), self.capacity - 1, max(1, budget.count(grid.num_tokens)))
