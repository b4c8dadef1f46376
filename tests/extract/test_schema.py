"""Counts are as wide as their sums: what a user adds up does not wrap."""

import re
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.tables import TABLES

README = Path(__file__).parents[2] / "README.md"
COUNTS = {
    "documents": ("characters", "content_tokens", "sequences"),
    "sequences": ("tokens", "special_tokens"),
    "heads": ("query_rows", "masked_rows", "nonfinite_rows"),
}
INDICES = ("window", "first_token", "received_max_key", "outlier_dim", "max_abs_token", "max_key", "key", "shard")
MANY = 1_500_000_000  # two of them are beyond 2³¹


def columns():
    return [(table, column) for table in TABLES.values() for column in table.columns if column.dtype.startswith("int")]


@pytest.mark.parametrize("table", COUNTS)
def test_counts_have_64_bits(table):
    schema = TABLES[table].schema()
    assert {schema.field(name).type for name in COUNTS[table]} == {pa.int64()}


def test_every_narrower_integer_is_an_index_or_part_of_a_key():
    narrow = {c.name for table, c in columns() if c.dtype != "int64" and c not in table.keys}
    assert narrow <= set(INDICES)


@pytest.mark.parametrize(("table", "column"), [(t, c) for t, names in COUNTS.items() for c in names])
def test_a_sum_of_counts_does_not_wrap(table, column):
    kind = TABLES[table].schema().field(column).type
    rows = pl.Series(pa.array([MANY, MANY, MANY], kind))
    assert rows.sum() == 3 * MANY
    assert pl.DataFrame({"rows": rows}).lazy().select(pl.col("rows").sum()).collect().item() == 3 * MANY


def test_the_weighted_mean_of_the_readme_is_right_on_more_rows_than_32_bits_count(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(import polars as pl\n.*?)```", README.read_text(), re.DOTALL)
    schema = TABLES["heads"].schema()
    kind = schema.field("query_rows").type
    entropies = [1.0, 2.0, 4.0, 8.0]
    table = pa.table(
        {
            "layer": pa.array([0] * 4, pa.int16()),
            "head": pa.array([0] * 4, pa.int16()),
            "entropy_nats": pa.array(entropies, pa.float32()),
            "query_rows": pa.array([MANY] * 4, kind),
        }
    )
    folder = tmp_path / "data" / "demo" / "heads"
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "part.parquet")
    monkeypatch.chdir(tmp_path)
    *lines, last = snippet.strip().splitlines()
    names: dict = {}
    exec("\n".join([*lines, f"answer = {last}"]), names)
    assert names["answer"]["entropy"].to_list() == [pytest.approx(sum(entropies) / 4)]
