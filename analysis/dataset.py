"""A finished dataset as LazyFrames: exactly the parts that its manifest names, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl
import polars.selectors as cs

from extract.schema import TABLES
from extract.store import Refusal, open_dataset, parts_of


@dataclass(frozen=True)
class Dataset:
    """The folder of a finished run and its manifest."""

    root: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Open a finished dataset; raises Refusal for an unfinished or foreign folder."""
        try:
            root, manifest = open_dataset(folder)
        except ValueError as error:
            if isinstance(error, Refusal):
                raise
            raise Refusal(
                f"manifest.json is JSON; {folder} holds one that is not ({error}); restore the file"
            ) from error
        if not isinstance(manifest.get("tables"), dict):
            raise Refusal(f"a manifest names its tables; the one in {folder} does not; restore the file")
        return cls(root, manifest)

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(self.manifest["tables"])

    def part_paths(self, table: str) -> list[Path]:
        """The files of a table; refuses a path that leaves the dataset, and a table that the run did not write."""
        if table not in self.manifest["tables"]:
            raise Refusal(f"this dataset has the tables {', '.join(self.tables)}; {table!r} is not one; choose another")
        paths = [PurePosixPath(part.path) for part in parts_of(self.manifest, table)]
        for path in paths:
            if path.is_absolute() or ".." in path.parts:
                raise Refusal(f"a part lies inside its dataset; the manifest names {str(path)!r}; restore the manifest")
        return [self.root / path for path in paths]

    def scan(self, table: str) -> pl.LazyFrame:
        """Rows of a table over all its parts; dictionary columns (stack, site, profile) as strings.

        A table of the contract that this run did not write (residual, for some models) has no rows.
        """
        if table in TABLES and table not in self.manifest["tables"]:
            return empty(table)
        paths = self.part_paths(table)
        for path in paths:
            if not path.is_file():
                raise Refusal(
                    f"a dataset has every part of its manifest; {path} is missing; run attlas verify {self.root}"
                )
        if not paths:
            return empty(table)
        return pl.scan_parquet(paths, glob=False, hive_partitioning=False).with_columns(
            cs.categorical().cast(pl.String)
        )


def empty(table: str) -> pl.LazyFrame:
    """A table of the contract without rows."""
    import pyarrow as pa

    frame = pl.from_arrow(pa.Table.from_batches([], TABLES[table].schema()))
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy().with_columns(cs.categorical().cast(pl.String))
