"""The atlas of attention: exact statistics of every attention head and every residual update, as Parquet.

`measure` takes one batch through any model, `run` a whole corpus. What a run left is opened with `open_dataset`, asked with `query`, checked with
`verify`, compared with another by `compare`, followed through a series by `trend`, written for statistics software by `export`, and
shown with `report`. `view` shows one input and every head.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attlas.analysis.compare import compare as compare
    from attlas.analysis.dataset import Dataset as _Dataset
    from attlas.analysis.export import export as export
    from attlas.analysis.query import query as query
    from attlas.analysis.report import report as report
    from attlas.analysis.trend import trend as trend
    from attlas.analysis.verify import verify as verify
    from attlas.extract import measure as measure
    from attlas.extract.run import run as run
    from attlas.extract.view import view as view

    open_dataset = _Dataset.open
    __version__: str

__all__ = ["compare", "export", "measure", "open_dataset", "query", "report", "run", "trend", "verify", "view"]

_PLACES = {
    "compare": "attlas.analysis.compare:compare",
    "export": "attlas.analysis.export:export",
    "measure": "attlas.extract:measure",
    "open_dataset": "attlas.analysis.dataset:Dataset.open",
    "query": "attlas.analysis.query:query",
    "report": "attlas.analysis.report:report",
    "run": "attlas.extract.run:run",
    "trend": "attlas.analysis.trend:trend",
    "verify": "attlas.analysis.verify:verify",
    "view": "attlas.extract.view:view",
}


def __getattr__(name: str) -> Any:
    """A public name, with the libraries behind it (torch, Polars, DuckDB), which take seconds to import."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("attlas")
    elif name in _PLACES:
        from pkgutil import resolve_name

        value = resolve_name(_PLACES[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next time it is there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
