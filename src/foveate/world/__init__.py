"""A procedural video world: clips, exact ground truth, questions, captions, a tokenizer.

Deterministic from a seed, needs nothing but NumPy and Pillow, and makes hundreds of clips a second.

Example:
    >>> from foveate.world import World
    >>> sample = World(seed=0, split="test", frames=16, size=64).sample(3)
    >>> sample.frames_THWC.shape
    (16, 64, 64, 3)
"""

from foveate.world.cast import sample_scene
from foveate.world.policies import POLICIES, Policy, policies_of
from foveate.world.questions import Question, questions_of
from foveate.world.render import render
from foveate.world.scene import Scene, Shot, Sprite
from foveate.world.truth import CLASSES, Truth
from foveate.world.vocabulary import TASKS, TEMPORAL_TASKS
from foveate.world.world import SPLITS, Sample, World

__all__ = [
    "CLASSES",
    "POLICIES",
    "SPLITS",
    "TASKS",
    "TEMPORAL_TASKS",
    "Policy",
    "Question",
    "Sample",
    "Scene",
    "Shot",
    "Sprite",
    "Truth",
    "World",
    "policies_of",
    "questions_of",
    "render",
    "sample_scene",
]
