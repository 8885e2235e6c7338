"""Seeing it: pictures and reports of what was kept, and what the commands do."""

from foveate.view.draw import draw_item, draw_kept
from foveate.view.html import render_report, save_report

__all__ = ["draw_item", "draw_kept", "render_report", "save_report"]
