"""Long sequences of noise with a few planted tokens, whose order is what there is to know.

Legend: B sequences, L tokens, D channels, V the most planted tokens, X those beyond one a symbol.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: Symbols that are planted, each at least once.
SYMBOLS = 3
#: The least and the most planted tokens of a sequence.
PLANTED = (3, 5)
#: The orders of the symbols, which are the classes.
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
#: Root mean square of a symbol over the channels; that of noise is 1.
_LOUDNESS = 5.0


class Drawn(NamedTuple):
    """What was drawn.

    Attributes:
        tokens: float32 [B, L, D].
        planted: bool [B, L].
        label: int64 [B], a place in `ORDERS`.
    """

    tokens: np.ndarray
    planted: np.ndarray
    label: np.ndarray


def symbols(width: int) -> np.ndarray:
    """A direction for each symbol, orthogonal to the others and of length 1, [SYMBOLS, width].

    Raises:
        ValueError: the width is too small for it.

    Example:
        >>> bool(np.allclose(symbols(8) @ symbols(8).T, np.eye(SYMBOLS)))
        True
    """
    if width < SYMBOLS:
        raise ValueError(f"width must be at least {SYMBOLS}, got {width}.")
    draw = np.random.Generator(np.random.PCG64(20230326))
    return np.linalg.qr(draw.normal(size=(width, SYMBOLS)))[0].T


def draw_sequences(
    draw: np.random.Generator, count: int, length: int, width: int, noisy: float = 1.0
) -> Drawn:
    """Sequences in which three symbols come in some order, one to three tokens each.

    The tokens of a symbol come one behind the other, with noise between them.

    Args:
        draw: source of everything that is random.
        count: B.
        length: L, at least 5.
        width: D.
        noisy: share of the other tokens that are noise; the rest is zero. Below 1 for a beginner.

    Example:
        >>> one = draw_sequences(np.random.default_rng(0), 2, 64, 8)
        >>> one.tokens.shape, bool((one.planted.sum(1) >= 3).all())
        ((2, 64, 8), True)
    """
    label_B = draw.integers(0, len(ORDERS), count)
    number_B = draw.integers(PLANTED[0], PLANTED[1] + 1, count)
    # Every symbol has a token; those beyond go to any of them. A turn of SYMBOLS is none.
    extra_BX = draw.integers(0, SYMBOLS, (count, PLANTED[1] - SYMBOLS))
    used_BX = np.arange(PLANTED[1] - SYMBOLS) < number_B[:, None] - SYMBOLS
    each_BS = np.tile(np.arange(SYMBOLS), (count, 1))
    turn_BV = np.sort(np.concatenate([each_BS, np.where(used_BX, extra_BX, SYMBOLS)], 1), 1)
    order_BS = np.concatenate([np.array(ORDERS)[label_B], np.full((count, 1), -1)], 1)
    symbol_BV = np.take_along_axis(order_BS, turn_BV, 1)

    tokens = draw.standard_normal((count, length, width), np.float32)
    tokens *= draw.random((count, length, 1), np.float32) < noisy
    planted = np.zeros((count, length), bool)
    row, column = np.nonzero(symbol_BV >= 0)
    place = _places(draw, number_B, length)[row, column]
    loud = _LOUDNESS * width**0.5 * symbols(width)
    tokens[row, place] += loud[symbol_BV[row, column]].astype(np.float32)
    planted[row, place] = True
    return Drawn(tokens, planted, label_B)


def _places(draw: np.random.Generator, number_B: np.ndarray, length: int) -> np.ndarray:
    """Different places, ascending in the first `number_B` columns, int64 [B, V]."""
    shuffled_BL = draw.random((len(number_B), length)).argsort(1)[:, : PLANTED[1]]
    used_BV = np.arange(PLANTED[1]) < number_B[:, None]
    return np.sort(np.where(used_BV, shuffled_BL, length), 1)
