"""The frames stage: which frames of a clip a model is shown, chosen before they are decoded for it.

Legend: F frames of a clip, K chosen ones, n some frames, E channels of the scorer's
space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from foveate.core.context import Context
from foveate.errors import MissingSignalError


@dataclass(frozen=True, eq=False)
class FramePlan:
    """Frames that are shown, in the order of time, and how much room each is given.

    Args:
        index_K: ranks of the frames among those of the clip, int64 [K], ascending, each once.
        scale_K: sides of each frame as fractions of its full size, in (0, 1], float [K]; a frame
            of half the size has a quarter of the tokens. None: all at full size.
        weight_K: share of the visual tokens that each frame gets, float [K], adding up to 1; None:
            in proportion to `scale_K` squared.
        group_K: which clip or scene each frame belongs to, int64 [K]; None: no groups.
        score_K: relevance by which they were chosen, float [K], for people and later stages; None.
        room: frames of full size whose tokens later stages may share out, where more frames are
            shown than there are tokens for; None: none do.
        method: registry name of the method that chose; set by `foveate.choose_frames`.
        num_candidates: frames of the clip, F; likewise.
        spent: seconds that the choice took, scoring included; likewise.

    Raises:
        ValueError: no frame, frames out of order, or a value out of range.

    Example:
        >>> FramePlan(torch.tensor([0, 30, 31])).num_frames
        3
        >>> FramePlan(torch.tensor([4, 2]))
        Traceback (most recent call last):
        ...
        ValueError: index_K must be int64 [K], ascending, each frame once; got [4, 2].
    """

    index_K: torch.Tensor
    scale_K: torch.Tensor | None = None
    weight_K: torch.Tensor | None = None
    group_K: torch.Tensor | None = None
    score_K: torch.Tensor | None = None
    room: float | None = None
    method: str = ""
    num_candidates: int = 0
    spent: float = 0.0

    def __post_init__(self) -> None:
        index = self.index_K
        good = index.dim() == 1 and index.dtype == torch.int64 and len(index) > 0
        if not good or int(index[0]) < 0 or bool((index.diff() <= 0).any()):
            raise ValueError(
                "index_K must be int64 [K], ascending, each frame once; got "
                f"{index.tolist() if index.numel() < 20 else tuple(index.shape)}."
            )
        for name in ("scale_K", "weight_K", "group_K", "score_K"):
            value = getattr(self, name)
            if value is not None and value.shape != index.shape:
                raise ValueError(
                    f"{name} speaks of {tuple(value.shape)} frames, index_K of {len(index)}."
                )
        scale = self.scale_K
        if scale is not None and not bool(((scale > 0) & (scale <= 1)).all()):
            raise ValueError(f"scale_K must lie in (0, 1], got {scale.tolist()[:20]}.")
        weight = self.weight_K
        if weight is not None and not (
            bool((weight >= 0).all()) and abs(float(weight.sum()) - 1) < 1e-4
        ):
            raise ValueError(f"weight_K must add up to 1, got {weight.tolist()[:20]}.")
        if self.room is not None and not self.room > 0:
            raise ValueError(f"room must be above 0 frames, got {self.room}.")

    @property
    def num_frames(self) -> int:
        """K."""
        return len(self.index_K)

    @property
    def num_full_frames(self) -> float:
        """Frames of full size that would cost as many tokens."""
        return self.num_frames if self.scale_K is None else float((self.scale_K**2).sum())

    def for_planes(self, num_planes: int) -> FramePlan:
        """The plan as an encoder sees it that joins neighbouring frames into one plane.

        A plane has the largest scale and score of its frames, the sum of their weights, and the
        rank and group of the first.

        Raises:
            ValueError: so many planes cannot come of these frames.

        Example:
            >>> plan = FramePlan(torch.arange(3), score_K=torch.tensor([0.1, 0.4, 0.2]))
            >>> plan.for_planes(2).score_K.tolist() == plan.score_K[1:].tolist()
            True
        """
        K = self.num_frames
        if num_planes == K:
            return self
        joined = -(-K // max(num_planes, 1))
        if num_planes < 1 or -(-K // joined) != num_planes:
            raise ValueError(
                f"the plan has {K} frames, the item {num_planes} planes: give the model the frames "
                "that were chosen, all of them and nothing else."
            )
        plane_K = torch.arange(K, device=self.index_K.device) // joined

        def most(value_K: torch.Tensor | None) -> torch.Tensor | None:
            if value_K is None:
                return None
            start = value_K.new_zeros(num_planes)
            return start.scatter_reduce(0, plane_K, value_K, "amax", include_self=False)

        weight_K = self.weight_K
        return replace(
            self,
            index_K=self.index_K[::joined],
            scale_K=most(self.scale_K),
            weight_K=None
            if weight_K is None
            else weight_K.new_zeros(num_planes).index_add(0, plane_K, weight_K),
            group_K=None if self.group_K is None else self.group_K[::joined],
            score_K=most(self.score_K),
            room=None if self.room is None else self.room / joined,
        )


@dataclass(eq=False)
class FramesContext(Context):
    """Before any frame is decoded for the model, one clip and one question at a time.

    Attributes:
        frames: frames of full size that the model is shown without a recipe; `budget` says how
            much of that room is left: use `num_frames`.
        seconds_F: when each frame is first shown, float64 [F], ascending.
        duration: seconds.
        keyframe_F: whether decoding can start there (an intra frame), bool [F].
        bytes_F: size of each frame's packet, int64 [F]; empty when unknown (frames in memory).
        question: in words; empty when there is none.
        relevance: `relevance(index_n)` gives how well frames fit the question, float32 [n], larger
            is better, from the scorer; small copies of those frames are decoded for it, and every
            frame at most once per clip. None: there is no scorer.
        probabilities: whether relevance lies in [0, 1] as a probability does (a model's yes), or is
            a cosine.
        embeddings: `embeddings(index_n)` gives the same frames in the scorer's space, float32
            [n, E] of length 1; of a scorer without one, pictures of 8 x 8 pixels less their mean
            stand in. None: there is no scorer.
        tokens_per_frame: of the model, to read an absolute budget; None: unknown.
    """

    frames: int = 1
    seconds_F: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    duration: float = 0.0
    keyframe_F: torch.Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.bool))
    bytes_F: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    question: str = ""
    relevance: Callable[[torch.Tensor], torch.Tensor] | None = None
    probabilities: bool = False
    embeddings: Callable[[torch.Tensor], torch.Tensor] | None = None
    tokens_per_frame: float | None = None

    @property
    def num_candidates(self) -> int:
        """Frames of the clip, F."""
        return len(self.seconds_F)

    @property
    def num_frames(self) -> int:
        """Frames of full size that the budget has room for: at least 1, at most F.

        Raises:
            ValueError: the budget counts tokens, and nobody knows how many a frame has.
        """
        if self.budget.tokens is None:
            num = self.budget.count(self.frames)
        elif self.tokens_per_frame is None:
            raise ValueError(
                f"{self.method} chooses whole frames, and tokens={self.budget.tokens} does not say "
                "how many: pass retain=, or tokens_per_frame= as well."
            )
        else:
            room = round(self.frames * self.tokens_per_frame)
            num = int(self.budget.count(room) / self.tokens_per_frame)
        return max(1, min(num, self.num_candidates))

    def at_rate(self, fps: float) -> torch.Tensor:
        """Ranks of the frames on screen at 0, 1/fps, 2/fps, ... seconds, each once, int64 [n].

        Raises:
            ValueError: fps is not above 0.
        """
        if not fps > 0:
            raise ValueError(f"fps must be above 0, got {fps}.")
        times = torch.arange(0, max(self.duration, 1e-9), 1 / fps, dtype=torch.float64)
        # The frame on screen is the last that began; a hair of slack for rounded timestamps.
        rank = torch.searchsorted(self.seconds_F, times + 1e-6, right=True) - 1
        return rank.clamp(0, self.num_candidates - 1).unique()

    def evenly(self, num: int) -> torch.Tensor:
        """`num` ranks from the first frame to the last, int64; all when there are fewer."""
        num = min(num, self.num_candidates)
        return torch.linspace(0, self.num_candidates - 1, num, dtype=torch.float64).long()

    def scores(self, index_n: torch.Tensor) -> torch.Tensor:
        """`relevance`, or an error that says what is missing.

        Raises:
            MissingSignalError: there is no scorer.
        """
        if self.relevance is None:
            raise MissingSignalError(
                self.method, ("frames.relevance",), "no scorer was given; pass scorer=..."
            )
        return self.relevance(index_n)
