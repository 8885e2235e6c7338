"""Figures as people read them, one way in every report, table and terminal."""

from __future__ import annotations

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def count(value: float) -> str:
    """A whole number: 6272 -> "6,272"."""
    return f"{value:,.0f}"


def plural(number: int, word: str) -> str:
    """A count with its noun: (1, "frame") -> "1 frame"."""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def digits(value: float) -> str:
    """Three digits: 4.2 -> "4.20", 1234.5 -> "1,234"."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def scaled(value: float, like: float | None = None) -> str:
    """A number with the prefix that fits it, or that fits `like`.

    Example:
        >>> scaled(4.08e13), scaled(4.2e8, like=4.2e9), scaled(12)
        ('40.8 T', '0.420 G', '12.0 ')
    """
    for size, prefix in _PREFIXES:
        if (like or value) >= size:
            return f"{digits(value / size)} {prefix}"
    return f"{digits(value)} "


def flops(value: float) -> str:
    """FLOPs with a fitting prefix: 4.08e13 -> "40.8 TFLOPs"."""
    return f"{scaled(value)}FLOPs"


def duration(seconds: float, like: float | None = None) -> str:
    """Seconds with the unit that fits them, or that fits `like`.

    Example:
        >>> duration(0.0042), duration(0.21, like=1.5), duration(204.2)
        ('4.20 ms', '0.210 s', '204 s')
    """
    for size, unit in _UNITS:
        if (like or seconds) >= size:
            return f"{digits(seconds / size)} {unit}"
    size, unit = _UNITS[-1]
    return f"{digits(seconds / size)} {unit}"


def shorten(text: str, most: int) -> str:
    """At most `most` characters, the last of them a sign that there were more."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
