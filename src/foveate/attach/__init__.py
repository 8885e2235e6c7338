"""Put a recipe on an unmodified transformers model with forward hooks, and take it off again."""

from foveate.attach.attachment import Attachment, reduce

__all__ = ["Attachment", "reduce"]
