"""How much may stay: a fraction of the tokens or an absolute count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from foveate.ops.allocate import proportional

Rounding = Literal["half_even", "floor", "ceil"]


@dataclass(frozen=True)
class Budget:
    """Either `retain`, the fraction of tokens kept in (0, 1], or `tokens`, an absolute count.

    Both may be a sequence (list, array, tensor) with one value per sample of the batch. Giving
    neither means keep all.

    Args:
        retain: fraction of the tokens kept.
        tokens: how many are kept.
        share: of a count: the part of the way to it that is gone, in (0, 1], where several methods
            go it together; of N tokens N * (tokens / N) ** share stay.
        published: nobody asked for it, it is the default of a method's card. A method that was
            published with a rule of its own for the number of tokens follows that rule then.

    Raises:
        ValueError: both are given, a value is out of range, or a sequence is empty.

    Example:
        >>> Budget(retain=0.15).count(196), Budget(tokens=64).count(196), Budget().is_full
        (29, 64, True)
        >>> Budget(retain=[0.5, 0.1]).sample(1)
        Budget(retain=0.1, tokens=None)
    """

    retain: float | Sequence[float] | None = None
    tokens: int | Sequence[int] | None = None
    share: float = field(default=1.0, repr=False)
    published: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.retain is not None and self.tokens is not None:
            raise ValueError(
                f"Give retain or tokens, not both (got retain={self.retain}, tokens={self.tokens})."
            )
        for name in ("retain", "tokens"):
            value = _plain(getattr(self, name))
            if value == ():
                raise ValueError(f"{name} names no sample: give one value, or one per sample.")
            object.__setattr__(self, name, value)
        for value in _values(self.retain):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"retain must be a number in (0, 1], got {value!r}.")
            if not 0 < value <= 1:
                raise ValueError(
                    f"retain is the fraction of tokens kept and must lie in (0, 1], got {value}."
                )
        for value in _values(self.tokens):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"tokens must be a whole number >= 1, got {value!r}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share!r}.")

    @property
    def is_full(self) -> bool:
        """Whether every token is kept whatever the input (retain = 1, or no budget at all)."""
        if self.tokens is not None:
            return False
        return all(value == 1 for value in _values(self.retain))

    @property
    def num_samples(self) -> int | None:
        """How many samples a per-sample budget names; None for one budget for all."""
        for value in (self.retain, self.tokens):
            if isinstance(value, tuple):
                return len(value)
        return None

    def sample(self, index: int, repeats: int = 1) -> Budget:
        """The budget of sample `index`; `repeats` = rows per sample, as beam search expands them.

        Raises:
            ValueError: the batch holds more samples than the budget names.
        """
        if self.num_samples is None:
            return self
        index = index // repeats
        if not 0 <= index < self.num_samples:
            raise ValueError(
                f"The budget names {self.num_samples} samples, but sample {index} was asked for: "
                "give one value per sample of the batch, or a single value."
            )
        if isinstance(self.retain, tuple):
            return Budget(retain=self.retain[index])
        assert isinstance(self.tokens, tuple)
        return Budget(tokens=self.tokens[index], share=self.share)

    # -- budgets of several methods ---------------------------------------------------------------

    def part(self, share: float) -> Budget:
        """What one of several methods keeps, which one after the other leave this budget.

        Args:
            share: its part of the way, in (0, 1]. Parts of a fraction add up to 1; the part of a
                count is that of what is left to do when the method's turn comes.

        Example:
            >>> Budget(retain=0.25).part(0.5), Budget(tokens=16).part(0.5).count(64)
            (Budget(retain=0.5, tokens=None), 32)
        """
        if self.tokens is not None:
            return Budget(tokens=self.tokens, share=self.share * share)
        return Budget(retain=_each(lambda value: value**share, self.retain))

    def divided(self, own: Budget) -> Budget | None:
        """The fraction left to others beside one that keeps `own`; None: it keeps too little."""
        rest = _each(lambda value, most: value / most, self.retain, own.retain)
        # 0.3 / (0.6 * 0.5) is a little more than 1.
        if any(value > 1 + 1e-9 for value in _values(rest)):
            return None
        return Budget(retain=_each(lambda value: min(value, 1.0), rest))

    def before(self, own: Budget) -> Budget:
        """The count to hand to a method that keeps the fraction `own`, so that this one is left."""
        return Budget(
            tokens=_each(lambda value, most: round(value / most), self.tokens, own.retain),
            share=self.share,
        )

    def fraction(self, num_tokens: int) -> float:
        """The fraction of `num_tokens` that stays, in (0, 1]."""
        retain, tokens = self._scalars()
        if tokens is not None:
            return min(1.0, tokens / max(num_tokens, 1)) ** self.share
        return 1.0 if retain is None else float(retain)

    def count(self, num_tokens: int, rounding: Rounding = "half_even") -> int:
        """How many of `num_tokens` tokens stay; small budgets may round to none.

        Args:
            num_tokens: tokens there are.
            rounding: of `num_tokens * retain`: "half_even", "floor" or "ceil". Part of a method.

        Raises:
            ValueError: the rounding is unknown, or the budget is per sample.
        """
        if rounding not in get_args(Rounding):
            raise ValueError(f'rounding must be "half_even", "floor" or "ceil", got {rounding!r}.')
        retain, tokens = self._scalars()
        if tokens is not None and (self.share == 1 or tokens >= num_tokens):
            return min(tokens, num_tokens)
        exact = num_tokens * (1.0 if retain is None else retain)
        if tokens is not None:
            exact = num_tokens * self.fraction(num_tokens)
        if rounding == "half_even":
            return round(exact)
        return math.floor(exact) if rounding == "floor" else math.ceil(exact)

    def split(self, sizes: Sequence[int], rounding: Rounding = "half_even") -> list[int]:
        """How many tokens of each part (tile, frame) stay, at least one of every part.

        `retain` is rounded part by part; `tokens` is shared in proportion to the sizes, exactly.

        Example:
            >>> Budget(retain=0.25).split([16, 36]), Budget(tokens=10).split([16, 16, 36])
            ([4, 9], [3, 2, 5])
        """
        if self.tokens is None:
            return [min(size, max(1, self.count(size, rounding))) for size in sizes]
        least = [min(size, 1) for size in sizes]
        total = min(max(self.count(sum(sizes)), sum(least)), sum(sizes))
        return proportional(total, sizes, minimum=least, maximum=sizes) if sizes else []

    def _scalars(self) -> tuple[float | None, int | None]:
        if self.num_samples is not None:
            raise ValueError("This budget is per sample: call budget.sample(index) first.")
        retain, tokens = self.retain, self.tokens
        assert not isinstance(retain, Sequence) and not isinstance(tokens, Sequence)
        return retain, tokens


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, sequences as tuples."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(entry) for entry in value)
    return value


def _each(run: Callable[..., Any], *values: Any) -> Any:
    """`run` on numbers, or on each sample's where one of them has one per sample."""
    num = next((len(value) for value in values if isinstance(value, tuple)), None)
    if num is None:
        return run(*values)
    rows = [value if isinstance(value, tuple) else (value,) * num for value in values]
    if any(len(row) != num for row in rows):
        raise ValueError(f"These budgets name {[len(row) for row in rows]} samples.")
    return tuple(map(run, *rows))


def _values(value: float | Sequence[float] | None) -> tuple:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
