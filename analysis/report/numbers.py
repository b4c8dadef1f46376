"""Numbers as people read them: three digits that matter, a true minus, percent where the value is a share."""

from __future__ import annotations

MISSING = "–"
THIN = " "  # a thin space that does not break


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


def interval(low: float | None, high: float | None, *, share: bool = False) -> str:
    """The interval in words, or why there is none."""
    if low is None or high is None:
        return "no interval: fewer than 2 documents"
    write = percent if share else shown
    return f"95{THIN}% interval {write(low)} to {write(high)}"


def count(value: int) -> str:
    return f"{value:,}".replace(",", THIN)


def plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"
