"""Random draws that stay the same on every machine, interpreter and version of NumPy."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

Thing = TypeVar("Thing")


class Draw:
    """Draws from one named stream.

    Everything is built on `random.Random.random` and seeding by text, the two parts of the standard
    generator whose output is guaranteed never to change; NumPy gives no such promise.

    Args:
        name: anything printable; equal names give equal draws.

    Example:
        >>> Draw("a", 1).integer(0, 9) == Draw("a", 1).integer(0, 9)
        True
    """

    def __init__(self, *name: object) -> None:
        self._random = random.Random("/".join(map(str, name))).random

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._random()

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high], both included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def choice(self, things: Sequence[Thing]) -> Thing:
        """One of these."""
        return things[int(self._random() * len(things))]

    def weighted(self, weights: dict[Thing, float]) -> Thing:
        """One of the keys, by weight."""
        point = self._random() * sum(weights.values())
        for thing, weight in weights.items():
            point -= weight
            if point < 0:
                return thing
        return list(weights)[-1]  # Rounding may leave nothing over.

    def shuffled(self, things: Iterable[Thing]) -> list[Thing]:
        """All of these in random order."""
        left = list(things)
        return [left.pop(int(self._random() * len(left))) for _ in range(len(left))]

    def sample(self, things: Iterable[Thing], number: int) -> list[Thing]:
        """This many of these, without repetition."""
        return self.shuffled(things)[:number]

    def noise(self, *shape: int) -> np.ndarray:
        """Bytes of uniform noise: uint8 of this shape."""
        key = repr(self._random()).encode()
        data = hashlib.shake_128(key).digest(math.prod(shape))
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
