"""What a clip gives: frames with their times, facts about the file, and what was lost.

Legend: T frames; H, W pixels in display orientation; K keyframes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveate.core import FramePlan


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video, known without decoding it (all but the first picture stays packed).

    Attributes:
        duration: seconds from the first frame until the last one stops being shown.
        frame_rate: average frames per second.
        width: pixels, after rotation.
        height: pixels, after rotation.
        num_frames: frames present, counted packet by packet (headers are only hints).
        codec: decoder name ("h264"), "raw" for frames in memory.
        container: container name ("mov,mp4,m4a,3gp,3g2,mj2"), "memory" for frames in memory.
        keyframe_index: int64 [K], ranks of the keyframes.
        keyframe_seconds: float64 [K], seconds from the first frame.
        keyframe_pts: int64 [K], the same in ticks of the container.
        rotation: degrees clockwise (0, 90, 180, 270) already applied to every frame given out.
        mirrored: whether frames are also flipped left to right before that rotation.
        variable_frame_rate: whether gaps between frames differ by more than rounding.
        start_seconds: time of the first frame on the container's own clock; all other seconds
            count from the first frame.
        has_audio: whether there is an audio track.
        lost_frames: frames the header promises beyond those present (a cut-off download).
        packet_bytes: int64 [F], size of each frame's packet; empty when nothing is packed.
    """

    duration: float
    frame_rate: float
    width: int
    height: int
    num_frames: int
    codec: str
    container: str
    keyframe_index: Tensor = field(repr=False, compare=False)
    keyframe_seconds: Tensor = field(repr=False, compare=False)
    keyframe_pts: Tensor = field(repr=False, compare=False)
    rotation: int = 0
    mirrored: bool = False
    variable_frame_rate: bool = False
    start_seconds: float = 0.0
    has_audio: bool = False
    lost_frames: int = 0
    packet_bytes: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.long), repr=False, compare=False
    )


@dataclass(frozen=True)
class Damage:
    """How much of what was asked for is lost; falsy when nothing is.

    Attributes:
        requested: distinct frames asked for.
        replaced: rank of each frame that did not decode -> rank of the frame shown in its place
            (the nearest one that did).
        suspect: ranks that decoded, but after a loss in their own group of pictures, so they may
            show its traces.
        lost_frames: frames missing from the end of the file (``VideoInfo.lost_frames``).

    Example:
        >>> damage = Damage(requested=8, replaced={5: 4})
        >>> bool(damage), damage.decoded, damage.missing, damage.reason
        (True, 7, (5,), '1 of 8 frames did not decode (nearest shown instead)')
    """

    requested: int
    replaced: Mapping[int, int] = field(default_factory=dict)
    suspect: tuple[int, ...] = ()
    lost_frames: int = 0

    @property
    def decoded(self) -> int:
        """Distinct frames asked for that decoded."""
        return self.requested - len(self.replaced)

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks asked for that did not decode."""
        return tuple(self.replaced)

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """First and last rank of every run of frames that did not decode."""
        found: list[list[int]] = []
        for rank in sorted(self.replaced):
            if found and rank == found[-1][1] + 1:
                found[-1][1] = rank
            else:
                found.append([rank, rank])
        return tuple((first, last) for first, last in found)

    @property
    def reason(self) -> str:
        """What was lost, in words; empty when nothing was."""
        parts = []
        if self.replaced:
            parts.append(
                f"{len(self.replaced)} of {self.requested} frames did not decode "
                "(nearest shown instead)"
            )
        if self.suspect:
            parts.append(f"{len(self.suspect)} of {self.requested} frames follow a damaged one")
        if self.lost_frames:
            parts.append(f"the file ends about {self.lost_frames} frames before its header says")
        return "; ".join(parts)

    def __bool__(self) -> bool:
        return bool(self.replaced or self.suspect or self.lost_frames)


@dataclass(frozen=True, eq=False)
class Frames:
    """Decoded frames, each with its time and its place in the clip.

    Attributes:
        pixels: uint8 [T, 3, H, W], RGB.
        seconds: float64 [T], when each frame is first shown, counted from the clip's first frame.
        index: int64 [T], rank of each frame in presentation order.
        damage: what was lost on the way.
        plan: how `foveate.choose_frames` chose them; None: they were asked for.

    Example:
        >>> frames = Frames(torch.zeros(2, 3, 4, 6, dtype=torch.uint8),
        ...                 torch.tensor([0.0, 0.5]), torch.tensor([0, 12]))
        >>> len(frames), frames.height, frames.width
        (2, 4, 6)
    """

    pixels: Tensor
    seconds: Tensor
    index: Tensor
    damage: Damage = field(default_factory=lambda: Damage(0))
    plan: FramePlan | None = None

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def height(self) -> int:
        """Pixels."""
        return self.pixels.shape[2]

    @property
    def width(self) -> int:
        """Pixels."""
        return self.pixels.shape[3]

    def to(self, device: torch.device | str) -> Frames:
        """The same frames with pixels on another device (times and ranks stay where they are)."""
        return replace(self, pixels=self.pixels.to(device))

    def __repr__(self) -> str:
        span = f"{float(self.seconds[0]):.2f}..{float(self.seconds[-1]):.2f} s" if len(self) else ""
        lost = f", damage={self.damage.reason!r}" if self.damage else ""
        return f"Frames({len(self)} x {self.width}x{self.height}, {span}{lost})"
