"""VideoStreaming: a summary of every clip is kept, and the question calls some of them back.

Legend: T frames (planes) of an item or a group, K clips, V of them that are called back, P tokens
of a frame's summary, L patches of a frame or tokens of a group, N tokens of an item, M tokens out,
D channels, C channels of the space of text and pictures, h and w rows and columns of a summary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity

from foveate import ops
from foveate.core import Budget, Card, Count, Grid, Method, ProjectorContext, Reduction, Tokens
from foveate.core.stream import FrameGroup, Recall, RecalledClip, RecallMemory
from foveate.methods.pool import pooled_shape

#: Layouts are made on the CPU, whatever the default device.
_arange = partial(torch.arange, device="cpu")


def clip_keys(key_TC: torch.Tensor, clip_frames: int) -> torch.Tensor:
    """The key of every clip: the mean of its frames', float32 [K, C]. O(T C).

    Example:
        >>> clip_keys(torch.tensor([[1.0], [3.0], [5.0]]), 2).tolist()
        [[2.0], [5.0]]
    """
    clip_T = torch.arange(len(key_TC), device=key_TC.device) // clip_frames
    num = -(-len(key_TC) // clip_frames)
    return ops.scatter_mean(key_TC.float()[None], clip_T[None], num)[0]


def relevant_clips(
    key_KC: torch.Tensor, text_1C: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clips whose keys fit a question best, in the order of time, and the cosines of all.

    Args:
        key_KC: keys of the clips, [K, C].
        text_1C: the question in their space, [1, C].
        most: V; all where there are no more. Of equals the earlier is taken.

    Returns:
        int64 [min(K, V)], ascending, and float32 [K].

    Example:
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> index, _ = relevant_clips(keys, torch.tensor([[2.0, 0.0]]), 2)
        >>> index.tolist()
        [0, 2]

    Source: VideoStreaming (arXiv 2405.16009), memory selection at inference.
    """
    score_K = cosine_similarity(key_KC.float(), text_1C.float(), dim=-1)
    return ops.top_k(score_K, min(most, len(score_K))), score_K


@dataclass(frozen=True, eq=False)
class _Clip:
    """A clip in memory, on the CPU."""

    numbers: tuple[int, ...]
    x_MD: torch.Tensor
    number_M: torch.Tensor
    key_C: torch.Tensor

    @property
    def num_bytes(self) -> int:
        parts = (self.x_MD, self.number_M, self.key_C)
        return sum(part.numel() * part.element_size() for part in parts)


class ClipMemory(RecallMemory):
    """A summary and a key of every clip of a stream, in host memory.

    A frame becomes the means of P cells, a clip the tokens of its frames; its key is the mean of
    theirs. Everything is made frame by frame, so it does not matter how many come at a time. A clip
    costs clip_frames x P x D numbers of the model's dtype, and 4 C bytes: 448 KiB for 16 frames of
    4 tokens of 3584 channels in bfloat16. O(L D) per frame; O(K C) per question.

    Args:
        clip_frames: frames of a clip.
        frame_tokens: P, at most; of a frame's shape.
        clips: V, beside the running one.
        capacity: clips that are kept, without the running one; then the oldest goes. None: all.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        clip_frames: int = 16,
        frame_tokens: int = 4,
        clips: int = 4,
        capacity: int | None = None,
    ) -> None:
        if min(clip_frames, frame_tokens, clips) < 1 or (capacity is not None and capacity < 1):
            raise ValueError(
                "clip_frames, frame_tokens, clips and capacity must be at least 1, got "
                f"{clip_frames}, {frame_tokens}, {clips} and {capacity}."
            )
        self.clip_frames, self.frame_tokens = clip_frames, frame_tokens
        self.clips, self.capacity = clips, capacity
        self._done: deque[_Clip] = deque()
        self._running: list[_Clip] = []

    @property
    def num_clips(self) -> int:
        """Finished clips that are remembered."""
        return len(self._done)

    @property
    def num_bytes(self) -> int:
        return sum(clip.num_bytes for clip in (*self._done, *self._running))

    def push(self, group: FrameGroup) -> int:
        """Summarise new frames; a clip that is full is put away, and the oldest may go."""
        x_MD, frame_M = self._summaries(group)
        number_T = torch.tensor(group.number_T, device="cpu")
        forgotten = 0
        parts = x_MD.split(torch.bincount(frame_M, minlength=len(number_T)).tolist())
        for number, part_PD, key_C in zip(
            number_T.tolist(), parts, group.key_TC.float().cpu(), strict=True
        ):
            # Clones, so that a frame does not keep its whole group alive.
            at_P = torch.full((len(part_PD),), number, device="cpu")
            self._running.append(_Clip((number,), part_PD.clone(), at_P, key_C.clone()))
            if len(self._running) == self.clip_frames:
                self._done.append(_joined(self._running))
                self._running = []
            if self.capacity is not None and len(self._done) > self.capacity:
                forgotten += len(self._done.popleft().numbers)
        return forgotten

    def recall(self, text_1C: torch.Tensor) -> Recall:
        """The clips that fit a question best and the running one, in the order of time."""
        if not self._done and not self._running:
            raise ValueError("No frame is remembered yet.")
        text_1C = text_1C.float().cpu()
        found: list[tuple[_Clip, RecalledClip]] = []
        if self._done:
            key_KC = torch.stack([clip.key_C for clip in self._done])
            index_V, score_K = relevant_clips(key_KC, text_1C, self.clips)
            found = [_recalled(self._done[k], float(score_K[k])) for k in index_V.tolist()]
        if self._running:
            clip = _joined(self._running)
            score = float(cosine_similarity(clip.key_C[None], text_1C)[0])
            found.append(_recalled(clip, score, running=True))
        return Recall(
            torch.cat([clip.x_MD for clip, _ in found]),
            torch.cat([clip.number_M for clip, _ in found]),
            tuple(told for _, told in found),
        )

    def _summaries(self, group: FrameGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """The means of the cells of every frame, [M, D], and its place in the group, on the CPU."""
        shapes = {
            (height, width): pooled_shape(height, width, self.frame_tokens)
            for height, width in set(map(tuple, group.shape_T2.tolist()))
        }
        is_patch_L, device = group.place_L2[:, 0] >= 0, group.x_LD.device
        sizes = [shapes[tuple(shape)] for shape in group.shape_T2.tolist()]
        pooled_T2 = torch.tensor(sizes, device=device)
        frame_L, place_L2 = group.frame_L[is_patch_L], group.place_L2[is_patch_L]
        pooled_L2 = pooled_T2[frame_L]
        cell_L2 = place_L2 * pooled_L2 // group.shape_T2.to(device)[frame_L]
        slot_L = frame_L * self.frame_tokens + cell_L2[:, 0] * pooled_L2[:, 1] + cell_L2[:, 1]
        num = len(pooled_T2) * self.frame_tokens
        x_MD = ops.scatter_mean(group.x_LD[is_patch_L][None], slot_L[None], num)[0]
        # Cells of which a method before this one left nothing are not there.
        used_m = (torch.bincount(slot_L, minlength=num) > 0).nonzero()[:, 0]
        return x_MD[used_m].cpu(), (used_m // self.frame_tokens).cpu()


def _joined(frames: list[_Clip]) -> _Clip:
    """The clip of some frames."""
    return _Clip(
        tuple(number for frame in frames for number in frame.numbers),
        torch.cat([frame.x_MD for frame in frames]),
        torch.cat([frame.number_M for frame in frames]),
        torch.stack([frame.key_C for frame in frames]).mean(0),
    )


def _recalled(clip: _Clip, score: float, running: bool = False) -> tuple[_Clip, RecalledClip]:
    return clip, RecalledClip(clip.numbers[0], clip.numbers[-1], score, running)


@dataclass(frozen=True)
class _Sizes:
    """What a budget comes to: clips that stay, rows and columns of a frame, frames of a clip."""

    clips: int
    shape: tuple[int, int]
    frames: int

    @property
    def cells(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class VideoStreaming(Method):
    """VideoStreaming without its trained encoder: summaries of clips, chosen by the question.

    On a prompt (`foveate.reduce`) a video is cut into clips, those that fit the question best stay,
    and every frame of them is pooled to a few tokens. In `foveate.Stream` the summary of every clip
    is kept, and each question calls back the ones that fit it and the running one. Videos only;
    images pass untouched. O(N D).

    Args:
        clip_frames: frames of a clip (planes, where a model joins frames in pairs); the published
            16 are taken at one a second.
        frame_tokens: P, tokens of a frame: the cells of its grid, at most so many.
        clips: V, clips that stay.
        capacity: clips that a stream keeps in all; then the oldest goes. None: every clip.

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> method, grid = VideoStreaming(), Grid.video(960, 12, 12)
        >>> method.count(grid, Budget(retain=method.card.retain, published=True))
        Count(tokens=256, exact=True)
        >>> method.count(grid, Budget(tokens=1000)).tokens
        960

    Source: arXiv 2405.16009.
    """

    clip_frames: int = 16
    frame_tokens: int = 4
    clips: int = 4
    capacity: int | None = None

    card: ClassVar[Card] = Card(
        name="video_streaming",
        title="VideoStreaming",
        paper="Streaming Long Video Understanding with Large Language Models",
        arxiv="2405.16009",
        year=2024,
        stages=("projector",),
        kind="trained",
        summary="Keeps a summary of every clip; the question calls back the few clips that fit it.",
        defaults={
            "Vicuna-7B, CLIP ViT-L": "clips of 16 frames (our reading of 256 = 4 x 16 x 4), 4 "
            "tokens a frame, 4 clips: 256 tokens, however long the video",
        },
        headline=(
            "EgoSchema 44.1 (without propagated memory 37.3); NExT-QA 66.2",
            "MovieChat-1K: global 90.4, breakpoint 54.9 (the last 4 clips in place of the chosen "
            "ones: 39.1)",
            "MovieNet-QA, films of about 108 minutes: 256 tokens, 5.32 s",
        ),
        notes=(
            "The published summaries and keys are made by half a Phi-2, trained for it, that "
            "carries a memory from clip to clip. Without it a frame's tokens are the means of its "
            "cells, a clip's key is the mean of its frames, and nothing is carried on.",
            "Clips and question are compared in the companion's space "
            "(companion=foveate.Companion(...)) or, without one, in that of the language model's "
            "embeddings.",
            "A budget of the call sets the number of clips first: as many whole summaries as fit. "
            "Where all clips fit, frames get more tokens, where not even one does, fewer; below "
            "one token a frame, evenly spaced frames of the clip have one.",
            "A clip at the end that is shorter has fewer tokens; then the count is a bound, as "
            "long as not all clips stay.",
            "The published prompt names the times of every clip. A method cannot write into a "
            "prompt; foveate.Stream(say_times=True) says them.",
            "Newlines that close an item stay, on top of the budget; those of rows and [CLS] "
            "tokens go.",
            "Choosing with a gradient, as in training, is foveate.ops.gumbel_top_k.",
        ),
        retain=4 / 144,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("paired.frames", "paired.text")

    def __post_init__(self) -> None:
        for name in ("clip_frames", "frame_tokens", "clips", "capacity"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    # -- counts ---------------------------------------------------------------------------------

    def sizes(self, grid: Grid, budget: Budget) -> _Sizes | None:
        """What stays of a video; None leaves it alone.

        Raises:
            ValueError: its frames differ in size.
        """
        if grid.modality == "image" or budget.is_full:
            return None
        T, height, width = grid.shape
        frames = min(self.clip_frames, T)
        num, clips = -(-T // frames), self.clips
        shape = pooled_shape(height, width, self.frame_tokens)
        if not budget.published:
            keep = max(1, budget.count(grid.num_patches))
            summary = shape[0] * shape[1]
            clips = keep // (frames * summary)
            if keep >= T * summary:
                clips, shape = num, pooled_shape(height, width, keep // T)
            elif clips == 0:
                clips, shape = 1, pooled_shape(height, width, max(1, keep // frames))
                frames = min(frames, keep)
        if clips >= num and shape == (height, width):
            return None
        return _Sizes(min(clips, num), shape, frames)

    def count(self, grid: Grid, budget: Budget) -> Count:
        """Tokens of the clips that stay, and newlines at the end."""
        sizes = self.sizes(grid, budget)
        if sizes is None:
            return Count(grid.num_tokens)
        T = len(grid.planes)
        length = min(self.clip_frames, T)
        num = -(-T // length)
        shown = T if sizes.clips == num and sizes.frames == length else sizes.clips * sizes.frames
        exact = shown == T or T % length == 0 or sizes.frames <= T % length
        return Count(shown * sizes.cells + grid.newlines_at_end, exact)

    # -- projector ------------------------------------------------------------------------------

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Choose clips by the question and pool their frames.

        Raises:
            ValueError: the frames differ in size.
        """
        grid, device = context.grid, tokens.device
        sizes = self.sizes(grid, context.budget)
        if sizes is None:
            return None
        T, height, width = grid.shape
        length = min(self.clip_frames, T)
        key_KC = clip_keys(context.signal("paired.frames")[0], length)
        text_1C = context.signal("paired.text")
        index_V, score_K = relevant_clips(key_KC, text_1C, sizes.clips)
        spans = [(k * length, min((k + 1) * length, T) - 1) for k in index_V.tolist()]
        context.note("recalled clips", spans, "frames")
        context.note(
            "relevance of the clip",
            lambda: score_K.repeat_interleave(length)[:T].repeat_interleave(height * width),
        )
        shown_F = torch.cat([_evenly(first, last, sizes.frames) for first, last in spans])
        return self._pooled(grid, shown_F, sizes, device)

    def stream_memory(self) -> RecallMemory:
        """Summaries of clips, called back by the question."""
        return ClipMemory(self.clip_frames, self.frame_tokens, self.clips, self.capacity)

    @staticmethod
    def _pooled(
        grid: Grid, shown_F: torch.Tensor, sizes: _Sizes, device: torch.device
    ) -> Reduction:
        """The cells of the frames that are shown, in the order of time."""
        T, height, width = grid.shape
        h, w = sizes.shape
        patch_TL = grid.patch_index().view(T, -1)
        row_L1 = _arange(height)[:, None] * h // height
        cell_L = (row_L1 * w + _arange(width) * w // width).flatten()
        first_F1 = _arange(len(shown_F))[:, None] * sizes.cells
        middle_h, middle_w = (
            (-(-_arange(num) * length // num) + (_arange(1, num + 1) * length - 1) // num) // 2
            for num, length in ((h, height), (w, width))
        )
        middle_c = (middle_h[:, None] * width + middle_w).flatten()
        tail_E = _arange(grid.num_tokens - grid.newlines_at_end, grid.num_tokens)
        num_out = len(shown_F) * sizes.cells + len(tail_E)
        target_N = torch.full((grid.num_tokens,), -1, device="cpu")
        target_N[patch_TL[shown_F]] = first_F1 + cell_L
        target_N[tail_E] = _arange(num_out - len(tail_E), num_out)
        anchor_M = torch.cat([patch_TL[shown_F][:, middle_c].flatten(), tail_E])
        return Reduction.merge(target_N.to(device), num_out, anchor_BM=anchor_M[None].to(device))


def _evenly(first: int, last: int, most: int) -> torch.Tensor:
    """Frames from `first` to `last`, at most so many, evenly spaced, int64."""
    num = last - first + 1
    return first + ops.uniform_indices(num, min(num, most), "cpu", endpoints=False)
