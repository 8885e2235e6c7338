"""Training: the embedded video LLM, from the procedural world to weights."""

from foveate.training.embedded import EmbeddedTraining
from foveate.training.evaluate import summary, world_accuracy
from foveate.training.model import build_model, save_pretrained
from foveate.training.sizes import SIZES, Size, Stage, size_named

__all__ = [
    "SIZES",
    "EmbeddedTraining",
    "Size",
    "Stage",
    "build_model",
    "save_pretrained",
    "size_named",
    "summary",
    "world_accuracy",
]
