"""Checks of a model's configuration, which comes from whoever made the model: it may name code, or sizes beyond all reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from attlas.extract.errors import Refusal

_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_PRIVATE_IMPLEMENTATIONS = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
_LAYERS = re.compile(r"(num_|n_)?(\w+_)?(layers?|blocks|depths?)")
_MAX_LAYERS = 2_000  # twice as many as the deepest models that were ever published have
_MAX_NESTING = 64


def check_configuration(config: Mapping[str, Any], place: str, *, trust_remote_code: bool) -> None:
    """Raise Refusal for a configuration that names code of the hub without the user's consent, or more layers than any model has.

    transformers takes `owner/repo` as an implementation of attention for a kernel to download and run, and prefers the one in
    config.json to the one it is asked for. A model of a million layers takes hours to build.
    """
    for key, value in _entries(config):
        name = re.sub(r"(\.\d+)+$", "", key).rpartition(".")[2]  # that of the list which a number is in
        if _IMPLEMENTATION.fullmatch(name) and not trust_remote_code:
            _check_implementation(key, value, place, is_private=name.startswith("_"))
        if _LAYERS.fullmatch(name) and isinstance(value, int) and abs(value) > _MAX_LAYERS:
            raise Refusal(
                f"a model has at most {_MAX_LAYERS:,} layers; {place} states {key} {shown_number(value)}; correct it, or use "
                "another model"
            )


def shown_number(value: int) -> str:
    """A number for a message, which may be too long to write out."""
    return f"{value:,}" if abs(value) < 1 << 63 else "beyond 64 bits"


def _check_implementation(key: str, value: Any, place: str, *, is_private: bool) -> None:
    for chosen in value.values() if isinstance(value, dict) else [value]:
        if (isinstance(chosen, str) and "/" in chosen) or (is_private and chosen not in _PRIVATE_IMPLEMENTATIONS):
            raise Refusal(
                f"a model's own code runs only with your consent, and attlas chooses how attention is computed; {place} sets "
                f"{key} to {chosen!r}; remove the entry, or add --trust-remote-code if you trust it"
            )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The dotted keys and the values of an object and of those inside it."""
    level: list[tuple[str, Any]] = [("", config)]
    for _ in range(_MAX_NESTING):
        inner = [
            (f"{above}.{name}" if above else str(name), value)
            for above, entry in level
            for name, value in (entry.items() if isinstance(entry, Mapping) else enumerate(entry))
        ]
        yield from inner
        level = [(key, value) for key, value in inner if isinstance(value, Mapping | list)]
