"""Seeing it: pictures and reports of what was kept, and what the commands do."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.view.answer import Answer, ask
    from foveate.view.draw import draw_item, draw_kept
    from foveate.view.encoders import Encoder, load_encoder
    from foveate.view.evidence_sheet import draw_evidence
    from foveate.view.html import render_report, save_report
    from foveate.view.several import show_pictures
    from foveate.view.show import show_video
    from foveate.view.thinking import ThoughtfulAnswer, think

# Resolved at first use: help texts and charts need neither torch nor Pillow.
_LAZY = {
    "Answer": "foveate.view.answer",
    "Encoder": "foveate.view.encoders",
    "ThoughtfulAnswer": "foveate.view.thinking",
    "ask": "foveate.view.answer",
    "draw_evidence": "foveate.view.evidence_sheet",
    "draw_item": "foveate.view.draw",
    "draw_kept": "foveate.view.draw",
    "load_encoder": "foveate.view.encoders",
    "render_report": "foveate.view.html",
    "save_report": "foveate.view.html",
    "show_pictures": "foveate.view.several",
    "show_video": "foveate.view.show",
    "think": "foveate.view.thinking",
}

__all__ = [
    "Answer",
    "Encoder",
    "ThoughtfulAnswer",
    "ask",
    "draw_evidence",
    "draw_item",
    "draw_kept",
    "load_encoder",
    "render_report",
    "save_report",
    "show_pictures",
    "show_video",
    "think",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'foveate.view' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
