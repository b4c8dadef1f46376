"""Checks of the shape of JSON values, whose errors name the key, the rule and the value.

A check is a function of a value and its key. It returns nothing or raises Malformed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from attlas.extract.printable import printable

Check = Callable[[Any, str], None]
INT64_MAX = (1 << 63) - 1  # Parquet, Arrow and Polars count in int64
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SHOWN = 40


class Malformed(ValueError):
    """A value of the wrong shape; the message names its key."""

    def __init__(self, key: str, rule: str, value: str) -> None:
        super().__init__(printable(f"{key or 'the file'} must be {rule}; got {value}"))


def any_value(_value: Any, _key: str) -> None:
    """Accept any value."""


def text(value: Any, key: str) -> None:
    if not isinstance(value, str):
        raise Malformed(key, "text", _describe(value))


def count(value: Any, key: str) -> None:
    """An integer from 0 to 2⁶³ − 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= INT64_MAX:
        raise Malformed(key, "an integer from 0 to 2⁶³ − 1", _describe(value))


def flag(value: Any, key: str) -> None:
    if not isinstance(value, bool):
        raise Malformed(key, "true or false", _describe(value))


def share(value: Any, key: str) -> None:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Malformed(key, "a number from 0 to 1", _describe(value))


def sha256(value: Any, key: str) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise Malformed(key, "a SHA-256 in hexadecimal", _describe(value))


def nullable(check: Check) -> Check:
    """Accept null, or a value that passes the check."""

    def check_value(value: Any, key: str) -> None:
        if value is not None:
            check(value, key)

    return check_value


def list_of(check: Check) -> Check:
    """Accept a list whose items pass the check."""

    def check_value(value: Any, key: str) -> None:
        if not isinstance(value, list):
            raise Malformed(key, "a list", _describe(value))
        for number, entry in enumerate(value):
            _check_inner(check, entry, key, f"[{number}]")

    return check_value


def mapping_of(check: Check) -> Check:
    """Accept an object with any keys whose values pass the check."""

    def check_value(value: Any, key: str) -> None:
        for name, entry in _object(value, key).items():
            _check_inner(check, entry, key, f".{name}")

    return check_value


def record(required: Mapping[str, Check], *, optional: Mapping[str, Check] | None = None) -> Check:
    """Accept an object with these keys, and others, which a later version may write."""
    checks, names = {**required, **(optional or {})}, required.keys()

    def check_value(value: Any, key: str) -> None:
        entries = _object(value, key)
        if not names <= entries.keys():
            missing = next(name for name in required if name not in entries)
            raise Malformed(key, f"an object with {', '.join(required)}", f"one without {missing}")
        for name, check in checks.items():
            if name in entries:
                _check_inner(check, entries[name], key, f".{name}")

    return check_value


def _check_inner(check: Check, value: Any, key: str, name: str) -> None:
    """Check what lies at a name inside a value of this key; a manifest has a million of them, of which few need their key."""
    try:
        check(value, key)
    except Malformed:
        check(value, f"{key}{name}".removeprefix("."))
        raise


def _object(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(key, "an object", _describe(value))
    return value


def is_nested_beyond(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more deeply than `levels`."""
    level = [value]
    for _ in range(levels + 1):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, list | dict)]
        level = [entry for values in inner for entry in values]
        if not level:
            return False
    return True


def _describe(value: Any) -> str:
    """A short description of a value, for messages."""
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)}"
    if isinstance(value, int) and abs(value) > INT64_MAX:
        return f"an integer {'below' if value < 0 else 'above'} that"
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
