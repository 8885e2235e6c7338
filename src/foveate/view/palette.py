"""Colours for merged groups: evenly bright, far apart from one group to the next.

Legend: G groups.
"""

from __future__ import annotations

import numpy as np

# Successive multiples of the golden angle never crowd, however many colours are asked for.
_GOLDEN_ANGLE = np.pi * (3.0 - np.sqrt(5.0))
_LIGHTNESS = np.array([0.76, 0.68, 0.84])
_CHROMA = 0.14


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
