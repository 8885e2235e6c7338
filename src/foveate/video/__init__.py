"""Frames out of videos, with their times, and into encoder input."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.errors import (
        DamagedVideoError,
        DamagedVideoWarning,
        DecodeLimitError,
        DecoderFailedError,
        DecodeStalledError,
        EmptyVideoError,
        FrameRequestError,
        FrameTooLargeError,
        NoVideoStreamError,
        TruncatedVideoError,
        UnsupportedVideoError,
        VideoError,
        VideoNotFoundError,
        VideoSourceError,
    )
    from foveate.video.clip import Clip
    from foveate.video.frames import Damage, Frames, VideoInfo
    from foveate.video.isolate import Limits
    from foveate.video.live import Live
    from foveate.video.live_clock import Gap
    from foveate.video.live_feed import LiveReport
    from foveate.video.preprocess import FrameTransform
    from foveate.video.samples import sample_clip
    from foveate.video.stream import FrameStream
    from foveate.video.torchcodec_reader import TorchCodecReader

# Resolved at first use: the process that only decodes must not wait for torch.
_HOME = {
    "Clip": "clip",
    "Damage": "frames",
    "FrameStream": "stream",
    "FrameTransform": "preprocess",
    "Frames": "frames",
    "Gap": "live_clock",
    "Limits": "isolate",
    "Live": "live",
    "LiveReport": "live_feed",
    "TorchCodecReader": "torchcodec_reader",
    "VideoInfo": "frames",
    "sample_clip": "samples",
}

__all__ = [
    "Clip",
    "Damage",
    "DamagedVideoError",
    "DamagedVideoWarning",
    "DecodeLimitError",
    "DecodeStalledError",
    "DecoderFailedError",
    "EmptyVideoError",
    "FrameRequestError",
    "FrameStream",
    "FrameTooLargeError",
    "FrameTransform",
    "Frames",
    "Gap",
    "Limits",
    "Live",
    "LiveReport",
    "NoVideoStreamError",
    "TorchCodecReader",
    "TruncatedVideoError",
    "UnsupportedVideoError",
    "VideoError",
    "VideoInfo",
    "VideoNotFoundError",
    "VideoSourceError",
    "sample_clip",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'foveate.video' has no attribute {name!r}")
    home = f"foveate.video.{_HOME[name]}" if name in _HOME else "foveate.errors"
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
