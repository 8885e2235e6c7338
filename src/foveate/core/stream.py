"""What a method says about a stream of frames: what is computed, and what is remembered of it.

Legend: T frames of a group, E frames remembered before it, L tokens of the group or of what is
recalled, D channels, C channels of the space of text and pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, eq=False)
class StreamStep:
    """What a group of new frames does to the memory of a stream.

    Attributes:
        x_LD: tokens that the language model reads, frame by frame, [L, D].
        frame_L: the frame of the group that each belongs to, int64 [L], ascending.
        kept_L: bool [L], the tokens whose keys and values stay as long as their frame does; later
            frames see only these.
        sees_TE: bool [T, E + T]: which frames (E remembered ones, then the group's) each new frame
            sees, beside itself. The same frames would be there if frames came one by one.
        remains_K: the frames of those E + T that are remembered afterwards, int64 [K], ascending.
    """

    x_LD: torch.Tensor
    frame_L: torch.Tensor
    kept_L: torch.Tensor
    sees_TE: torch.Tensor
    remains_K: torch.Tensor


class StreamMemory(ABC):
    """The memory of one stream: decides from the frames alone, before any question is known.

    Class attributes:
        renumbers: keys in the cache are turned to contiguous positions whenever they are read;
            otherwise they keep the positions at which they were computed, and new tokens start
            behind as many tokens as are remembered.
    """

    renumbers: ClassVar[bool] = False

    @property
    def picked(self) -> int:
        """Further tokens of every frame that stay, chosen by `pick` in every layer; 0: none.

        Such a memory is given one frame at a time.
        """
        return 0

    @abstractmethod
    def push(self, x_LD: torch.Tensor, frame_L: torch.Tensor, num_frames: int) -> StreamStep:
        """Take in the tokens of new frames, in order; every frame has at least one.

        Args:
            x_LD: what the projector (and the methods before this one) made of the group, [L, D].
            frame_L: the frame of the group that each belongs to, int64 [L], ascending.
            num_frames: T.
        """

    def pick(self, layer: int, attention_HS: torch.Tensor, kept_S: torch.Tensor) -> torch.Tensor:
        """Choose further tokens of one frame in one layer.

        Args:
            layer: 0-based; asked from first to last.
            attention_HS: attention of the frame's last kept token to its S tokens, per head.
            kept_S: bool [S], those that stay anyway.

        Returns:
            `picked` places among the S, int64, ascending; fewer where there are not so many.
        """
        raise NotImplementedError


class RecentMemory(StreamMemory):
    """All tokens of the most recent frames: the baseline of every other memory.

    Args:
        capacity: frames remembered.

    Raises:
        ValueError: the capacity is below 1 frame.

    Example:
        >>> memory = RecentMemory(capacity=2)
        >>> step = memory.push(torch.zeros(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]), 3)
        >>> step.sees_TE.int().tolist(), step.remains_K.tolist()
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [1, 2])
    """

    renumbers = True

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 frame, got {capacity}.")
        self.capacity = capacity
        self.size = 0

    def push(self, x_LD: torch.Tensor, frame_L: torch.Tensor, num_frames: int) -> StreamStep:
        """Remember the new frames and forget the oldest."""
        total = self.size + num_frames
        frame_E = torch.arange(total)
        new_T1 = frame_E[self.size :, None]
        # A frame and those before it fill the memory together.
        sees_TE = (frame_E < new_T1) & (frame_E > new_T1 - self.capacity)
        remains_K = frame_E[-self.capacity :]
        self.size = len(remains_K)
        kept_L = torch.ones_like(frame_L, dtype=torch.bool)
        return StreamStep(x_LD, frame_L, kept_L, sees_TE, remains_K)


@dataclass(frozen=True, eq=False)
class FrameGroup:
    """New frames as a memory sees them that the language model does not read at once.

    Attributes:
        x_LD: tokens that the projector (and the methods before this one) made, [L, D].
        frame_L: the frame of the group that each belongs to, int64 [L], ascending; every frame has
            at least one.
        place_L2: row and column of each in its frame, int64 [L, 2]; -1 for newlines and [CLS].
        shape_T2: rows and columns of every frame, int64 [T, 2].
        number_T: numbers of the frames, counted over the stream, ascending.
        key_TC: every frame as a whole in the space of text and pictures ("paired.frames"),
            float32 [T, C].
    """

    x_LD: torch.Tensor
    frame_L: torch.Tensor
    place_L2: torch.Tensor
    shape_T2: torch.Tensor
    number_T: tuple[int, ...]
    key_TC: torch.Tensor


@dataclass(frozen=True)
class RecalledClip:
    """A stretch of a stream that a question called back.

    Attributes:
        first, last: numbers of its first and last frame, counted over the stream.
        relevance: how well it fits the question, a cosine.
        running: it is the newest stretch, not finished yet, which is always called back.
    """

    first: int
    last: int
    relevance: float
    running: bool = False


@dataclass(frozen=True, eq=False)
class Recall:
    """What a question calls back, in the order of time.

    Attributes:
        x_LD: tokens for the language model, [L, D].
        number_L: numbers of the frames that they come from, int64 [L], ascending.
        clips: the stretches that these are.
    """

    x_LD: torch.Tensor
    number_L: torch.Tensor
    clips: tuple[RecalledClip, ...]


class RecallMemory(ABC):
    """A memory that is asked: it keeps what it saw, and a question calls some of it back.

    The language model reads nothing while frames come; what is called back is read in front of the
    question each time. Asking changes nothing.
    """

    @abstractmethod
    def push(self, group: FrameGroup) -> int:
        """Take in new frames, in order; gives how many of the oldest frames were forgotten."""

    @abstractmethod
    def recall(self, text_1C: torch.Tensor) -> Recall:
        """What fits a question, given in the space of the frames' keys, float [1, C].

        Raises:
            ValueError: nothing is remembered yet.
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory of all that is kept."""
