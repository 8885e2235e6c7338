"""Where tokens of a stream stand in models that number by time, row and column (M-RoPE).

Legend: L new tokens, S slots of remembered frames, C system tokens, E remembered planes (two frames
joined, in Qwen-VL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models.adapter import Adapter

# Times are multiples of a frame's duration, which binary fractions miss by a little.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class GridClock:
    """How a model numbers the planes of a video in time, and what follows it.

    What a stream remembers stands where it would in a prompt of exactly those frames: the first
    plane at the end of the text before it, every other one later by its time, rows and columns from
    the end of that text, too. Nothing of it grows with the length of the stream.

    Attributes:
        per_second: temporal positions per second; None: one per plane, whatever its time.
        text_follows_time: text behind the video starts behind its last plane in time; otherwise
            behind its rows and columns.
        joined: frames per plane.
    """

    per_second: float | None
    text_follows_time: bool
    joined: int

    def times(self, second_E: Tensor, seen_E: Tensor) -> Tensor:
        """Temporal positions of planes from the first one that is seen on, int64 [E].

        Args:
            second_E: float64, seconds, ascending.
            seen_E: bool; what is not seen gets a number that means nothing.
        """
        if self.per_second is None:
            return (seen_E.long().cumsum(0) - 1).clamp(min=0)
        first = second_E[seen_E][:1]
        if not len(first):
            return torch.zeros_like(seen_E, dtype=torch.long)
        return ((second_E - first) * self.per_second + _ROUNDING).floor().long()

    def behind(self, start: int, extent: int, time: int) -> int:
        """The position of the first text token behind a video.

        Args:
            start: position at which the video begins.
            extent: its largest side in tokens.
            time: temporal position of its last plane, from its beginning.
        """
        rows = start + extent
        return max(rows, start + time + 1) if self.text_follows_time else rows


def grid_clock(model: nn.Module, adapter: Adapter) -> GridClock | None:
    """How a model numbers videos, as its own position method says; None: one number per token.

    It is asked about four planes of one token, a second and ten seconds long each.
    """
    if not adapter.mrope:
        return None
    base: Any = adapter.base(model)
    visual: Any = base.get_submodule(adapter.tower_paths["video"])
    device = next(base.parameters()).device
    side = visual.spatial_merge_size
    mark = adapter.placeholder_ids(model)["video"]
    ids = torch.tensor([[0, mark, mark, mark, mark, 0]], device=device)
    kinds = torch.tensor([[0, 2, 2, 2, 2, 0]], device=device)
    found = []
    for seconds in (1.0, 10.0):
        position_31L, _ = base.get_rope_index(
            ids,
            mm_token_type_ids=kinds,
            video_grid_thw=torch.tensor([[4, side, side]], device=device),
            second_per_grid_ts=torch.tensor([seconds], device=device),
        )
        found.append(position_31L[:, 0])
    step = [int(position_3L[0, 2] - position_3L[0, 1]) for position_3L in found]
    last = int(found[0][0, 5])
    per_second = None if step[0] == step[1] else step[1] / 10.0
    return GridClock(per_second, last > 2, int(visual.patch_embed.proj.kernel_size[0]))
