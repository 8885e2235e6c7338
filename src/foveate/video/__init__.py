"""Frames out of videos, with their times, and into encoder input."""

from foveate.errors import (
    DamagedVideoError,
    DamagedVideoWarning,
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
from foveate.video.preprocess import FrameTransform
from foveate.video.samples import sample_clip

__all__ = [
    "Clip",
    "Damage",
    "DamagedVideoError",
    "DamagedVideoWarning",
    "EmptyVideoError",
    "FrameRequestError",
    "FrameTooLargeError",
    "FrameTransform",
    "Frames",
    "NoVideoStreamError",
    "TruncatedVideoError",
    "UnsupportedVideoError",
    "VideoError",
    "VideoInfo",
    "VideoNotFoundError",
    "VideoSourceError",
    "sample_clip",
]
