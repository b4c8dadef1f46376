"""Engines: the same primitives in several ways. An engine makes one attention call: its output and its `Rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from extract.errors import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from extract.engines.rows import AttentionCall, Rows

# the second argument makes the call as the model would, for an engine that leaves the output to it
Engine = Callable[["AttentionCall", Callable[[], "Tensor"]], "tuple[Tensor, Rows]"]


def _reference() -> Engine:
    from extract.engines.reference import attend

    return attend


def _cpu() -> Engine:
    from extract.engines.cpu import attend

    return attend


_ENGINES: Mapping[str, Callable[[], Engine]] = {"reference": _reference, "cpu": _cpu}


def choose(name: str, *, device: str = "cpu") -> tuple[str, Engine]:
    """The engine of that name and what it is called in the manifest; `auto` takes the fastest that runs there."""
    chosen = ("cpu" if device == "cpu" else "reference") if name == "auto" else name
    if chosen not in _ENGINES:
        raise Refusal(f"an engine is one of auto, {', '.join(_ENGINES)}; got {name!r}; choose one of them")
    if chosen == "cpu" and device != "cpu":
        raise Refusal(f"the cpu engine measures on the CPU; the device is {device}; use --engine auto or --device cpu")
    return chosen, _ENGINES[chosen]()
