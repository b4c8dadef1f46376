"""Engines: the same primitives in several ways. An engine takes an `AttentionCall` and gives `Rows`, never a whole pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from extract.errors import Refusal

if TYPE_CHECKING:
    from extract.engines.rows import AttentionCall, Rows

Engine = Callable[["AttentionCall"], "Rows"]


def _reference() -> Engine:
    from extract.engines.reference import rows

    return rows


_ENGINES: Mapping[str, Callable[[], Engine]] = {"reference": _reference}


def choose(name: str) -> tuple[str, Engine]:
    """The engine of that name and what it is called in the manifest; `auto` takes the fastest that runs here."""
    chosen = "reference" if name == "auto" else name
    if chosen not in _ENGINES:
        raise Refusal(f"an engine is one of auto, {', '.join(_ENGINES)}; got {name!r}; choose one of them")
    return chosen, _ENGINES[chosen]()
