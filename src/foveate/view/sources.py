"""What people name on a command line: a video file, or a single picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.errors import UnknownModelError, UnsupportedVideoError
from foveate.video import Clip
from foveate.video.resize import resize

_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_PICTURE_SIDE = 640


def open_clip(source: Any) -> Clip:
    """A clip of a video file, or of one frame when the file is a picture.

    Raises:
        VideoError: it cannot be read.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None or path.suffix.lower() not in _PICTURES or not path.is_file():
        return Clip.open(source)
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnsupportedVideoError(
            f"cannot read the picture ({error})", source=str(path)
        ) from error
    return Clip([upright])


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


def picture_sized(pixels_TCHW: Tensor) -> Tensor:
    """Frames no longer than a report can show, uint8 [T, 3, h, w] with sides up to 640 pixels."""
    height, width = pixels_TCHW.shape[-2:]
    scale = _PICTURE_SIDE / max(height, width)
    if scale >= 1:
        return pixels_TCHW
    return resize(pixels_TCHW, (max(1, round(height * scale)), max(1, round(width * scale))))
