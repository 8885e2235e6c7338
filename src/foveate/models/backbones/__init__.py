"""Backbones that no library ships, in the parameter layout of their official code.

They need torch alone, and run untouched without any method.
"""

from foveate.models.backbones.mixste import MixSTE, MixSTEConfig
from foveate.models.backbones.s4d import ViS4mer, ViS4merConfig, momentum_update
from foveate.models.backbones.stream import Seam, Stream
from foveate.models.backbones.vision_ssm import VisionMamba, VisionMambaConfig

__all__ = [
    "MixSTE",
    "MixSTEConfig",
    "Seam",
    "Stream",
    "ViS4mer",
    "ViS4merConfig",
    "VisionMamba",
    "VisionMambaConfig",
    "momentum_update",
]
