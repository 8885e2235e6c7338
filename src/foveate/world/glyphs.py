"""A 5 x 7 bitmap font of our own: text in pixels must not depend on installed fonts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

_ROWS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "a": "01110 10001 10001 11111 10001 10001 10001",
    "b": "11110 10001 10001 11110 10001 10001 11110",
    "c": "01110 10001 10000 10000 10000 10001 01110",
    "d": "11110 10001 10001 10001 10001 10001 11110",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "f": "11111 10000 10000 11110 10000 10000 10000",
    "g": "01110 10001 10000 10111 10001 10001 01110",
    "h": "10001 10001 10001 11111 10001 10001 10001",
    "i": "01110 00100 00100 00100 00100 00100 01110",
    "j": "00111 00010 00010 00010 00010 10010 01100",
    "k": "10001 10010 10100 11000 10100 10010 10001",
    "l": "10000 10000 10000 10000 10000 10000 11111",
    "m": "10001 11011 10101 10101 10001 10001 10001",
    "n": "10001 11001 10101 10011 10001 10001 10001",
    "o": "01110 10001 10001 10001 10001 10001 01110",
    "p": "11110 10001 10001 11110 10000 10000 10000",
    "q": "01110 10001 10001 10001 10101 10010 01101",
    "r": "11110 10001 10001 11110 10100 10010 10001",
    "s": "01111 10000 10000 01110 00001 00001 11110",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "u": "10001 10001 10001 10001 10001 10001 01110",
    "v": "10001 10001 10001 10001 10001 01010 00100",
    "w": "10001 10001 10001 10101 10101 11011 10001",
    "x": "10001 10001 01010 00100 01010 10001 10001",
    "y": "10001 10001 01010 00100 00100 00100 00100",
    "z": "11111 00001 00010 00100 01000 10000 11111",
}
GLYPH_HEIGHT, GLYPH_WIDTH = 7, 5


@lru_cache(maxsize=512)
def text_bitmap(text: str) -> np.ndarray:
    """The dots of a text: bool [7, 6 * len(text) - 1], one empty column between letters.

    Raises:
        ValueError: a character has no glyph (there are a-z and 0-9).

    Example:
        >>> text_bitmap("42").shape
        (7, 11)
    """
    unknown = sorted(set(text) - set(_ROWS))
    if unknown or not text:
        raise ValueError(f"no glyph for {unknown} in {text!r}; there are a-z and 0-9.")
    dots = np.zeros((GLYPH_HEIGHT, (GLYPH_WIDTH + 1) * len(text) - 1), dtype=bool)
    for place, letter in enumerate(text):
        rows = [[dot == "1" for dot in row] for row in _ROWS[letter].split()]
        dots[:, place * (GLYPH_WIDTH + 1) :][:, :GLYPH_WIDTH] = rows
    return dots


@lru_cache(maxsize=512)
def text_alpha(text: str, height: int) -> np.ndarray:
    """A text at a height in pixels, smoothed: uint8 [height, width], 255 where a stroke is.

    Example:
        >>> text_alpha("7", 14).shape
        (14, 10)
    """
    dots = text_bitmap(text)
    width = max(1, round(dots.shape[1] * height / GLYPH_HEIGHT))
    image = Image.fromarray(dots.astype(np.uint8) * 255)
    alpha = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    alpha.setflags(write=False)
    return alpha
