"""Comparison of tables that were measured on two devices, or in other batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# the place of the largest of several numbers: equal ones may change places by rounding
_PLACES = ("received_max_key", "outlier_dim")
_HISTOGRAMS = ("entropy", "max_weight", "token_norm", "massive")
_OTHER_PLACES = 0.02


def read_tables(dataset: Path) -> dict[str, pa.Table]:
    """The tables of a dataset."""
    folders = sorted({file.parent for file in dataset.glob("*/*.parquet")})
    return {
        folder.name: pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("*.parquet")))
        for folder in folders
    }


def assert_tables_agree(
    got: Mapping[str, pa.Table], expected: Mapping[str, pa.Table], *, absolute: float = 2e-4, relative: float = 1e-3
) -> None:
    """Every column of every table: keys and counts the same, places nearly always, numbers within a tolerance."""
    assert got.keys() == expected.keys()
    wrong = []
    for name, table in expected.items():
        if name in ("profiles", "residual_profiles"):
            wrong += _profile_differences(got[name], table, relative=relative)
            continue
        assert got[name].column_names == table.column_names
        assert got[name].num_rows == table.num_rows, name
        assert table.num_rows > 0 or name == "compositions", f"{name}: only compositions need several layers"
        wrong += [
            f"{name}.{column}: {difference}"
            for column in table.column_names
            if (difference := _difference(column, got[name][column], table[column], absolute, relative))
        ]
    assert not wrong, "; ".join(wrong)


def _difference(
    name: str, got: pa.ChunkedArray, expected: pa.ChunkedArray, absolute: float, relative: float
) -> str | None:
    """How two columns differ; None if they agree."""
    if name in _PLACES:
        others = np.sum(_numbers(got) != _numbers(expected))
        return None if others <= max(1, _OTHER_PLACES * len(got)) else f"{others} of {len(got)} in other places"
    if not pa.types.is_floating(expected.type):
        return None if got.to_pylist() == expected.to_pylist() else "differs"
    a, b = _numbers(got), _numbers(expected)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return "null in other rows"
    off = np.nan_to_num(np.abs(a - b) - relative * np.abs(b))
    worst = off.argmax()
    return None if off[worst] <= absolute else f"{a[worst]:.7g}, not {b[worst]:.7g}, in row {worst}"


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.float64)


def _profile_differences(got: pa.Table, expected: pa.Table, *, relative: float) -> list[str]:
    """Sums by bin; a row that is near the edge of a bin may be counted in the next one."""
    a, b = _sums(got), _sums(expected)
    wrong = []
    for name in sorted({key[0] for key in b}):
        keys = [key for key in {*a, *b} if key[0] == name]
        off = np.array([abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in keys])
        total = sum(b.get(key, 0.0) for key in keys)
        if name in _HISTOGRAMS and off.sum() > 0.01 * total:
            wrong.append(f"profiles {name}: {off.sum():.0f} of {total:.0f} rows in other bins")
        largest = max(b.get(key, 0.0) for key in keys)
        if name not in _HISTOGRAMS and off.max() > relative * largest:
            wrong.append(f"profiles {name}: off by {off.max():.3g}")
    return wrong if {key[0] for key in a} == {key[0] for key in b} else [*wrong, "profiles: other names"]


def _sums(table: pa.Table) -> dict[tuple[str, ...], float]:
    place = "head" if "head" in table.column_names else "site"
    columns = [table[name].to_pylist() for name in ("profile", "stack", "layer", place, "bin", "sum")]
    sums: dict[tuple[str, ...], float] = {}
    for *key, value in zip(*columns, strict=True):
        sums[tuple(key)] = sums.get(tuple(key), 0.0) + value
    return sums
