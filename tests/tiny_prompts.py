"""Inputs of the tiny models, made without processors.

Token ids: 0 padding, 1 start, 2 end, 3 to 99 text, 100 and up special.

Legend: T frames, P patches, B samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PAD, BOS, EOS = 0, 1, 2
FIRST_TEXT, FIRST_SPECIAL = 3, 100
IMAGE, VIDEO, VISION_START, VISION_END, MARK = 110, 111, 112, 113, 114
VOCAB = 120

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3")
FRAMES_AS_IMAGES = ("internvl", "smolvlm", "idefics3")


def tiny_modalities(family: str) -> tuple[str, ...]:
    """What items `tiny_inputs` builds for a family; frames may travel as images."""
    return ("image",) if family in ("llava", "llava_next") else ("image", "video")


@dataclass(frozen=True)
class Sample:
    """One sample: text, item, text, item, ..., text.

    Args:
        text: tokens of each stretch of text, one more than there are items.
        items: "image", "video" or "video:8" (8 frames).
        seed: what content is drawn from; by default the place in the batch, so set it where a
            sample has to be the same alone and in a batch.
    """

    text: tuple[int, ...] = (5, 7)
    items: tuple[str, ...] = ("image",)
    seed: int | None = None


@dataclass
class _Row:
    """What one sample adds to a batch."""

    ids: list[int] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)


def tiny_inputs(
    family: str,
    *,
    samples: Sequence[Sample] | None = None,
    modality: str | None = None,
    seed: int = 0,
    frames: int = 4,
    padding_side: str = "left",
) -> dict[str, Tensor]:
    """Inputs of `forward` and `generate` for some samples, without a processor.

    Args:
        family: one of `tiny.TINY_FAMILIES`.
        samples: the batch; by default one sample with one item of `modality`.
        modality: "image" or "video".
        seed: added to the content of every sample.
        frames: of a video that does not say ("video:8").
        padding_side: "left" or "right".
    """
    if samples is None:
        samples = (Sample(items=(modality or "image",)),)
    rows = []
    for place, sample in enumerate(samples):
        if len(sample.text) != len(sample.items) + 1:
            raise ValueError(f"{sample} needs {len(sample.items) + 1} stretches of text.")
        number = place if sample.seed is None else sample.seed
        rows.append(_row(family, sample, number, seed, frames))
    inputs = _pad([row.ids for row in rows], padding_side)
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = ((ids == IMAGE) * 1 + (ids == VIDEO) * 2).int()
    collate = _COLLATE.get(family, _collate_plain)
    return inputs | collate(family, rows)


def _row(family: str, sample: Sample, number: int, seed: int, frames: int) -> _Row:
    generator = torch.Generator().manual_seed(1000 * seed + number)
    row = _Row()

    def text(count: int) -> list[int]:
        drawn = torch.randint(FIRST_TEXT, FIRST_SPECIAL, (count,), generator=generator)
        return drawn.tolist()

    row.ids += [BOS, *text(sample.text[0])]
    for place, item in enumerate(sample.items):
        kind, _, count = item.partition(":")
        if kind not in tiny_modalities(family):
            raise ValueError(f"{family} has no {kind!r}.")
        build = _BUILD.get(family, _build_plain)
        built, ids = build(family, kind, int(count or frames), number + place, generator, text)
        (row.images if "image" in built else row.videos).append(built)
        row.ids += ids + text(sample.text[place + 1])
    return row


def _pad(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Pixels: coarse patterns with some noise, so that neighbouring patches resemble each other."""
    coarse = torch.randn(*shape[:-2], 4, 4, generator=generator)
    smooth = nn.functional.interpolate(
        coarse.reshape(-1, 1, 4, 4), size=shape[-2:], mode="bilinear", align_corners=False
    ).reshape(shape)
    return smooth + 0.3 * torch.randn(shape, generator=generator)


def _drift(generator: torch.Generator, frames: int, height: int, width: int) -> Tensor:
    """A video [T, 3, h, w] that changes slowly, with a cut in the middle."""
    first, second = _noise(generator, 2, 3, height, width)
    weight = (torch.arange(frames) >= frames // 2).float().view(-1, 1, 1, 1)
    return (
        (1 - weight) * first + weight * second + 0.2 * _noise(generator, frames, 3, height, width)
    )


_SIDES = {"llava_next": 32, "video_llava": 32, "internvl": 32, "smolvlm": 32, "idefics3": 32}


def _build_plain(
    family: str, kind: str, frames: int, number: int, generator: torch.Generator, text: Any
) -> tuple[dict[str, Any], list[int]]:
    """llava, video_llava, and the videos of the LLaVA-NeXT line: one run of placeholders."""
    side = _SIDES.get(family, 48)
    if kind == "image":
        return {"image": _noise(generator, 3, side, side)}, [IMAGE] * (side // 8) ** 2
    video = _drift(generator, frames, side, side)
    pooled = (-(-(side // 8) // 2)) ** 2
    count = {
        "video_llava": frames * ((side // 8) ** 2 + 1),
        "llava_onevision": frames * pooled + 1,
        "llava_next_video": frames * pooled,
    }[family]
    return {"video": video}, [VIDEO] * count


_ANYRES_SIZES = ((60, 30), (40, 90), (70, 50))


def _build_anyres(
    family: str, kind: str, frames: int, number: int, generator: torch.Generator, text: Any
) -> tuple[dict[str, Any], list[int]]:
    if kind == "video":
        return _build_plain(family, kind, frames, number, generator, text)
    size = _ANYRES_SIZES[number % 3]
    side = _SIDES.get(family, 48)
    tiles, count = _anyres_layout(family, size, side)
    return {"image": _noise(generator, tiles, 3, side, side), "size": size}, [IMAGE] * count


def _anyres_layout(family: str, size: tuple[int, int], side: int) -> tuple[int, int]:
    """Tiles and tokens of an image, worked out by hand for the three sizes.

    The processors' arithmetic is repeated in numbers here so that a mistake in an adapter cannot
    hide behind the same mistake in the test's inputs.
    """
    small = {(60, 30): (3, 16 + 8 * 5), (40, 90): (3, 16 + 4 * 9), (70, 50): (5, 16 + 8 * 7)}
    large = {(60, 30): (3, 36 + 12 * 7), (40, 90): (3, 36 + 6 * 13), (70, 50): (5, 36 + 12 * 9)}
    # vision_aspect_ratio "anyres_max_1": mosaics above 1.1 x 36 patches shrink to about 36.
    shrunk = {(60, 30): (3, 36 + 8 * 5), (40, 90): (3, 36 + 4 * 9), (70, 50): (5, 36 + 7 * 5)}
    table = {"llava_onevision": shrunk}.get(family, small if side == 32 else large)
    return table[size]


_PACKED_SIZES = ((8, 12), (8, 8), (12, 10))


def packed_patches(pixels: Tensor, temporal: int, patch: int = 4, merge: int = 2) -> Tensor:
    """[T, 3, h, w] -> [P, 3 * temporal * patch * patch], blocks of merge x merge together."""
    frames, channels, height, width = pixels.shape
    rows, columns = height // patch // merge, width // patch // merge
    x = pixels.reshape(
        frames // temporal, temporal, channels, rows, merge, patch, columns, merge, patch
    )
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(-1, channels * temporal * patch * patch)


def _build_packed(
    family: str, kind: str, frames: int, number: int, generator: torch.Generator, text: Any
) -> tuple[dict[str, Any], list[int]]:
    """Qwen-VL and VideoLLaMA 3: patches in one row, grids of (planes, rows, columns)."""
    temporal = 1 if family == "video_llama_3" else 2
    rows, columns = (8, 8) if kind == "video" else _PACKED_SIZES[number % 3]
    height, width = 4 * rows, 4 * columns
    merge = 1 if family == "video_llama_3" and kind == "image" else 2
    if kind == "image":
        pixels = _noise(generator, 1, 3, height, width).repeat(temporal, 1, 1, 1)
    else:
        pixels = _drift(generator, frames, height, width)
    planes = pixels.shape[0] // temporal
    built = {
        kind: packed_patches(pixels, temporal, merge=merge),
        "thw": (planes, rows, columns),
        "merge": merge,
    }
    token = IMAGE if kind == "image" else VIDEO
    plane = [token] * (rows * columns // merge**2)
    if family == "video_llama_3":
        return built, plane if kind == "image" else [
            t for _ in range(planes) for t in text(2) + plane
        ]
    if family == "qwen3_vl" and kind == "video":
        return built, [
            token_id
            for _ in range(planes)
            for token_id in [*text(2), VISION_START, *plane, VISION_END]
        ]
    return built, [VISION_START, *plane * planes, VISION_END]


def _build_tiles(
    family: str, kind: str, frames: int, number: int, generator: torch.Generator, text: Any
) -> tuple[dict[str, Any], list[int]]:
    """InternVL and SmolVLM: one, three or two tiles of an image, or the frames of a video."""
    side = _SIDES[family]
    tokens = [IMAGE] * (side // 4 // 2) ** 2
    if kind == "video":
        tiles = _drift(generator, frames, side, side)
        ids = [t for _ in range(frames) for t in [*text(2), VISION_START, *tokens, VISION_END]]
        return {"image": tiles}, ids
    count = (1, 3, 2)[number % 3]
    tiles = _noise(generator, count, 3, side, side)
    if family == "internvl":
        return {"image": tiles}, [VISION_START, *tokens * count, VISION_END]
    return {"image": tiles}, [t for _ in range(count) for t in [MARK, *tokens]] + [MARK]


def _collate_plain(family: str, rows: list[_Row]) -> dict[str, Tensor]:
    inputs = {}
    if images := [item["image"] for row in rows for item in row.images]:
        inputs[_image_argument(family)] = torch.stack(images)
    if videos := [item["video"] for row in rows for item in row.videos]:
        inputs["pixel_values_videos"] = torch.stack(videos)
    return inputs


def _image_argument(family: str) -> str:
    """Video-LLaVA called its images otherwise in transformers < 5.20."""
    if family != "video_llava":
        return "pixel_values"
    from transformers import VideoLlavaModel

    known = inspect.signature(VideoLlavaModel.forward).parameters
    return "pixel_values" if "pixel_values" in known else "pixel_values_images"


def _collate_anyres(family: str, rows: list[_Row]) -> dict[str, Tensor]:
    inputs = _collate_plain(family, [_Row(videos=row.videos) for row in rows])
    images = [item for row in rows for item in row.images]
    if images:
        inputs["pixel_values"] = _stack(item["image"] for item in images)
        inputs["image_sizes"] = torch.tensor([item["size"] for item in images])
    return inputs


def _collate_packed(family: str, rows: list[_Row]) -> dict[str, Tensor]:
    inputs = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        items = [item for row in rows for item in getattr(row, f"{kind}s")]
        if items:
            inputs[pixels] = torch.cat([item[kind] for item in items])
            inputs[f"{kind}_grid_thw"] = torch.tensor([item["thw"] for item in items])
            if family == "video_llama_3":
                inputs[f"{kind}_merge_sizes"] = torch.tensor([item["merge"] for item in items])
    return inputs


def _collate_tiles(family: str, rows: list[_Row]) -> dict[str, Tensor]:
    tiles = [torch.cat([item["image"] for item in row.images]) for row in rows if row.images]
    if not tiles:
        return {}
    if family == "internvl":
        return {"pixel_values": torch.cat(tiles)}
    # One row of blocks per sample, filled up with empty ones.
    empty = torch.zeros(0, *tiles[0].shape[1:])
    per_row = [torch.cat([item["image"] for item in row.images] or [empty]) for row in rows]
    return {"pixel_values": _stack(per_row)}


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """Stack tensors of different first dimension, filled up with zeros."""
    tensors = list(tensors)
    length = max(tensor.shape[0] for tensor in tensors)
    stacked = tensors[0].new_zeros(len(tensors), length, *tensors[0].shape[1:])
    for index, tensor in enumerate(tensors):
        stacked[index, : tensor.shape[0]] = tensor
    return stacked


_ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
_BUILD: dict[str, Callable[..., Any]] = (
    dict.fromkeys(_ANYRES, _build_anyres)
    | dict.fromkeys(PACKED, _build_packed)
    | dict.fromkeys(FRAMES_AS_IMAGES, _build_tiles)
)
_COLLATE: dict[str, Callable[..., dict[str, Tensor]]] = (
    dict.fromkeys(_ANYRES, _collate_anyres)
    | dict.fromkeys(PACKED, _collate_packed)
    | dict.fromkeys(FRAMES_AS_IMAGES, _collate_tiles)
)
