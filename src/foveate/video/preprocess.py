"""Frames to encoder input: the steps of a transformers image processor, in torch, batched.

Legend: T frames; C colour channels (3); H, W pixels in; h, w pixels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.video.resize import BICUBIC, filter_number, resize

# Processors that choose the size or cut tiles by the picture; one fixed recipe would be wrong.
_VARIABLE_KEYS = (
    "min_pixels",
    "max_pixels",
    "merge_size",
    "temporal_patch_size",
    "crop_to_patches",
)
_SIZE_FORMS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)


@dataclass(frozen=True)
class FrameTransform:
    """Resize, centre-crop, rescale and normalise frames as a PIL image processor does.

    Resizing is Pillow's bit for bit (see `foveate.video.resize.resize`), so the result equals the
    processor's but for float32 rounding. Runs on the device of its input.

    Attributes:
        size: {"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"},
            {"max_height", "max_width"}, one number for a square, or None to leave the size alone.
        crop_size: (height, width) cut from the centre, zero-padded where the frame is smaller; None
            for no crop.
        rescale_factor: multiplies pixels; None for none.
        mean: subtracted per channel after rescaling; None (with std) for no normalisation.
        std: divides per channel.
        resample: Pillow's filter number or name.

    Example:
        >>> transform = FrameTransform(size={"shortest_edge": 8}, crop_size=(8, 8),
        ...                            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> x_TCHW = transform(torch.full((2, 3, 12, 20), 255, dtype=torch.uint8))
        >>> x_TCHW.shape, x_TCHW.dtype, x_TCHW.max().item()
        (torch.Size([2, 3, 8, 8]), torch.float32, 1.0)
    """

    size: Mapping[str, int] | int | None = None
    crop_size: tuple[int, int] | None = None
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resample: int | str = BICUBIC

    def __post_init__(self) -> None:
        filter_number(self.resample)
        if isinstance(self.size, Mapping) and set(self.size) not in _SIZE_FORMS:
            raise ValueError(
                f"size has keys {sorted(self.size)}; expected one of "
                f"{[sorted(form) for form in _SIZE_FORMS]}"
            )
        numbers = [] if self.size is None else list(_as_dict(self.size).values())
        if any(value < 1 for value in (*numbers, *(self.crop_size or ()))):
            raise ValueError(
                f"sizes must be at least 1 pixel, got size={self.size}, crop_size={self.crop_size}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or neither")
        if self.std is not None and 0 in self.std:
            raise ValueError(f"std must not hold zeros, got {self.std}")

    @classmethod
    def from_processor(cls, processor: Any) -> FrameTransform:
        """Take the settings of a transformers image processor or of its configuration.

        Args:
            processor: an image or video processor, anything that holds one as ``image_processor``,
                or the dict of a ``preprocessor_config.json``.

        Raises:
            ValueError: it chooses sizes per picture, pads, or does a step that is not known here.

        Example:
            >>> config = {"do_resize": True, "size": {"shortest_edge": 224}, "resample": 3}
            >>> FrameTransform.from_processor(config).output_size(720, 1280)
            (224, 398)
        """
        processor = getattr(processor, "image_processor", processor)
        config = dict(processor if isinstance(processor, Mapping) else processor.to_dict())
        name = config.get("image_processor_type") or type(processor).__name__
        variable = [key for key in _VARIABLE_KEYS if config.get(key) is not None]
        if variable:
            raise ValueError(
                f"{name} sizes or tiles every picture by itself ({', '.join(variable)}); use the "
                "model's own processor for its frames"
            )
        unknown = [key for key in ("do_pad", "do_flip_channel_order", "offset") if config.get(key)]
        if unknown:
            raise ValueError(f"{name} asks for {', '.join(unknown)}, which is not supported")
        normalize = config.get("do_normalize", False) and config.get("image_mean") is not None
        crops = config.get("do_center_crop", False) and config.get("crop_size") is not None
        crop = _as_dict(config["crop_size"]) if crops else {}
        size = config.get("size") if config.get("do_resize", False) else None
        if isinstance(size, int):
            square = config.get("default_to_square", True)
            size = {"height": size, "width": size} if square else {"shortest_edge": size}
        return cls(
            size=None if size is None else {k: v for k, v in dict(size).items() if v is not None},
            crop_size=(crop["height"], crop["width"]) if crop else None,
            rescale_factor=config.get("rescale_factor", 1 / 255)
            if config.get("do_rescale", True)
            else None,
            mean=_per_channel(config["image_mean"]) if normalize else None,
            std=_per_channel(config["image_std"]) if normalize else None,
            # Processors that name no filter resize bilinearly.
            resample=2 if config.get("resample") is None else config["resample"],
        )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that frames of a given size come out with."""
        return self.crop_size or self._resized(height, width)

    def __call__(self, pixels_TCHW: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Transform frames.

        Args:
            pixels_TCHW: uint8 [T, 3, H, W].
            dtype: floating type of the result.

        Returns:
            [T, 3, h, w] on the same device.

        Raises:
            ValueError: the frames have another shape or dtype.
        """
        if pixels_TCHW.dim() != 4 or pixels_TCHW.shape[1] != 3 or pixels_TCHW.dtype != torch.uint8:
            raise ValueError(
                f"frames must be uint8 [T, 3, H, W], got {pixels_TCHW.dtype} "
                f"{tuple(pixels_TCHW.shape)}"
            )
        height, width = pixels_TCHW.shape[-2:]
        if len(pixels_TCHW) and self.size is not None:
            pixels_TCHW = resize(pixels_TCHW, self._resized(height, width), self.resample)
        elif self.size is not None:
            pixels_TCHW = pixels_TCHW.new_empty(0, 3, *self._resized(height, width))
        if self.crop_size is not None:
            pixels_TCHW = _center_crop(pixels_TCHW, self.crop_size)
        x_TCHW = pixels_TCHW.to(torch.float32)
        if self.rescale_factor is not None:
            x_TCHW = x_TCHW * self.rescale_factor
        if self.mean is not None and self.std is not None:
            mean_C11 = x_TCHW.new_tensor(self.mean).view(-1, 1, 1)
            std_C11 = x_TCHW.new_tensor(self.std).view(-1, 1, 1)
            x_TCHW = (x_TCHW - mean_C11) / std_C11
        return x_TCHW.to(dtype)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        size = _as_dict(self.size)
        if "height" in size:
            return size["height"], size["width"]
        if "max_height" in size:
            ratio = min(size["max_height"] / height, size["max_width"] / width)
            return int(height * ratio), int(width * ratio)
        short, long = min(height, width), max(height, width)
        edge, cap = size["shortest_edge"], size.get("longest_edge")
        if cap is None:
            other = int(edge * long / short)
            return (edge, other) if height <= width else (other, edge)
        return _within(height, width, edge, cap)


def _within(height: int, width: int, edge: int, cap: int) -> tuple[int, int]:
    """Shortest edge to `edge`, unless the longest would pass `cap` (DETR's rule)."""
    exact = None
    if max(height, width) / min(height, width) * edge > cap:
        exact = cap * min(height, width) / max(height, width)
        edge = round(exact)
    if edge in (height, width) and edge == min(height, width):
        return height, width
    # Multiplied before divided, as in the processors: the other order cuts some a pixel short.
    other = int((edge if exact is None else exact) * max(height, width) / min(height, width))
    return (edge, other) if height <= width else (other, edge)


def _as_dict(size: Mapping[str, int] | int) -> Mapping[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    return size if isinstance(size, Mapping) else dict(size)


def _per_channel(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, (int, float)) else tuple(map(float, value))


def _center_crop(pixels_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut from the centre; smaller frames are padded with black, as in transformers."""
    height, width = pixels_TCHW.shape[-2:]
    crop_h, crop_w = size
    pad_h, pad_w = max(crop_h, height) - height, max(crop_w, width) - width
    if pad_h or pad_w:
        above, left = math.ceil(pad_h / 2), math.ceil(pad_w / 2)
        pads = (left, pad_w - left, above, pad_h - above)
        top, side = (height - crop_h) // 2, (width - crop_w) // 2
        pixels_TCHW = torch.nn.functional.pad(pixels_TCHW, pads)
        top, side = top + above, side + left
    else:
        top, side = (height - crop_h) // 2, (width - crop_w) // 2
    return pixels_TCHW[..., top : top + crop_h, side : side + crop_w]
