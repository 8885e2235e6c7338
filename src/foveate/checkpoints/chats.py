"""Batches of chats that show several images and videos each, as inputs of a model.

The messages are those of evaluation harnesses: a list of turns, each with a role and a content list
of texts, images and videos.

Legend: T frames, H, W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from foveate.errors import (
    DamagedVideoWarning,
    FrameRequestError,
    UnknownModelError,
    VideoSourceError,
)
from foveate.video import Clip, Frames
from foveate.video.sampling import sample_ranks


@dataclass(eq=False)
class Chat:
    """One conversation: turns of text and placeholders, and what the placeholders stand for.

    Attributes:
        turns: messages in the form that chat templates read, without pixels.
        images: PIL images in the order of their placeholders.
        videos: sampled frames in the order of their placeholders.
    """

    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Frames] = field(default_factory=list)

    @property
    def layout(self) -> tuple[int, tuple[int, ...]]:
        """Number of images and frames of each video: chats that share it form one batch."""
        return len(self.images), tuple(len(video) for video in self.videos)


def read_chat(messages: Iterable[Mapping[str, Any]], max_frames: int = 32) -> Chat:
    """Decode what messages of an evaluation harness show.

    Args:
        messages: turns `{"role": str, "content": [part, ...]}`; a part is `{"type": "text",
            "text": str}` or `{"type": "image" | "video", "url": source}`. A source is a path, a PIL
            image, frames (a list of PIL images, uint8 [T, H, W, 3] array or [T, 3, H, W] tensor),
            or a dictionary with "url", "path" or "bytes". Videos may name a part of the clip in
            seconds: "start_time", "end_time", or "video_start", "video_end".
        max_frames: frames taken evenly from each video; shorter clips give all they have.

    Raises:
        VideoError: an image or video cannot be read.
        ValueError: a part is of another type, such as audio.

    Example:
        >>> clip = torch.zeros(8, 3, 4, 6, dtype=torch.uint8)
        >>> turn = [{"type": "video", "url": clip}, {"type": "text", "text": "What is it?"}]
        >>> read_chat([{"role": "user", "content": turn}], max_frames=5).layout
        (0, (5,))
    """
    chat = Chat()
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turn: list[dict[str, Any]] = []
        for part in parts:
            kind = part.get("type")
            if kind == "text":
                turn.append({"type": "text", "text": part["text"]})
                continue
            if kind == "image":
                chat.images.append(_read_image(part["url"]))
            elif kind == "video":
                chat.videos.append(_read_video(part, max_frames))
            else:
                raise ValueError(
                    f"A message has content of the type {kind!r}; text, image and video are "
                    "understood. Choose tasks without audio."
                )
            turn.append({"type": kind})
        chat.turns.append({"role": message["role"], "content": turn})
    return chat


def prepare_chats(processor: Any, chats: Sequence[Chat]) -> dict[str, Tensor]:
    """Model inputs for chats of one layout, padded on the left.

    Uses the checkpoint's chat template, and a plain prompt when it has none. Where a family stacks
    videos, the shorter videos of a chat repeat frames, evenly, up to the longest one's count.

    Args:
        processor: of the checkpoint.
        chats: of the same `layout`.

    Raises:
        ValueError: the layouts differ, or the processor takes no videos or images.

    Example:
        >>> inputs = prepare_chats(processor, [read_chat(messages)])      # doctest: +SKIP
        >>> inputs["input_ids"].shape                                     # doctest: +SKIP
        torch.Size([1, 3136])
    """
    layouts = {chat.layout for chat in chats}
    if len(layouts) != 1:
        raise ValueError(f"Chats of one batch must have one layout, got {sorted(layouts)}.")
    num_images, frame_counts = layouts.pop()
    options: dict[str, Any] = {
        "text": [prompt_of(processor, chat) for chat in chats],
        "return_tensors": "pt",
        "padding": True,
        "padding_side": "left",
    }
    if num_images:
        _check_takes(processor, "image")
        # Nested, because some families tile an image only where it is its sample's only one.
        options["images"] = [chat.images for chat in chats]
    if frame_counts:
        _check_takes(processor, "video")
        videos = [video for chat in chats for video in chat.videos]
        options |= _video_options(processor, videos)
    found = dict(processor(**options))
    inputs = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if "batch_num_images" in found:
        inputs["batch_num_images"] = torch.full((len(chats),), num_images)
    return inputs


def prepare(processor: Any, frames: Frames, question: str, is_image: bool) -> dict[str, Any]:
    """Model inputs for one picture or video and a question.

    Args:
        processor: of the checkpoint.
        frames: of the clip, or the one picture.
        question: in words.
        is_image: whether the first frame is shown as an image.

    Raises:
        UnknownModelError: the processor takes no videos or images.
    """
    kind = "image" if is_image else "video"
    content = [{"type": kind}, {"type": "text", "text": question}]
    chat = Chat([{"role": "user", "content": content}])
    if is_image:
        chat.images.append(_picture(frames))
    else:
        chat.videos.append(frames)
    return prepare_chats(processor, [chat])


def _picture(frames: Frames) -> Any:
    from PIL import Image

    return Image.fromarray(frames.pixels[0].permute(1, 2, 0).numpy())


def prompt_of(processor: Any, chat: Chat) -> str:
    """A chat as the text that the processor reads, each image and video a placeholder."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(chat.turns, tokenize=False, add_generation_prompt=True)
    names = {"user": "USER: ", "assistant": "ASSISTANT: ", "system": ""}
    lines = []
    for turn in chat.turns:
        parts = [
            part["text"]
            if part["type"] == "text"
            else f"{placeholder_of(processor, part['type'])}\n"
            for part in turn["content"]
        ]
        lines.append(names.get(turn["role"], "") + "".join(parts))
    return " ".join([*lines, "ASSISTANT:"])


def placeholder_of(processor: Any, kind: str) -> str:
    """The token that stands for an image or video in a prompt."""
    _check_takes(processor, kind)
    return getattr(processor, f"{kind}_token")


def _check_takes(processor: Any, kind: str) -> None:
    if getattr(processor, f"{kind}_token", None) is None:
        raise UnknownModelError(
            f"{type(processor).__name__} takes no {kind}s; choose a checkpoint that does, or tasks "
            f"without {kind}s."
        )


def _video_options(processor: Any, videos: list[Frames]) -> dict[str, Any]:
    if "video_grid_thw" not in processor.model_input_names:
        longest = max(len(video) for video in videos)
        videos = [_stretched(video, longest) for video in videos]
    pixels = [video.pixels for video in videos]
    # Processors that stand in where torchvision is missing read times; those of transformers read
    # frame numbers and the clip's rate, and would sample frames again unless told not to.
    if not hasattr(processor.video_processor, "sample_frames"):
        return {"videos": pixels, "video_metadata": [_times(video) for video in videos]}
    return {
        "videos": pixels,
        "do_sample_frames": False,
        "video_metadata": [_metadata(video) for video in videos],
    }


def _stretched(frames: Frames, count: int) -> Frames:
    """The frames in order, some of them repeated, so that there are `count`."""
    if len(frames) == count:
        return frames
    order_T = torch.from_numpy(sample_ranks(len(frames), count, allow_repeat=True))
    return Frames(
        frames.pixels[order_T], frames.seconds[order_T], frames.index[order_T], frames.damage
    )


def _times(frames: Frames) -> SimpleNamespace:
    """At one frame per second an index is a time, whatever the clip's own rate."""
    seconds = frames.seconds.tolist()
    # One frame alone has no rate, and processors divide by it.
    rate = (len(seconds) - 1) / max(seconds[-1] - seconds[0], 1e-6) if len(seconds) > 1 else 1.0
    return SimpleNamespace(fps=1.0, frames_indices=seconds, sampled_fps=rate)


def _metadata(frames: Frames) -> Any:
    from transformers.video_utils import VideoMetadata

    seconds, index = frames.seconds, frames.index
    span = float(seconds[-1] - seconds[0])
    return VideoMetadata(
        total_num_frames=int(index[-1]) + 1,
        fps=float(index[-1] - index[0]) / span if span > 0 else 1.0,
        duration=float(seconds[-1]),
        frames_indices=index.tolist(),
    )


# -- pixels ---------------------------------------------------------------------------------------


def _source(url: Any) -> Any:
    """What a `url` field holds, out of the dictionaries that data sets wrap around it."""
    if isinstance(url, Mapping):
        found = [
            url[k] for k in ("bytes", "url", "path", "video", "image") if url.get(k) is not None
        ]
        if not found:
            raise VideoSourceError(f"no url, path or bytes among the keys {sorted(url)}")
        url = found[0]
    if isinstance(url, str):
        if url.startswith(("http://", "https://")):
            raise VideoSourceError("it is an address; download the file first", source=url)
        return url.removeprefix("file://")
    return url


def _read_image(url: Any) -> Any:
    from PIL import Image, ImageOps

    source = _source(url)
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
        with Image.open(opened) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, TypeError, ValueError, Image.DecompressionBombError) as error:
        named = str(source) if isinstance(source, (str, Path)) else type(source).__name__
        raise VideoSourceError(f"cannot read the picture ({error})", source=named) from error


def _read_video(part: Mapping[str, Any], max_frames: int) -> Frames:
    url = part["url"]
    inner = url if isinstance(url, Mapping) else {}
    start = _first_given(part.get("start_time"), inner.get("video_start"))
    end = _first_given(part.get("end_time"), inner.get("video_end"))
    clip = Clip.open(_source(url))
    ranks = range(len(clip))
    if start is not None or end is not None:
        ranks = _between(clip, start, end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        return clip.take(sample_ranks(len(ranks), min(max_frames, len(ranks))) + ranks[0])


def _between(clip: Clip, start: float | None, end: float | None) -> range:
    """Ranks of the frames shown in [start, end] seconds; at least the frame shown at `start`."""
    low = max(0.0, float(start or 0.0))
    high = clip.info.duration if end is None else float(end)
    if low >= clip.info.duration or high < low:
        raise FrameRequestError(
            f"the part from {low} s to {high} s lies outside of its {clip.info.duration:.3f} s",
            source=clip.name,
        )
    first = int(torch.searchsorted(clip.seconds, torch.tensor(low).double(), right=True)) - 1
    last = int(torch.searchsorted(clip.seconds, torch.tensor(high).double(), right=True))
    return range(max(first, 0), max(last, first + 1))


def _first_given(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
