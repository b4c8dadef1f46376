"""Corpus and model in, Parquet out. `measure` is the entry point for notebooks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attlas.extract.measurement import measure as measure

__all__ = ["measure"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; readers of the schema and the store do not need it
    if name == "measure":
        from attlas.extract.measurement import measure

        return measure
    raise AttributeError(f"module 'attlas.extract' has no attribute {name!r}")
