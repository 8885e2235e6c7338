"""What people name on a command line: a video file, a single picture, a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from foveate.errors import DamagedVideoWarning, UnknownModelError, UnsupportedVideoError
from foveate.video import Clip, Frames
from foveate.video.source import looks_like_picture

_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def open_clip(source: Any, *, isolate: bool = False) -> Clip:
    """A clip of a video file, or of one frame when the file is a picture, whatever its ending.

    Args:
        source: what `Clip` takes, or a picture's path.
        isolate: decode a video in a process of its own, for files that cannot be trusted.

    Raises:
        VideoError: it cannot be read.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None or not is_picture(path):
        return Clip.open(source, isolate=isolate) if isolate else Clip.open(source)
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = _in_colours(ImageOps.exif_transpose(image))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnsupportedVideoError(
            f"cannot read the picture ({error})", source=str(path)
        ) from error
    clip = Clip([upright])
    clip.name = path.name
    return clip


def _in_colours(image: Any) -> Any:
    """A picture in RGB; Pillow alone would turn one of 16 bits white."""
    if image.mode.startswith("I"):
        import numpy as np
        from PIL import Image

        deep_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((deep_HW >> 8).astype(np.uint8))
    return image.convert("RGB")


def is_picture(path: Path) -> bool:
    """Whether a file is a still picture, by its ending or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() in _PICTURES:
        return True
    try:
        with path.open("rb") as file:
            return looks_like_picture(file.read(16))
    except OSError:  # whoever opens it will say why
        return False


def check_checkpoint(name: str | Path) -> None:
    """Refuse a checkpoint that is plainly meant as a folder and is none.

    Raises:
        UnknownModelError: there is no such folder.
    """
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1
    if is_path and not Path(text).expanduser().is_dir():
        raise UnknownModelError(
            f"{text}: no such folder; name the folder of a transformers checkpoint or its hub id."
        )


def sample_frames(source: Any, frames: int) -> Frames:
    """Frames spread evenly over a clip, at most all; damage is recorded, not warned of.

    Raises:
        VideoError: the clip cannot be read.
    """
    clip = Clip.open(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        return clip.sample(min(frames, len(clip)))
