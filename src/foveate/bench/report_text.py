"""Figures as people read them; a figure that is missing is a dash."""

from __future__ import annotations

from html import escape

from foveate import _wording as wording
from foveate._wording import digits
from foveate.bench.stats import Interval

DASH, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A fraction in percent, with a real minus; with `sign` also a plus.

    Example:
        >>> percent(0.7123), percent(0.7123, 0), percent(0.013, sign=True), percent(-0.0001)
        ('71.2', '71', '+1.3', '0.0')
        >>> percent(-0.02) == MINUS + "2.0", percent(None) == DASH
        (True, True)
    """
    if value is None:
        return DASH
    text = f"{100 * value:{'+' if sign else ''}.{digits}f}"
    # "-0.0" says that something was lost where nothing was.
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", MINUS)


def budget(value: float) -> str:
    """A retain ratio: 0.05 -> "5 %"."""
    return f"{100 * value:.4g} %"


def span(interval: Interval, sign: bool = False) -> str:
    """The ends of an interval in percent, or "" where there are none."""
    if not interval.known:
        return ""
    return f"{percent(interval.low, 1, sign)} to {percent(interval.high, 1, sign)}"


def tokens(value: float | None) -> str:
    """A mean number of tokens: at most one digit behind the point, none from 100 on."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 or abs(value - round(value)) < 1e-6 else f"{value:.1f}"


def flops(value: float | None, like: float | None = None) -> str:
    """FLOPs with the prefix that fits them, or that fits `like`: 4.08e13 -> "40.8 T"."""
    return DASH if value is None else wording.scaled(value, like).strip()


def duration(seconds: float | None, like: float | None = None) -> str:
    """Seconds with the unit that fits them, or that fits `like`: 0.0042 -> "4.20 ms"."""
    return DASH if seconds is None else wording.duration(seconds, like)


def memory(size: float | None) -> str:
    """Bytes: 3.2e9 -> "3.20 GB"."""
    if size is None:
        return DASH
    return f"{digits(size / 1e9)} GB" if size >= 1e9 else f"{digits(size / 1e6)} MB"


def attribute(text: str) -> str:
    """Text as it may stand between double quotes in HTML and SVG."""
    return escape(text, quote=True)
