"""Checkpoints by name: models, their processors, the inputs they take, and the embedded one."""

from foveate.checkpoints.loading import EMBEDDED, embedded, embedded_folder, load_model
from foveate.checkpoints.processors import load_processor, prepare
from foveate.checkpoints.sources import open_clip, sample_frames

__all__ = [
    "EMBEDDED",
    "embedded",
    "embedded_folder",
    "load_model",
    "load_processor",
    "open_clip",
    "prepare",
    "sample_frames",
]
