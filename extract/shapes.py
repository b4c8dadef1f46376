"""Shapes of JSON values: small checks that say which key is wrong, what it must be and what it is.

A check is a function of a value and its key. It returns nothing, or raises Malformed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from attlas.extract.printable import printable

Check = Callable[[Any, str], None]
MOST = (1 << 63) - 1  # Parquet, Arrow and Polars count in int64
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 40


class Malformed(ValueError):
    """A value of another shape than the one that is written; the message names its key."""

    def __init__(self, key: str, rule: str, came: str) -> None:
        super().__init__(printable(f"{key or 'the file'} must be {rule}; got {came}"))


def anything(_value: Any, _key: str) -> None:
    """No rule."""


def text(value: Any, key: str) -> None:
    if not isinstance(value, str):
        raise Malformed(key, "text", _shown(value))


def count(value: Any, key: str) -> None:
    """An integer from 0 to 2⁶³ − 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise Malformed(key, "an integer from 0 to 2⁶³ − 1", _shown(value))


def flag(value: Any, key: str) -> None:
    if not isinstance(value, bool):
        raise Malformed(key, "true or false", _shown(value))


def share(value: Any, key: str) -> None:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Malformed(key, "a number from 0 to 1", _shown(value))


def sha256(value: Any, key: str) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise Malformed(key, "a SHA-256 in hexadecimal", _shown(value))


def maybe(check: Check) -> Check:
    """Null, or what the check asks for."""

    def checked(value: Any, key: str) -> None:
        if value is not None:
            check(value, key)

    return checked


def every(check: Check) -> Check:
    """A list of what the check asks for."""

    def checked(value: Any, key: str) -> None:
        if not isinstance(value, list):
            raise Malformed(key, "a list", _shown(value))
        for number, entry in enumerate(value):
            check(entry, f"{key}[{number}]")

    return checked


def mapping(check: Check) -> Check:
    """An object of any keys, its values what the check asks for."""

    def checked(value: Any, key: str) -> None:
        for name, entry in _object(value, key).items():
            check(entry, f"{key}.{name}")

    return checked


def record(required: Mapping[str, Check], *, optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these keys. Others may stand beside them: a later version may write more."""

    def checked(value: Any, key: str) -> None:
        given = _object(value, key)
        missing = [name for name in required if name not in given]
        if missing:
            raise Malformed(key, f"an object with {', '.join(required)}", f"one without {missing[0]}")
        for name, check in {**required, **(optional or {})}.items():
            if name in given:
                check(given[name], f"{key}.{name}" if key else name)

    return checked


def _object(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(key, "an object", _shown(value))
    return value


def is_nested_beyond(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other deeper than so many levels."""
    level = [value]
    for _ in range(levels + 1):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, list | dict)]
        level = [entry for values in inner for entry in values]
        if not level:
            return False
    return True


def has_infinity(value: Any) -> bool:
    """Whether a number in it is infinite, as 1e999 is read."""
    if isinstance(value, float):
        return math.isinf(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(has_infinity(entry) for entry in inner)


def _shown(value: Any) -> str:
    """The beginning of a value."""
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)}"
    if isinstance(value, int) and abs(value) > MOST:
        return f"an integer {'below' if value < 0 else 'above'} that"
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
