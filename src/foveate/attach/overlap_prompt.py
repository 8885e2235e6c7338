"""The whole prompt of a video that is read chunk by chunk: ids, positions, and where chunks end.

Computed once, from sizes, before a frame is decoded; nothing in it changes when caches shrink.

Legend: L tokens of the prompt, P rows of position ids (1, or 3 with M-RoPE), T frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import Grid
from foveate.errors import AttachmentError, UnsupportedModelError
from foveate.models.adapter import Adapter
from foveate.models.registry import adapter_for


@dataclass(frozen=True, eq=False)
class ChunkedPrompt:
    """A prompt with one video, cut behind the last visual token of every chunk.

    Attributes:
        ids_1L: int64 [1, L].
        position_P1L: int64 [P, 1, L], of the full, unpruned prompt.
        columns: per chunk, its first column and the one behind its last; text between two chunks
            belongs to the later one, text before the video to the first.
        frames: per chunk, its first frame and the one behind its last.
        grids: per chunk, the layout of its visual tokens.
        rope_deltas: what a model with M-RoPE adds to later positions; None without.
    """

    ids_1L: Tensor
    position_P1L: Tensor
    columns: tuple[tuple[int, int], ...]
    frames: tuple[tuple[int, int], ...]
    grids: tuple[Grid, ...]
    rope_deltas: Tensor | None = None

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Mapping[str, Tensor], num_frames: int, chunk: int
    ) -> ChunkedPrompt:
        """Cut a prompt.

        Args:
            model: of a family whose videos can be encoded in chunks.
            inputs: what the processor gives for the whole video; of the pixels only the shape is
                looked at.
            num_frames: T.
            chunk: frames of a chunk; rounded up to whole temporal patches.

        Raises:
            UnsupportedModelError: videos of this family cannot be encoded in chunks.
            AttachmentError: the prompt is not one sample with one video.
            ValueError: chunk is below 1.
        """
        adapter = video_adapter(model)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 frame, got {chunk}.")
        ids = inputs["input_ids"]
        base: Any = adapter.base(model)
        given = given_to(getattr(base, adapter.feature_methods["video"]), inputs)
        grids = adapter.grids(model, "video", given, None)
        if ids.shape[0] != 1 or len(grids) != 1:
            raise AttachmentError(
                f"Decoding, encoding and prefill overlap for one clip and one question; this "
                f"prompt has {ids.shape[0]} samples and {len(grids)} videos."
            )
        (grid,) = grids
        visual_N = (ids[0] == adapter.placeholder_ids(model)["video"]).nonzero()[:, 0]
        if len(visual_N) != grid.num_tokens:
            raise AttachmentError(
                f"The prompt has {len(visual_N)} video tokens, the features will have "
                f"{grid.num_tokens}: do model and processor belong together?"
            )
        joined = -(-num_frames // len(grid.planes))
        parts = _cut(grid, max(1, -(-chunk // joined)))
        columns, frames, token, start, first = [], [], 0, 0, 0
        for part in parts:
            token += part.num_tokens
            stop, last = int(visual_N[token - 1]) + 1, first + len(part.planes) * joined
            columns.append((start, stop))
            frames.append((first, min(last, num_frames)))
            start, first = stop, last
        position, deltas = _positions(base, adapter, inputs)
        return cls(ids, position, tuple(columns), tuple(frames), tuple(parts), deltas)

    def __len__(self) -> int:
        """Chunks."""
        return len(self.columns)

    @property
    def num_frames(self) -> int:
        """T."""
        return self.frames[-1][1]

    @property
    def num_visual(self) -> int:
        """Visual tokens of all chunks."""
        return sum(grid.num_tokens for grid in self.grids)


def video_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model whose videos can be encoded in chunks and prefilled one by one.

    Raises:
        UnsupportedModelError: they cannot be.
    """
    adapter = adapter_for(model)
    if not isinstance(adapter, Adapter) or not adapter.video_in_chunks:
        raise UnsupportedModelError(
            f"{adapter.docs_name} does not take videos as frames in a row that can be encoded one "
            "chunk after another; read this video in one go (overlap=False). LLaVA-NeXT-Video, "
            "LLaVA-OneVision, Video-LLaVA, Qwen2-VL, Qwen2.5-VL and Qwen3-VL can."
        )
    if "mm_encoder_outputs" not in inspect.signature(adapter.base(model).forward).parameters:
        raise UnsupportedModelError(
            "This release of transformers takes no features that were computed beforehand "
            "(mm_encoder_outputs); upgrade it, or read the video in one go (overlap=False)."
        )
    return adapter


def given_to(function: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that a function names as its arguments."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _cut(grid: Grid, planes: int) -> list[Grid]:
    """A video's grid in parts of so many planes; what closes the video stays with the last."""
    count = len(grid.planes)
    return [
        Grid(
            grid.planes[first : first + planes],
            grid.modality,
            grid.newlines_at_end if first + planes >= count else 0,
        )
        for first in range(0, count, planes)
    ]


def _positions(
    base: Any, adapter: Adapter, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    ids = inputs["input_ids"]
    if not adapter.mrope:
        return torch.arange(ids.shape[1], device=ids.device)[None, None], None
    given = given_to(base.get_rope_index, inputs)
    given.pop("attention_mask", None)  # one sample without padding
    position_P1L, deltas = base.get_rope_index(**given)
    return position_P1L, deltas
