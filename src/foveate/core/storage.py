"""How a method wants keys and values to be stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStorage:
    """Few-bit storage of a cache: old tokens in groups, the last ones as they are.

    Keys share a step along the tokens of one channel, values along the channels of one token.

    Args:
        bits: of a stored number, 2 or 4.
        group: numbers that share a step and a zero point; channels of a head that do not divide by
            it use the largest smaller group that does.
        recent: the last tokens of every sample that stay in full precision; between `recent` and
            `recent + group - 1` of them, as keys are stored by whole groups of tokens.

    Raises:
        ValueError: other bits, or sizes that make no sense.

    Example:
        >>> CacheStorage(bits=4).group
        64
    """

    bits: int = 2
    group: int = 64
    recent: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ValueError(f"A cache is stored in 2 or 4 bits, got bits={self.bits!r}.")
        if self.group < 1 or self.recent < 0:
            raise ValueError(
                f"group must be at least 1 and recent at least 0, got group={self.group}, "
                f"recent={self.recent}."
            )
