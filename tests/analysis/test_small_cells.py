"""Numbers of few documents: none is shown where a reader must learn nothing of single ones."""

import json
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from attlas.analysis.compare import compare
from attlas.analysis.dataset import Dataset
from attlas.analysis.distance import offset_profile
from attlas.analysis.documents import dropped_documents, outlying_documents
from attlas.analysis.entropy import entropy_by_length, entropy_by_position
from attlas.analysis.export import export
from attlas.analysis.report import report
from attlas.analysis.report.content import gather
from attlas.analysis.trend import trend
from attlas.extract.store import Refusal
from tests.analysis.synthetic import changed_copy, write_dataset
from tests.conftest import Ended

LEAST = 3


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine measured documents of very different lengths, in shards of two sequences."""
    return write_dataset(tmp_path_factory.mktemp("small") / "d", documents=10, shard_sequences=2, lengths=(5, 90))


@pytest.fixture(scope="module")
def longest(unequal: Path) -> np.ndarray:
    """The longest sequence of each document, the longest first."""
    rows = pl.read_parquet(unequal / "sequences" / "*.parquet")
    return rows.group_by("document_id").agg(pl.col("tokens").max())["tokens"].sort(descending=True).to_numpy()


def test_means_of_fewer_documents_say_only_that(unequal: Path) -> None:
    before, after = (entropy_by_length(Dataset.open(unequal, min_documents=least)) for least in (1, LEAST))
    is_few = before["documents"] < LEAST
    assert 0 < is_few.sum() < before.height
    hidden = after.filter(is_few)
    assert set(hidden["note"]) == {"fewer than 3 documents: not shown"}
    numbers = [name for name in hidden.columns if name.startswith(("entropy", "attended", "max_weight", "documents"))]
    assert hidden.select(pl.col(numbers).is_null().all()).row(0) == (True,) * len(numbers)
    assert_frame_equal(after.filter(~is_few), before.filter(~is_few))


def test_positions_and_distances_that_few_documents_reach_are_left_out(unequal: Path, longest: np.ndarray) -> None:
    least = 6
    everything, shown = Dataset.open(unequal), Dataset.open(unequal, min_documents=least)
    for profile in (entropy_by_position, offset_profile):
        before, after = (profile(dataset).collect() for dataset in (everything, shown))
        nearest = pl.min_horizontal(pl.col("low").abs(), pl.col("high").abs())
        reaching = before.select(nearest.map_elements(lambda d: int((longest > d).sum()), pl.Int64)).to_series()
        assert reaching.min() < least
        assert_frame_equal(after, before.filter(reaching >= least))


def test_the_report_names_no_single_document(unequal: Path, longest: np.ndarray) -> None:
    dataset = Dataset.open(unequal, min_documents=LEAST)
    assert outlying_documents(dataset).is_empty() and dropped_documents(dataset).is_empty()
    content = gather(dataset)
    shortest = pl.read_parquet(unequal / "sequences" / "*.parquet").group_by("document_id").agg(pl.col("tokens").min())
    assert content.sequence_tokens == (shortest["tokens"].sort()[LEAST - 1], longest[LEAST - 1])
    page = report(unequal, min_documents=LEAST).html
    assert "No numbers of fewer than 3 documents are shown, and so none of single ones." in page
    assert "some for reasons of few documents" in page
    sources = pl.read_parquet(unequal / "documents" / "*.parquet")["source"].to_list()
    assert [source for source in sources if source and f">{source}<" in page] == []
    numbers = json.dumps(report(unequal, min_documents=LEAST).numbers())
    assert [source for source in sources if source and f'"{source}"' in numbers] == []


@pytest.fixture(scope="module")
def partial(unequal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an entropy of two documents only at one head."""
    is_rare = (pl.col("layer") == 1) & (pl.col("head") == 2) & (pl.col("document_id") > 2)
    return changed_copy(
        unequal,
        tmp_path_factory.mktemp("small") / "partial",
        lambda rows: rows.with_columns(entropy_nats=pl.when(~is_rare).then("entropy_nats")),
    )


@pytest.mark.parametrize(
    ("match", "is_paired"), [("place", True), ("place", False), ("heads", False), ("depth", False)]
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_comparison_leaves_out_what_few_documents_of_either_side_have(
    unequal: Path, partial: Path, match: str, monkeypatch: pytest.MonkeyPatch, *, is_paired: bool, is_first: bool
) -> None:
    if not is_paired:
        monkeypatch.setattr("attlas.analysis.compare.same_documents", lambda *_: None)

    def compared(least: int) -> pl.DataFrame:
        sides = (unequal, partial) if is_first else (partial, unequal)
        found = compare(*sides, columns=["entropy_nats", "mass_first"], match=match, min_documents=least)
        assert found.is_paired == is_paired
        return found.rows

    place = [name for name in ("stack", "depth", "layer", "head", "column") if name in compared(1).columns]
    everything, shown = (compared(least).sort(place) for least in (1, LEAST))
    # a band of depth has the other heads of its layer
    has_few = pl.lit(match != "depth") & (pl.col("layer") == 1) & (pl.col("head") == 2)
    hidden = everything.filter(has_few & (pl.col("column") == "entropy_nats"))
    assert hidden.height == (match != "depth")
    numbers = (*place, "a", "b", "difference")
    assert_frame_equal(shown.select(numbers), everything.join(hidden, on=place, how="anti").sort(place).select(numbers))


def test_a_trend_does_not_show_them_either(unequal: Path, partial: Path) -> None:
    found = trend([unequal, partial], columns=["entropy_nats"], min_documents=LEAST)
    of_head = found.rows.filter(layer=1, head=2).sort("step")
    assert of_head["estimate"].is_null().to_list() == [False, True]
    assert found.changes.filter(layer=1, head=2).is_empty() and found.changes.height == 7


@pytest.mark.parametrize("least", [2, 3, 4, 9])
def test_an_export_pools_so_many_documents(unequal: Path, tmp_path: Path, least: int) -> None:
    found = pl.read_csv(export(unequal, tmp_path / "x.csv", columns=["entropy_nats"], min_documents=least))
    assert found.columns[:4] == ["group", "documents", "sequences", "tokens"] and "source" not in found.columns
    sql = f"""
    WITH numbered AS (
      SELECT document_id, row_number() OVER (ORDER BY document_id) - 1 AS number FROM '{unequal}/documents/*.parquet' WHERE sequences > 0
    ), units AS (
      SELECT document_id, least(number // {least}, (SELECT count(*) FROM numbered) // {least} - 1) AS unit FROM numbered
    )
    SELECT unit, layer, head, sum(entropy_nats::DOUBLE * query_rows) / sum(query_rows) AS value, count(DISTINCT document_id) AS documents
    FROM '{unequal}/heads/*.parquet' JOIN units USING (document_id) WHERE entropy_nats IS NOT NULL GROUP BY ALL ORDER BY ALL
    """
    with duckdb.connect() as connection:
        expected = connection.sql(sql).pl()
    assert found["documents"].min() == least == expected["documents"].min() or found["documents"].min() > least
    assert found.select("group", "layer", "head").rows() == expected.select("unit", "layer", "head").rows()
    assert found["value"].to_numpy() == pytest.approx(expected["value"].to_numpy(), rel=1e-12)
    assert found["documents"].to_list() == expected["documents"].to_list()


def test_a_mean_of_a_group_that_few_have_a_value_for_is_left_out(unequal: Path, tmp_path: Path) -> None:
    found = pl.read_parquet(export(unequal, tmp_path / "x.parquet", min_documents=LEAST))
    rows = pl.read_parquet(unequal / "heads" / "*.parquet").filter(pl.col("query_rows") > 0)
    measured = (
        pl.read_parquet(unequal / "documents" / "*.parquet").filter(pl.col("sequences") > 0)["document_id"].sort()
    )
    unit = {document: min(i // LEAST, len(measured) // LEAST - 1) for i, document in enumerate(measured)}
    units = rows.with_columns(unit=pl.col("document_id").replace_strict(unit))
    for column in found["column"].unique():
        known = units.filter(pl.col(column).is_not_null(), pl.col(column).cast(pl.Float64).is_finite())
        counts = known.group_by("unit", "layer", "head").agg(pl.col("document_id").n_unique())
        enough = counts.filter(pl.col("document_id") >= LEAST).select("unit", "layer", "head").sort(pl.all())
        of_column = found.filter(pl.col("column") == column).select("group", "layer", "head").sort(pl.all())
        assert of_column.rows() == enough.rows(), column


@pytest.mark.parametrize(("least", "words"), [(0, "got 0"), (10, "9 in .*; got 10")])
def test_the_number_is_one_that_the_dataset_has(unequal: Path, least: int, words: str) -> None:
    with pytest.raises(
        Refusal, match=f"--min-documents is at least 1 and at most the number of measured documents, .*{words}"
    ):
        Dataset.open(unequal, min_documents=least)


def test_rows_of_single_sequences_are_refused(unequal: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="the rows of a mixed model are of single sequences"):
        export(unequal, tmp_path / "x.csv", mixed_model="entropy_nats", min_documents=2)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_take_it(attlas, unequal: Path, tmp_path: Path) -> None:
    ended: Ended = attlas(
        "report", unequal, "--format", "json", "--min-documents", "3", "--output", tmp_path / "n.json"
    )
    assert ended[0] == 0, ended
    assert json.loads((tmp_path / "n.json").read_text())["outlying_documents"] == []
    assert attlas("export", unequal, "--output", tmp_path / "x.csv", "--min-documents", "3")[0] == 0
    assert "group" in pl.read_csv(tmp_path / "x.csv").columns
    compared = tmp_path / "c.json"
    assert attlas("report", unequal, unequal, "--format", "json", "--min-documents", "3", "--output", compared)[0] == 0
    assert "Numbers of fewer than 3 documents are not shown." in json.loads(compared.read_text())["notes"]
    for command in ("compare", "trend"):
        code, out, _ = attlas(command, unequal, unequal, "--min-documents", "3")
        assert code == 0 and "Numbers of fewer than 3 documents are not shown." in " ".join(out.split())
        assert attlas(command, unequal, unequal, "--min-documents", "10")[0] == 2
