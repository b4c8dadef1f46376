"""JSON in a storage, parsed defensively: a file may have been damaged or edited since it was written.

A sealed object carries its own digest, so that a reader notices any change.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from attlas.extract.errors import Damaged, first_line
from attlas.extract.shapes import is_nested_beyond
from attlas.extract.store.interface import Storage
from attlas.extract.store.layout import name_of

# far more than anything written here, far less than what a recursive reader can bear
_LEVELS = 64
_SEAL = "seal"


def as_json(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def get_json(storage: Storage, key: str) -> Any | None:
    """The value of a JSON file, or None if there is none. Raises Damaged."""
    content, name = storage.get(key), name_of(key)
    if content is None:
        return None
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # raises for lone surrogates, which are not text
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is JSON; this one is not ({first_line(error)})") from error
    if value is None:  # None would mean a missing file
        raise Damaged(f"{name} holds nothing but null")
    if is_nested_beyond(value, _LEVELS):
        raise Damaged(f"{name} is not what was written (it is nested too deep)")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _finite(digits: str) -> float:
    """The number that JSON has; 1e999 would be infinite."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is beyond all numbers")
    return number


def put_sealed(storage: Storage, key: str, value: Mapping[str, Any]) -> None:
    storage.put(key, seal(value))


def seal(value: Mapping[str, Any]) -> bytes:
    return as_json({**value, _SEAL: _digest(value)})


def get_sealed(storage: Storage, key: str) -> dict[str, Any] | None:
    """A sealed object, unchanged since it was written, or None if there is none. Raises Damaged."""
    value = get_json(storage, key)
    if value is None:
        return None
    seal = value.pop(_SEAL, None) if isinstance(value, dict) else None
    if seal != _digest(value):
        raise Damaged(f"{name_of(key)} is not as it was written (its seal does not fit)")
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
