"""Reads "Example:" in docstrings as the "Examples:" section that the documentation tool knows.

Without it a doctest would be rendered as a quotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_TITLES = {r"^Example:$": "Examples:", r"^Class attributes:$": "Attributes:"}


class DocstringTitles(griffe.Extension):
    """Rename section titles before docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every documented object."""
        if obj.docstring is None:
            return
        for pattern, title in _TITLES.items():
            obj.docstring.value = re.sub(pattern, title, obj.docstring.value, flags=re.MULTILINE)
