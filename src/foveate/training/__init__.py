"""Training on generated data: the embedded video LLM, and small models of single tasks."""

from foveate.training.embedded import EmbeddedTraining
from foveate.training.evaluate import summary, world_accuracy
from foveate.training.model import build_model, save_pretrained
from foveate.training.registry import TASKS, make_task
from foveate.training.sizes import SIZES, Size, Stage, size_named
from foveate.training.task import Outcome, Task, TaskTraining, load_task, measure_again

__all__ = [
    "SIZES",
    "TASKS",
    "EmbeddedTraining",
    "Outcome",
    "Size",
    "Stage",
    "Task",
    "TaskTraining",
    "build_model",
    "load_task",
    "make_task",
    "measure_again",
    "save_pretrained",
    "size_named",
    "summary",
    "world_accuracy",
]
