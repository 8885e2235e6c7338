"""A long video for a model chunk by chunk: its whole prompt from sizes alone, and chunks of pixels.

Legend: T frames, H, W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.checkpoints.chats import prepare
from foveate.checkpoints.processors import NoVideo, PackedFrames, fit_pixels
from foveate.errors import UnsupportedModelError
from foveate.video import Frames
from foveate.video.resize import resize

_ALL_SIZES = (0, 1 << 62)


class ChunkPreparer:
    """Prepares a video chunk by chunk exactly as the processor would prepare all of it.

    Args:
        processor: of the checkpoint.
        frames: T, frames of the whole video.
        size: (height, width) of every frame in pixels.

    Raises:
        UnknownModelError: the processor takes no videos, or they need torchvision.
        UnsupportedModelError: the size of a frame depends on all of them in a way that is known
            only to transformers' own video processor.

    Example:
        >>> from foveate import embedded
        >>> maker = ChunkPreparer(embedded()[1], 64, (64, 64))
        >>> seconds = torch.arange(64.0).double()
        >>> prompt = maker.prompt(seconds, torch.arange(64), "What is blue?")
        >>> list(prompt["pixel_values_videos"].shape[:2])
        [1, 64]
        >>> chunk = maker.chunk(torch.zeros(8, 3, 64, 64, dtype=torch.uint8))
        >>> list(chunk["pixel_values_videos"].shape[:2])
        [1, 8]
    """

    def __init__(self, processor: Any, frames: int, size: tuple[int, int]) -> None:
        self.processor, self.frames, self.size = processor, frames, size
        self.maker = processor.video_processor
        self.joined = int(getattr(self.maker, "temporal_patch_size", None) or 1)
        self._fitted: tuple[int, int] | None = None
        if isinstance(self.maker, PackedFrames):
            counted = -(-frames // self.joined) * self.joined if self.maker.counts_frames else 1
            side = self.maker.patch_size * self.maker.merge_size
            self._fitted = fit_pixels(*size, side, self.maker.limits, counted)
            self.maker = copy.copy(self.maker)
            self.maker.counts_frames, self.maker.limits = False, _ALL_SIZES
        elif type(self.maker).__name__ == "Qwen3VLVideoProcessor":
            raise UnsupportedModelError(
                "Qwen3-VL's own video processor sizes every frame by how many there are, which it "
                "says only once it has them all; read this video in one go (overlap=False)."
            )

    def prompt(self, seconds_T: Tensor, index_T: Tensor, question: str) -> dict[str, Tensor]:
        """Model inputs of the whole video and a question, computed from a single black patch.

        Pixels have their full shape and take no memory; do not read them.

        Args:
            seconds_T: when each frame is shown, float64 [T].
            index_T: ranks of the frames in their clip, int64 [T].
            question: in words.
        """
        black_T3HW = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(self.frames, 3, *self.size)
        stand_in = copy.copy(self.processor)
        if not isinstance(self.maker, NoVideo):
            stand_in.video_processor = _Rehearsal(self, self.processor.video_processor)
        return prepare(stand_in, Frames(black_T3HW, seconds_T, index_T), question, is_image=False)

    def chunk(self, pixels_T3HW: Tensor) -> dict[str, Tensor]:
        """Some frames as the feature method takes them.

        Args:
            pixels_T3HW: uint8 [T, 3, H, W]; T a multiple of the frames that the model joins, but
                for the last chunk.
        """
        if self._fitted is not None:
            pixels_T3HW = resize(pixels_T3HW, self._fitted, self.maker.resample)
        options: dict[str, Any] = {"return_tensors": "pt"}
        if hasattr(self.maker, "sample_frames"):
            options["do_sample_frames"] = False
        found = dict(self.maker(videos=[pixels_T3HW], **options))
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


class _Rehearsal:
    """A video processor that prepares the first patch of a video and tells the shapes of all."""

    def __init__(self, preparer: ChunkPreparer, original: Any) -> None:
        self._preparer, self._original = preparer, original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for these before there is anything
            raise AttributeError(name)
        return getattr(self._original, name)

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        preparer = self._preparer
        video = _only(videos)
        found = preparer.chunk(video[: preparer.joined])
        pixels, grid = found["pixel_values_videos"], found.get("video_grid_thw")
        if grid is None:
            # [1, 1, 3, h, w], of the first frame
            shape = (1, preparer.frames, *pixels.shape[2:])
            return {"pixel_values_videos": pixels[:, :1].expand(shape)}
        planes = -(-preparer.frames // preparer.joined)
        return {
            "pixel_values_videos": pixels[:1].expand(planes * len(pixels), -1),
            "video_grid_thw": grid * torch.tensor([planes, 1, 1]),
            "video_metadata": options.get("video_metadata") or [],
        }


def _only(videos: Any) -> Tensor:
    while not isinstance(videos, Tensor):
        assert isinstance(videos, Sequence) and len(videos) == 1
        videos = videos[0]
    return videos[0] if videos.dim() == 5 else videos
