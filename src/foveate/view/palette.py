"""Colours for groups, far apart from one to the next, and for numbers, evenly from dark to bright.

Legend: G groups, V steps of a scale.
"""

from __future__ import annotations

import numpy as np

# Successive multiples of the golden angle never crowd, however many colours are asked for.
_GOLDEN_ANGLE = np.pi * (3.0 - np.sqrt(5.0))
_LIGHTNESS = np.array([0.76, 0.68, 0.84])
_CHROMA = 0.14

#: Colours of labels before they repeat.
NUM_LABEL_COLOURS = 60

#: Colours of rings, which differ in hue and in lightness.
MARK_COLOURS = (
    "#ffd84d",
    "#4fd1ff",
    "#ff6b8b",
    "#9be15d",
    "#c79bff",
    "#ff9f45",
    "#5ef0c8",
    "#f2f2f2",
)


def group_colours(count: int) -> np.ndarray:
    """Distinct opaque colours for `count` groups, uint8 [count, 3], always the same ones.

    Hues step by the golden angle and lightness cycles through three levels, in OKLCH, where equal
    steps look equal.

    Example:
        >>> group_colours(3).shape, bool((group_colours(5)[:3] == group_colours(3)).all())
        ((3, 3), True)

    Source: OKLab, https://bottosson.github.io/posts/oklab.
    """
    index_G = np.arange(max(count, 0))
    hue_G = 0.6 + index_G * _GOLDEN_ANGLE
    lab_G3 = np.stack(
        [
            _LIGHTNESS[index_G % len(_LIGHTNESS)],
            _CHROMA * np.cos(hue_G),
            _CHROMA * np.sin(hue_G),
        ],
        axis=-1,
    )
    return _to_rgb(lab_G3)


def heat_colours(count: int = 256) -> np.ndarray:
    """A scale for numbers, dark violet to pale yellow, uint8 [count, 3].

    Lightness rises in equal steps of OKLab, so that equal differences look equal, also in grey and
    to colour-blind eyes.

    Example:
        >>> heat_colours(256).shape, bool((heat_colours(256)[255] > heat_colours(256)[0]).all())
        ((256, 3), True)
    """
    share_V = np.linspace(0.0, 1.0, max(count, 0))
    hue_V = np.deg2rad(285.0 + 180.0 * share_V)
    # Least colour at both ends, where the screen can show little of it.
    chroma_V = 0.06 + 0.13 * np.sin(np.pi * np.clip(share_V * 0.92 + 0.06, 0.0, 1.0))
    lightness_V = 0.20 + 0.76 * share_V
    return _to_rgb(
        np.stack([lightness_V, chroma_V * np.cos(hue_V), chroma_V * np.sin(hue_V)], axis=-1)
    )


def _to_rgb(lab_G3: np.ndarray) -> np.ndarray:
    """OKLab to sRGB, uint8."""
    to_lms = np.array(
        [
            [1.0, 0.3963377774, 0.2158037573],
            [1.0, -0.1055613458, -0.0638541728],
            [1.0, -0.0894841775, -1.2914855480],
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear_G3 = np.clip((lab_G3 @ to_lms.T) ** 3 @ to_rgb.T, 0.0, 1.0)
    low = linear_G3 * 12.92
    high = 1.055 * linear_G3 ** (1 / 2.4) - 0.055
    return np.rint(255 * np.where(linear_G3 <= 0.0031308, low, high)).astype(np.uint8)
