"""The lines of code that open a dataset in other software: Polars, DuckDB, pandas, `datasets` and R."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attlas.analysis.dataset import Dataset
from attlas.extract.printable import printable
from attlas.extract.store import LocalFolder, Location, Refusal, generations

# DuckDB's extension and kind of secret for an object store
_EXTENSIONS = {
    "s3": ("httpfs", "s3"),
    "s3a": ("httpfs", "s3"),
    "gs": ("httpfs", "gcs"),
    "az": ("azure", "azure"),
    "abfss": ("azure", "azure"),
}


# the keys of each table's parts, where its folder has others besides; None where it has not
Tables = Mapping[str, Sequence[str] | None]


@dataclass(frozen=True)
class Tool:
    """Software that reads Parquet: the heading of its lines, and a function that makes them of the dataset's root and tables."""

    heading: str
    lines: Callable[[str, Tables], list[str]]


def _polars(root: str, tables: Tables) -> list[str]:
    return ["import polars as pl", *(f"{table} = pl.scan_parquet({_files(root, tables, table)!r})" for table in tables)]


def _duckdb(root: str, tables: Tables) -> list[str]:
    extension, secret = _EXTENSIONS.get(_scheme(root), ("", ""))
    setup = [f"INSTALL {extension};", f"LOAD {extension};"] if extension else []
    setup += [f"CREATE SECRET (TYPE {secret}, PROVIDER credential_chain);"] if extension else []
    views = (f"CREATE VIEW {table} AS FROM read_parquet({_sql(_files(root, tables, table))});" for table in tables)
    return [*setup, *views]


def _pandas(root: str, tables: Tables) -> list[str]:
    return [
        "import pandas as pd",
        *(f"{table} = pd.read_parquet({_folder(root, tables, table)!r})" for table in tables),
    ]


def _datasets(root: str, tables: Tables) -> list[str]:
    return [
        "from datasets import load_dataset",
        *(
            f'{table} = load_dataset("parquet", data_files={_files(root, tables, table)!r}, split="train")'
            for table in tables
        ),
    ]


def _r(root: str, tables: Tables) -> list[str]:
    return [
        "library(arrow)",
        *(f"{table} <- open_dataset({_r_text(_folder(root, tables, table))})" for table in tables),
    ]


TOOLS = {
    "polars": Tool("# Polars: lazy frames", _polars),
    "duckdb": Tool("-- DuckDB: views, in SQL", _duckdb),
    "pandas": Tool("# pandas: frames, in memory", _pandas),
    "datasets": Tool("# datasets of Hugging Face", _datasets),
    "r": Tool("# R, with the package arrow: data sets for dplyr", _r),
}


def opening_lines(location: Location, tool: str | None = None) -> list[str]:
    """The lines for all tools, or for one, that open every table of a dataset from any current folder.

    Raises Refusal if there is no dataset, or its place can't be written in a program's text.
    """
    if tool is not None and tool not in TOOLS:
        raise Refusal(f"--tool must be one of {', '.join(TOOLS)}; got {tool!r}; choose one of them")
    dataset = Dataset.open(location)
    root = _root(dataset)
    has_others = generations(dataset.storage) != [1]
    tables = {name: [part.path for part in dataset.parts(name)] if has_others else None for name in dataset.tables}
    if tool is not None:
        return TOOLS[tool].lines(root, tables)
    lines: list[str] = []
    for each in TOOLS.values():
        lines += [*([""] if lines else []), each.heading, *each.lines(root, tables)]
    return lines


def _root(dataset: Dataset) -> str:
    place = dataset.storage.place()
    if isinstance(dataset.storage, LocalFolder):
        place = str(Path(place).absolute())
    if printable(place) != place:
        raise Refusal(
            f"a path in a program's text has no control characters and is valid text; {printable(place)} is not; rename the folder"
        )
    return place.rstrip("/")


def _scheme(root: str) -> str:
    return root.partition("://")[0] if "://" in root else ""


def _folder(root: str, tables: Tables, table: str) -> str | list[str]:
    """The folder of a table, or its parts if there are others in it."""
    parts = tables[table]
    return f"{root}/{table}" if parts is None else [f"{root}/{part}" for part in parts]


def _files(root: str, tables: Tables, table: str) -> str | list[str]:
    """A pattern for the parts of a table, in which only the star before .parquet is special; or its parts."""
    scheme, separator, path = root.rpartition("://")
    place, parts = f"{scheme}{separator}{glob.escape(path)}", tables[table]
    return f"{place}/{table}/*.parquet" if parts is None else [f"{place}/{part}" for part in parts]


def _sql(text: str | list[str]) -> str:
    if isinstance(text, list):
        return f"[{', '.join(map(_sql, text))}]"
    return "'" + text.replace("'", "''") + "'"


def _r_text(text: str | list[str]) -> str:
    if isinstance(text, list):
        return f"c({', '.join(map(_r_text, text))})"
    return json.dumps(text, ensure_ascii=False)
