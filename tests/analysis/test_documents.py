"""Outlying and dropped documents, against NumPy from the rows that DuckDB reads."""

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

from attlas.analysis import dropped_documents, outlying_documents
from attlas.analysis.dataset import Dataset
from attlas.analysis.documents import COLUMNS, document_grouping, outliers_of
from attlas.analysis.entropy import layer_grouping
from attlas.analysis.summaries import summarize_together
from tests.analysis.synthetic import changed_copy, rewrite, write_dataset

ODD = 7  # the document that is unlike the others


def make_odd(rows: pl.DataFrame) -> pl.DataFrame:
    value = pl.when(pl.col("document_id") == ODD).then(0.99).otherwise(pl.col("mass_first") * 0.5)
    return rows.with_columns(mass_first=value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents, of which 1 is dropped and ODD puts nearly all of its attention on the first token."""
    place = tmp_path_factory.mktemp("documents")
    plain = write_dataset(place / "plain", documents=12, lengths=(20, 34))
    root = changed_copy(plain, place / "odd", make_odd)
    for part in sorted((root / "documents").iterdir()):
        rewrite(root, f"documents/{part.name}", lambda rows: _with_tags(rows))
    return root


def _with_tags(rows):
    place = rows.schema.get_field_index("source")
    names = [f"<script>{number}</script>" for number in rows["document_id"].to_pylist()]
    return rows.set_column(place, rows.schema.field(place), [names])


def means_by_hand(folder: Path, column: str) -> dict[int, float]:
    parts = [str(part) for part in sorted((folder / "heads").iterdir())]
    sql = f"SELECT document_id, SUM({column}::DOUBLE * query_rows) / SUM(query_rows) FROM read_parquet($1) GROUP BY 1"
    return dict(duckdb.execute(sql, [parts]).fetchall())


@pytest.mark.parametrize("column", COLUMNS)
def test_means_medians_and_scores_follow_from_the_rows(folder: Path, column: str) -> None:
    expected = means_by_hand(folder, column)
    values = np.array(list(expected.values()))
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    result = outlying_documents(Dataset.open(folder)).filter(column=column)
    assert result.height == len(expected) == 11
    for row in result.iter_rows(named=True):
        assert row["mean"] == pytest.approx(expected[row["document_id"]], rel=1e-12)
        assert row["median"] == pytest.approx(median, rel=1e-12)
        assert row["score"] == pytest.approx(0.6745 * (row["mean"] - median) / mad, rel=1e-9)
        assert row["is_outlier"] == (abs(row["score"]) > 3.5)


def test_a_document_unlike_the_others_comes_first_by_its_name(folder: Path) -> None:
    first = outlying_documents(Dataset.open(folder)).row(0, named=True)
    assert (first["column"], first["document_id"], first["is_outlier"]) == ("mass_first", ODD, True)
    assert first["source"] == f"<script>{ODD}</script>"


def test_rows_and_tokens_are_those_of_the_document(folder: Path) -> None:
    dataset = Dataset.open(folder)
    rows = dataset.scan("heads").group_by("document_id").agg(pl.col("query_rows").cast(pl.Int64).sum()).collect()
    tokens = dataset.scan("documents").select("document_id", "content_tokens").collect()
    result = outlying_documents(dataset).filter(column="mass_first").sort("document_id")
    assert result["rows"].to_list() == rows.sort("document_id")["query_rows"].to_list()
    assert result.select("document_id", "content_tokens").rows() == tokens.filter(pl.col("document_id") != 1).rows()


def test_documents_share_a_pass_with_other_groupings(folder: Path) -> None:
    dataset = Dataset.open(folder)
    layers, documents = summarize_together(dataset, "heads", [layer_grouping(), document_grouping(dataset)])
    assert outliers_of(dataset, documents).equals(outlying_documents(dataset))
    (alone,) = summarize_together(dataset, "heads", [layer_grouping()])
    assert layers.collect().equals(alone.collect())


@pytest.mark.parametrize("shard_sequences", (1, 5, 1000))
def test_shards_make_no_difference(tmp_path: Path, shard_sequences: int) -> None:
    dataset = Dataset.open(
        write_dataset(tmp_path / "data", documents=8, lengths=(20, 34), shard_sequences=shard_sequences)
    )
    result = outlying_documents(dataset).filter(column="mass_first")
    expected = means_by_hand(tmp_path / "data", "mass_first")
    found = dict(result.select("document_id", "mean").rows())
    assert found == pytest.approx(expected, rel=1e-12)


def test_short_documents_have_a_mean_but_no_score(tmp_path: Path) -> None:
    result = outlying_documents(Dataset.open(write_dataset(tmp_path / "short", documents=9, lengths=(5, 14))))
    is_short = result["content_tokens"] < 16
    assert is_short.any() and not is_short.all()
    assert result.filter(is_short)["score"].null_count() == is_short.sum()
    assert result["mean"].null_count() == 0
    medians = result.filter(~is_short).group_by("column").agg(expected=pl.col("mean").median())
    joined = result.join(medians, on="column")
    assert joined["median"].to_list() == joined["expected"].to_list()


def test_one_document_is_no_outlier(tmp_path: Path) -> None:
    result = outlying_documents(Dataset.open(write_dataset(tmp_path / "one", documents=1, lengths=(20, 34))))
    assert result["document_id"].unique().to_list() == [0]
    assert result["score"].null_count() == result.height
    assert not result["is_outlier"].any()


def test_dropped_documents_are_listed_with_the_reason(folder: Path) -> None:
    assert dropped_documents(Dataset.open(folder)).rows() == [(1, "<script>1</script>", 0, "empty")]
