"""A checkpoint's processor, also where torchvision is missing.

transformers builds video processors on torchvision alone. Without it the checkpoint's own processor
class still does everything about the prompt, and the stand-ins here do the pixels, in torch.

Legend: T frames, H, W pixels in; h, w pixels out; g frames in a temporal patch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError, UnknownModelError
from foveate.video import FrameTransform
from foveate.video.resize import resize

#: Processor classes whose videos are frames of one size, [1, T, 3, h, w].
_STACKED = (
    "InternVLProcessor",
    "LlavaNextVideoProcessor",
    "LlavaOnevisionProcessor",
    "VideoLlavaProcessor",
)
#: Processor classes whose videos are packed patches, and whether T counts in their pixel limits.
_PACKED = {"Qwen2VLProcessor": False, "Qwen2_5_VLProcessor": False, "Qwen3VLProcessor": True}
_VIDEO_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_TILING_KEYS = ("min_pixels", "max_pixels", "merge_size", "temporal_patch_size", "crop_to_patches")


def load_processor(name: str | Path) -> Any:
    """The processor of a checkpoint: text and pictures to model inputs.

    Args:
        name: folder or hub id.

    Raises:
        UnknownModelError: it has none that can be read.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils.import_utils import is_torchvision_available

    try:
        config = AutoConfig.from_pretrained(name)
        cls: Any = PROCESSOR_MAPPING.get(type(config), None)
        if cls is None:
            raise UnknownModelError(
                f"{name} is of the kind {config.model_type!r}, for which transformers has no "
                "processor; name a checkpoint that takes pictures and text."
            )
        if is_torchvision_available() or "video_processor" not in cls.get_attributes():
            return AutoProcessor.from_pretrained(name)
        return _stitched(cls, name)
    except FoveateError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UnknownModelError(f"cannot load the processor of {name}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


def _stitched(cls: Any, name: str | Path) -> Any:
    """A processor of class `cls` whose video processor is a stand-in."""
    from transformers import AutoTokenizer

    # transformers 5.16 hides this class behind torchvision, which it does not need.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    class Stitched(cls):
        """The checkpoint's own processor with a stand-in for its video processor."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
            return type(argument)

        def __repr__(self) -> str:
            return f"{cls.__name__} with {type(self.video_processor).__name__}"

    settings, _ = cls.get_processor_dict(name)
    parts = {
        "tokenizer": lambda: AutoTokenizer.from_pretrained(name),
        "image_processor": lambda: AutoImageProcessor.from_pretrained(name),
        "video_processor": lambda: _video_stand_in(cls.__name__, name, settings),
    }
    return Stitched.from_args_and_dict([parts[a]() for a in cls.get_attributes()], settings)


def _video_stand_in(kind: str, name: str | Path, settings: Mapping[str, Any]) -> Any:
    config = settings.get("video_processor") or read_first(name, _VIDEO_FILES)
    if kind in _STACKED:
        return StackedFrames(config)
    if kind in _PACKED:
        return PackedFrames(config, counts_frames=_PACKED[kind])
    return NoVideo(kind)


def read_first(name: str | Path, files: Sequence[str]) -> dict[str, Any]:
    """The first of these files that a checkpoint has, as JSON.

    Raises:
        UnknownModelError: it has none of them.
    """
    from transformers.utils.hub import cached_file

    for file in files:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return json.loads(Path(path).read_text(encoding="utf-8"))
    raise UnknownModelError(f"{name} has none of the files {', '.join(files)}.")


class StackedFrames:
    """Frames of one size: `pixel_values_videos` [videos, T, 3, h, w]."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Tiling settings are for images; frames of a video are never tiled.
        plain = {k: v for k, v in config.items() if k not in (*_TILING_KEYS, "do_pad")}
        self.transform = FrameTransform.from_processor(plain)

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        return {"pixel_values_videos": torch.stack([self.transform(v) for v in _flat(videos)])}


class PackedFrames:
    """Patches of all frames in one row, two rows and columns of them next to each other (Qwen-VL).

    Attributes:
        patch_size: pixels.
        temporal_patch_size: frames in a patch.
        merge_size: side of the block that becomes one token.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1.
    """

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, config: Mapping[str, Any], *, counts_frames: bool) -> None:
        self.patch_size = int(config.get("patch_size", 16 if counts_frames else 14))
        self.temporal_patch_size = int(config.get("temporal_patch_size", 2))
        self.merge_size = int(config.get("merge_size", 2))
        size = config.get("size") or {}
        side = self.patch_size * self.merge_size
        low = config.get("min_pixels") or size.get("shortest_edge") or 128 * side * side
        high = config.get("max_pixels") or size.get("longest_edge") or 768 * side * side
        self.limits = (int(low), int(high))
        self.counts_frames = counts_frames
        plain = {k: v for k, v in config.items() if k not in _TILING_KEYS}
        self.transform = FrameTransform.from_processor({**plain, "do_resize": False, "size": None})
        self.resample = config.get("resample", 3)

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        packed = [self._pack(video) for video in _flat(videos)]
        return {
            "pixel_values_videos": torch.cat([patches for patches, _ in packed]),
            "video_grid_thw": torch.tensor([grid for _, grid in packed]),
            # Qwen3-VL writes the time of every temporal patch into the prompt.
            "video_metadata": options.get("video_metadata") or [],
        }

    def _pack(self, pixels_TCHW: Tensor) -> tuple[Tensor, list[int]]:
        p, g, m = self.patch_size, self.temporal_patch_size, self.merge_size
        if missing := -len(pixels_TCHW) % g:
            pixels_TCHW = torch.cat([pixels_TCHW, pixels_TCHW[-1:].expand(missing, -1, -1, -1)])
        T, _, H, W = pixels_TCHW.shape
        h, w = fit_pixels(H, W, p * m, self.limits, T if self.counts_frames else 1)
        x_TChw = self.transform(resize(pixels_TCHW, (h, w), self.resample))
        rows, columns = h // p, w // p
        # T/g g C, block row, row in block, y, block column, column in block, x
        x = x_TChw.reshape(T // g, g, 3, rows // m, m, p, columns // m, m, p)
        x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return x.reshape(-1, 3 * g * p * p), [T // g, rows, columns]


class NoVideo:
    """Says that videos of a family cannot be prepared here; its images can."""

    model_input_names = ()

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        raise UnknownModelError(
            f"videos for {self.kind} are prepared by transformers with torchvision, which is not "
            "installed: pip install torchvision (images work without it)."
        )


def fit_pixels(
    height: int, width: int, factor: int, limits: tuple[int, int], frames: int = 1
) -> tuple[int, int]:
    """(height, width) near the given one, in multiples of `factor`, whose pixels are in `limits`.

    Args:
        height: pixels.
        width: pixels.
        factor: pixels of a token's side.
        limits: fewest and most pixels of `frames` pictures together.
        frames: pictures that share the limits.

    Example:
        >>> fit_pixels(272, 640, 28, (56 * 56, 28 * 28 * 100))
        (168, 420)
    """
    rows, columns = (max(1, round(side / factor)) for side in (height, width))
    total = frames * rows * columns * factor**2
    if total > limits[1]:
        shrink = math.sqrt(frames * height * width / limits[1])
        rows, columns = (max(1, int(side / shrink / factor)) for side in (height, width))
    elif total < limits[0]:
        grow = math.sqrt(limits[0] / (frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def sees_whole_frames(processor: Any) -> bool:
    """Whether it is known that frames of videos are scaled but never cropped."""
    stand_in = getattr(processor, "video_processor", None)
    if isinstance(stand_in, StackedFrames):
        return stand_in.transform.crop_size is None
    return isinstance(stand_in, PackedFrames)


def frame_side(processor: Any) -> int | None:
    """Pixels of the square that a video's frames become; None where it depends on the frames.

    Example:
        >>> from types import SimpleNamespace
        >>> size = {"height": 384, "width": 384}
        >>> frame_side(SimpleNamespace(video_processor=SimpleNamespace(size=size)))
        384
    """
    source = getattr(processor, "video_processor", None)
    if isinstance(source, NoVideo | None):
        source = getattr(processor, "image_processor", None)
    settings = getattr(source, "transform", source)
    names = ["crop_size", "size"] if getattr(settings, "do_center_crop", True) else ["size"]
    for name in names:
        found = getattr(settings, name, None)
        if isinstance(found, int):
            return found
        if found is not None and not isinstance(found, tuple):  # a mapping, or what acts as one
            found = [dict(found).get(side) for side in ("height", "width")]
        sides = [int(side) for side in found or () if side is not None]
        if len(sides) == 2:
            return min(sides)
    return None


def _flat(videos: Any) -> list[Tensor]:
    """Videos as a flat list of uint8 [T, 3, H, W], however the processor nested them."""
    if isinstance(videos, Tensor):
        return list(videos) if videos.dim() == 5 else [videos]
    return [tensor for video in videos for tensor in _flat(video)]
