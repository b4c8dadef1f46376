"""Numbers as people read them: as many digits as their interval knows, a true minus, percent where it is a share."""

from __future__ import annotations

import math

MISSING = "–"
THIN = "\u202f"  # a narrow space that does not break
_FINEST = 6  # decimals beyond which an exponent reads better


def shown(value: float | None) -> str:
    """Three significant digits or so, no exponent where there need be none."""
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
    """A value to the digits that its interval knows."""
    return _written(value, _decimals(low, high, share=share), share=share)


def interval(low: float | None, high: float | None, *, share: bool = False) -> str:
    """The interval in words, or why there is none."""
    if low is None or high is None:
        return "no interval: fewer than 2 documents"
    decimals = _decimals(low, high, share=share)
    bottom, top = _written(low, decimals, share=share), _written(high, decimals, share=share)
    return f"95{THIN}% interval {bottom} to {top}"


def half_width(low: float | None, high: float | None) -> str:
    """± half of the interval, to the digits of its estimate; nothing without an interval."""
    if low is None or high is None:
        return ""
    return f"±{_written((high - low) / 2, _decimals(low, high, share=False), share=False)}"


def count(value: int) -> str:
    return f"{value:,}".replace(",", THIN)


def plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def _decimals(low: float | None, high: float | None, *, share: bool) -> int | None:
    """Decimals that show the first digit of the interval's half-width; None where only an exponent would."""
    if low is None or high is None or not high > low:
        return None
    half = (high - low) / 2 * (100 if share else 1)
    decimals = max(0, -math.floor(math.log10(half)))
    return decimals if decimals <= _FINEST else None


def _written(value: float | None, decimals: int | None, *, share: bool) -> str:
    if value is None or decimals is None:
        return percent(value) if share else shown(value)
    text = f"{100 * value if share else value:,.{decimals}f}".replace(",", THIN).replace("-", "−")
    return f"{text}{THIN}%" if share else text
