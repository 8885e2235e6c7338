"""Long videos of noise tokens with a few planted ones, whose order is what there is to know.

Legend: B videos, L tokens, D channels, V the most planted tokens, X those beyond one a symbol, S
symbols, T things.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: Symbols that are planted, each at least once.
SYMBOLS = 3
#: Kinds of things that are planted; a video shows one.
THINGS = 8
#: The least and the most planted tokens of a video.
PLANTED = (3, 5)
#: The orders of the symbols, which are the classes.
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
#: Root mean square over the channels, where that of noise is 1: of what all tokens share, and of
#: what a planted one has of its symbol and of its thing.
_COMMON, _SYMBOL, _THING = 1.5, 2.0, 2.0
#: How much things of one kind differ, per direction.
_DIFFER = 0.2


class Drawn(NamedTuple):
    """Videos.

    Attributes:
        tokens: float32 [B, L, D], frame after frame.
        planted: bool [B, L].
        label: int64 [B], a place in `ORDERS`.
        thing: int64 [B], which kind of thing is planted.
    """

    tokens: np.ndarray
    planted: np.ndarray
    label: np.ndarray
    thing: np.ndarray


class Events(NamedTuple):
    """What happens in videos, before any noise.

    Attributes:
        row: int64 [E], video of every planted token.
        place: int64 [E], its place.
        vector: float32 [E, D], what it has more than other tokens.
        label: int64 [B].
        thing: int64 [B].
    """

    row: np.ndarray
    place: np.ndarray
    vector: np.ndarray
    label: np.ndarray
    thing: np.ndarray


def directions(width: int) -> np.ndarray:
    """What all tokens share, the symbols, the things: orthogonal, of length 1, [., width].

    Raises:
        ValueError: the width is too small for it.

    Example:
        >>> bool(np.allclose(directions(16) @ directions(16).T, np.eye(12)))
        True
    """
    number = 1 + SYMBOLS + THINGS
    if width < number:
        raise ValueError(f"width must be at least {number}, got {width}.")
    draw = np.random.Generator(np.random.PCG64(20230326))
    return np.linalg.qr(draw.normal(size=(width, number)))[0].T


def draw_events(
    draw: np.random.Generator, count: int, frames: int, patches: int, width: int
) -> Events:
    """Videos in which three symbols come in some order, in one to three frames each.

    The tokens of a symbol come one behind the other, each in a frame of its own. All of a video
    show one thing, which is of one kind and like no other.

    Args:
        draw: source of everything that is random.
        count: B.
        frames: at least 5.
        patches: tokens of a frame.
        width: D.
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
    row, column = np.nonzero(symbol_BV >= 0)
    frame = _ascending(draw, number_B, frames)[row, column]
    place = frame * patches + draw.integers(0, patches, len(row))

    thing_B = draw.integers(0, THINGS, count)
    look_BT = np.eye(THINGS)[thing_B] + _DIFFER * draw.normal(size=(count, THINGS))
    look_BT /= np.linalg.norm(look_BT, axis=1, keepdims=True)
    _, symbols, things = np.split(directions(width), [1, 1 + SYMBOLS])
    vector = _SYMBOL * symbols[symbol_BV[row, column]] + _THING * (look_BT @ things)[row]
    return Events(row, place, (width**0.5 * vector).astype(np.float32), label_B, thing_B)


def show(
    draw: np.random.Generator, events: Events, length: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, L, D] of videos with noise of their own, and which are planted, bool [B, L]."""
    count = len(events.label)
    tokens = draw.standard_normal((count, length, width), np.float32)
    tokens += (_COMMON * width**0.5 * directions(width)[0]).astype(np.float32)
    planted = np.zeros((count, length), bool)
    tokens[events.row, events.place] += events.vector
    planted[events.row, events.place] = True
    return tokens, planted


def draw_videos(
    draw: np.random.Generator, count: int, frames: int, patches: int, width: int
) -> Drawn:
    """Videos as `draw_events` describes them, with noise.

    Example:
        >>> one = draw_videos(np.random.default_rng(0), 2, 8, 8, 16)
        >>> one.tokens.shape, bool((one.planted.sum(1) >= 3).all())
        ((2, 64, 16), True)
    """
    events = draw_events(draw, count, frames, patches, width)
    tokens, planted = show(draw, events, frames * patches, width)
    return Drawn(tokens, planted, events.label, events.thing)


def draw_clips(
    draw: np.random.Generator, count: int, frames: int, patches: int, width: int
) -> tuple[Drawn, np.ndarray]:
    """Whole videos, and of each a short clip: the half that shows more of what is planted.

    Nothing but what is planted is common to both: the noise of the clip is its own.

    Example:
        >>> long, short = draw_clips(np.random.default_rng(0), 2, 8, 8, 16)
        >>> long.tokens.shape, short.shape
        ((2, 64, 16), (2, 32, 16))
    """
    length = frames * patches
    events = draw_events(draw, count, frames, patches, width)
    tokens, planted = show(draw, events, length, width)
    again, _ = show(draw, events, length, width)
    half = frames // 2 * patches
    late_B = planted[:, half:].sum(1) > planted[:, :half].sum(1)
    short = np.where(late_B[:, None, None], again[:, length - half :], again[:, :half])
    return Drawn(tokens, planted, events.label, events.thing), short


def _ascending(draw: np.random.Generator, number_B: np.ndarray, end: int) -> np.ndarray:
    """Different numbers below `end`, ascending in the first `number_B` columns, int64 [B, V]."""
    shuffled_BE = draw.random((len(number_B), end)).argsort(1)[:, : PLANTED[1]]
    used_BV = np.arange(PLANTED[1]) < number_B[:, None]
    return np.sort(np.where(used_BV, shuffled_BE, end), 1)
