"""Put a recipe on an unmodified transformers model with forward hooks, and take it off again."""

from foveate.attach.attachment import Attachment, reduce
from foveate.attach.frame_choice import choose_frames

__all__ = ["Attachment", "choose_frames", "reduce"]
