"""Checkpoints by name: models, their processors, the inputs they take, and the embedded one."""

from foveate.checkpoints.answering import AnsweringScorer, own_scorer
from foveate.checkpoints.asking import AskingScorer
from foveate.checkpoints.chats import Chat, prepare, prepare_chats, read_chat
from foveate.checkpoints.companions import load_companion
from foveate.checkpoints.loading import EMBEDDED, embedded, embedded_folder, load_model
from foveate.checkpoints.processors import frame_side, load_processor
from foveate.checkpoints.sources import open_clip, sample_frames
from foveate.checkpoints.streaming import frame_inputs, prompt_around

__all__ = [
    "EMBEDDED",
    "AnsweringScorer",
    "AskingScorer",
    "Chat",
    "embedded",
    "embedded_folder",
    "frame_inputs",
    "frame_side",
    "load_companion",
    "load_model",
    "load_processor",
    "open_clip",
    "own_scorer",
    "prepare",
    "prepare_chats",
    "prompt_around",
    "read_chat",
    "sample_frames",
]
