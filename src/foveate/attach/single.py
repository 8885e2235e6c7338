"""What hooks belong to: one model, never a copy of it."""

from __future__ import annotations

from typing import Any

from foveate.errors import AttachmentError


class OfOneModel:
    """Base of everything whose methods are hooks: refuses to be copied or pickled with a model."""

    def __reduce__(self) -> Any:
        raise AttachmentError(
            "A model cannot be copied or pickled while a recipe is attached: its hooks belong to "
            "this one. remove() the recipe first, or save the state_dict()."
        )
