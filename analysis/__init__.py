"""Parquet to answers: what the heads and the residual stream of a measured model do, with intervals.

`find_defects`, `find_findings` and `head_kinds` take a dataset, as `attlas.open_dataset` gives it, and return Polars frames.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attlas.analysis.defects import find_defects as find_defects
    from attlas.analysis.findings import find_findings as find_findings
    from attlas.analysis.kinds import head_kinds as head_kinds

__all__ = ["find_defects", "find_findings", "head_kinds"]

_PLACES = {"find_defects": "defects", "find_findings": "findings", "head_kinds": "kinds"}


def __getattr__(name: str) -> Any:
    """A public function, with the libraries behind it, at its first use."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
