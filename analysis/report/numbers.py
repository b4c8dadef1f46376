"""Numbers for people to read: as many digits as the interval justifies, a true minus sign, percent for shares."""

from __future__ import annotations

import math

MISSING = "–"
THIN = "\u202f"  # a narrow space that does not break
_FINEST = 6  # more decimals than this are written with an exponent


def format_number(value: float | None) -> str:
    """About three significant digits, with an exponent only for very small numbers."""
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 10000:
        text = f"{value:,.0f}".replace(",", THIN)
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 1:
        text = f"{value:.2f}"
    elif size >= 0.001 or value == 0:
        text = f"{value:.3f}" if value else "0"
    else:
        text = f"{value:.1e}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{100 * value:.0f}{THIN}%" if abs(value) >= 0.0995 else f"{100 * value:.1f}{THIN}%"


def estimate(value: float | None, low: float | None, high: float | None, *, share: bool = False) -> str:
    """A value with as many digits as its interval justifies."""
    return _format(value, _decimals(low, high, share=share), share=share)


def interval(low: float | None, high: float | None, *, share: bool = False) -> str:
    """The interval as text, or the reason why there is none."""
    if low is None or high is None:
        return "no interval: fewer than 2 documents"
    decimals = _decimals(low, high, share=share)
    bottom, top = _format(low, decimals, share=share), _format(high, decimals, share=share)
    return f"95{THIN}% interval {bottom} to {top}"


def half_width(low: float | None, high: float | None) -> str:
    """± half of the interval, with the digits of the estimate; empty without an interval."""
    if low is None or high is None:
        return ""
    return f"±{_format((high - low) / 2, _decimals(low, high, share=False), share=False)}"


def count(value: int) -> str:
    return f"{value:,}".replace(",", THIN)


def plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def _decimals(low: float | None, high: float | None, *, share: bool) -> int | None:
    """The number of decimals that shows the first digit of the half-width; None if that takes an exponent."""
    if low is None or high is None or not high > low:
        return None
    half = (high - low) / 2 * (100 if share else 1)
    decimals = max(0, -math.floor(math.log10(half)))
    return decimals if decimals <= _FINEST else None


def _format(value: float | None, decimals: int | None, *, share: bool) -> str:
    if value is None or decimals is None:
        return percent(value) if share else format_number(value)
    text = f"{100 * value if share else value:,.{decimals}f}".replace(",", THIN).replace("-", "−")
    return f"{text}{THIN}%" if share else text
