"""Pages in a headless browser, for tests that look at what is really drawn."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed"),
]
#: Preferred colour schemes, as the browser numbers them.
LIGHT, DARK = 1, 0


def screenshot(page: Path, scheme: int, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A page as an array [H, W, 3] of 0 to 255, and what the browser logged.

    Args:
        page: the file; the picture and the browser's profile go beside it.
        scheme: `LIGHT` or `DARK`.
        size: width and height of the window in pixels.
    """
    picture = page.with_suffix(".png")
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--virtual-time-budget=1500",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--user-data-dir={page.parent / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert picture.is_file(), done.stderr[-2000:]
    return np.asarray(Image.open(picture).convert("RGB")).astype(int), done.stderr
