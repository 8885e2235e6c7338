"""A prompt in two halves, before and behind the frames, and frames as a feature method takes them.

Legend: T frames, H, W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.checkpoints.chats import Chat, placeholder_of, prompt_of
from foveate.core.grid import Modality
from foveate.errors import UnknownModelError


def prompt_around(processor: Any, kind: Modality, question: str) -> tuple[Tensor, Tensor]:
    """Ids of a prompt before and behind its one video (or image), int64 [C] and [x].

    Args:
        processor: of the checkpoint.
        kind: "video" or "image".
        question: in words.

    Raises:
        UnknownModelError: the processor takes none, or its template does not show it once.

    Example:
        >>> from foveate import embedded
        >>> before, behind = prompt_around(embedded()[1], "video", "What is blue?")
        >>> before.shape[0] > 0 and behind.shape[0] > 3
        True
    """
    content = [{"type": kind}, {"type": "text", "text": question}]
    text = prompt_of(processor, Chat([{"role": "user", "content": content}]))
    tokenizer = processor.tokenizer
    mark = tokenizer.convert_tokens_to_ids(placeholder_of(processor, kind))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    (place,) = (ids == mark).nonzero(as_tuple=True)
    if len(place) != 1:
        raise UnknownModelError(
            f"The chat template of this checkpoint shows {len(place)} {kind}s for one; a stream "
            "needs a prompt with one."
        )
    return ids[: place[0]], ids[place[0] + 1 :]


def frame_inputs(processor: Any, kind: Modality, pixels_T3HW: Tensor) -> dict[str, Tensor]:
    """Frames as the feature method of a checkpoint takes them: one video, or T images.

    Args:
        processor: of the checkpoint.
        kind: "video" or "image".
        pixels_T3HW: uint8 [T, 3, H, W].
    """
    if kind == "image":
        pictures = list(pixels_T3HW.permute(0, 2, 3, 1).numpy())
        found = processor.image_processor(images=pictures, return_tensors="pt")
        return {"pixel_values": torch.as_tensor(found["pixel_values"])}
    options: dict[str, Any] = {"return_tensors": "pt"}
    if hasattr(processor.video_processor, "sample_frames"):
        options["do_sample_frames"] = False
    found = processor.video_processor(videos=[pixels_T3HW], **options)
    names = ("pixel_values_videos", "video_grid_thw")
    return {name: found[name] for name in names if name in found}
