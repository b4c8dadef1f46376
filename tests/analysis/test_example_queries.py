"""Every example query runs on every dataset that has its columns, and says which are missing otherwise."""

import io
import re
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.example_queries import EXAMPLES, examples_table, write_examples
from attlas.analysis.heads import head_estimates
from attlas.analysis.query import query
from attlas.analysis.views import VIEWS, statement
from attlas.extract.tables import TABLES

BY_NAME = {example.name: example for example in EXAMPLES}
MAY_BE_EMPTY = {"dropped-documents"}


def answer(location: Path, name: str) -> pl.DataFrame:
    frame = pl.from_arrow(query(location, BY_NAME[name].sql))
    assert isinstance(frame, pl.DataFrame)
    return frame


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
@pytest.mark.parametrize("dataset", ["folder", "encoder_run", "causal_run"])
def test_an_example_has_an_answer(request: pytest.FixtureRequest, dataset: str, example) -> None:
    location = request.getfixturevalue(dataset)
    lacking = example.lacks(Dataset.open(location))
    if dataset == "folder" and lacking:  # synthetic datasets have fewer tables
        assert set(lacking) <= {"pairs", "layers"}
        return
    assert lacking == []
    rows = query(location, example.sql).num_rows
    assert rows > 0 or (example.name in MAY_BE_EMPTY and dataset != "encoder_run")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_columns_that_an_example_needs_are_those_that_it_reads(folder: Path, example) -> None:
    def binds(columns: dict[str, set[str]]) -> bool:
        with duckdb.connect() as connection:
            for table, names in columns.items():
                keys = {c.name for c in TABLES[table].keys}
                schema = TABLES[table].schema()
                empty = schema.empty_table().select([n for n in schema.names if n in keys | names])
                connection.register(table, empty)
            for view in VIEWS:
                if set(view.tables) <= columns.keys():
                    connection.execute(statement(view, Dataset.open(folder)))
            try:
                connection.sql(f"EXPLAIN {example.sql}").fetchall()
            except duckdb.BinderException:
                return False
        return True

    needs: dict[str, set[str]] = {table: set() for table in ("documents", "sequences")}
    for need in example.needs:
        table, column = need.split(".")
        needs.setdefault(table, set()).add(column)
    needs["documents"].add("source")  # of the view
    assert binds(needs)
    for need in example.needs:
        table, column = need.split(".")
        if need != "documents.source":
            assert not binds({t: names - {column} if t == table else names for t, names in needs.items()}), need


def test_means_and_errors_equal_the_estimates_of_the_analysis(folder: Path) -> None:
    ours = head_estimates(Dataset.open(folder), ["entropy_nats"]).sort("layer", "head")
    found = answer(folder, "means-and-errors").sort("layer", "head")
    pairs = {"entropy_nats": "estimate", "standard_error": "se", "effective_documents": "effective_documents"}
    for column, name in pairs.items():
        assert found[column].to_numpy() == pytest.approx(ours[name].to_numpy(), rel=1e-9)
    assert found["documents"].to_list() == ours["documents"].to_list()


def test_means_weigh_sequences_by_their_rows(folder: Path) -> None:
    ours = head_estimates(Dataset.open(folder), ["mass_previous"]).sort("estimate", descending=True)
    found = answer(folder, "previous-token-heads")
    assert found["mass_previous"].to_numpy() == pytest.approx(ours["estimate"].to_numpy(), rel=1e-6)


def test_the_shares_of_token_classes_of_a_layer_add_up_to_one(folder: Path) -> None:
    found = answer(folder, "attention-by-class").select(pl.sum_horizontal(pl.selectors.starts_with("mass_")))
    assert found.to_series().to_numpy() == pytest.approx(np.ones(2), abs=1e-4)


def test_attention_by_distance_adds_up_to_one_in_bins_that_do_not_overlap(causal_run: Path) -> None:
    found = answer(causal_run, "attention-by-distance")
    assert found["attention"].sum() == pytest.approx(1) and found["pairs"].sum() == pytest.approx(1)
    ends = found.select(
        low=pl.min_horizontal("distance", "to_distance"), high=pl.max_horizontal("distance", "to_distance")
    )
    assert (ends["low"][1:] == ends["high"][:-1] + 1).all()
    assert ends["high"][-1] == 0, "a causal model looks back"


def test_the_document_that_was_dropped_is_named_with_the_reason(encoder_run: Path) -> None:
    assert answer(encoder_run, "dropped-documents").select("document_id", "dropped_reason").rows() == [(1, "empty")]


def test_a_dataset_that_lacks_a_table_or_a_column_is_told_so(folder: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    write_examples(folder, "table", stream)
    text = stream.getvalue().decode()
    assert text.count("-- this dataset lacks ") == 2
    assert "-- this dataset lacks pairs\n" in text and "-- this dataset lacks layers\n" in text
    lacks = dict(zip(*(examples_table(Dataset.open(folder))[c].to_pylist() for c in ("name", "lacks")), strict=True))
    assert lacks["redundant-heads"] == ["pairs"] and lacks["sharpest-heads"] == []


def test_examples_are_text_that_the_duckdb_shell_would_run() -> None:
    stream = io.BytesIO()
    write_examples(None, "table", stream)
    statements = duckdb.extract_statements(stream.getvalue().decode())
    assert len(statements) == len(EXAMPLES)
    assert all(statement.type == duckdb.StatementType.SELECT for statement in statements)


def test_a_named_head_has_its_source_its_model_and_the_columns_of_heads(folder: Path) -> None:
    found = query(folder, "SELECT * FROM heads_named WHERE head_name = 'L1H2' ORDER BY sequence_id")
    heads = query(folder, "SELECT * FROM heads WHERE layer = 1 AND head = 2 ORDER BY sequence_id")
    assert found.column_names == ["model", "source", "head_name", *heads.column_names]
    assert found.select(heads.column_names).equals(heads)
    assert set(found["model"].to_pylist()) == {"known patterns"}
    assert found["source"].to_pylist() == [f"made-up:{number}" for number in heads["document_id"].to_pylist()]


def test_a_named_site_has_its_source_and_its_model(folder: Path) -> None:
    found = query(folder, "SELECT DISTINCT site_name FROM residual_named ORDER BY ALL")["site_name"].to_pylist()
    assert found == ["L0 attention", "L0 embedding", "L0 mlp", "L1 attention", "L1 final_norm", "L1 mlp"]
    rows = query(folder, "SELECT COUNT(*) AS rows FROM residual_named").to_pylist()
    assert rows == query(folder, "SELECT COUNT(*) AS rows FROM residual").to_pylist()


def test_views_are_no_part_of_the_dataset(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert not {"heads_named", "residual_named"} & {*dataset.tables, *(path.name for path in folder.iterdir())}
    assert {"heads_named", "residual_named"} <= set(query(folder, "SHOW TABLES")["name"].to_pylist())


def test_a_view_is_absent_where_its_table_is(tmp_path: Path, folder: Path) -> None:
    import json
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["tables"]["residual"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert query(copy, "SELECT head_name FROM heads_named").num_rows > 0
    with pytest.raises(Exception, match="residual_named does not exist"):
        query(copy, "SELECT * FROM residual_named")


def test_a_models_name_is_text_in_a_view_whatever_it_holds(tmp_path: Path) -> None:
    from tests.analysis.synthetic import write_dataset

    name = "it's {model}'; DROP VIEW heads; --"
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, model_name=name)
    found = query(root, "SELECT DISTINCT model FROM heads_named")["model"].to_pylist()
    assert found == [name]


@pytest.mark.parametrize("sql", ["SELECT * FROM heads_named", "SELECT source FROM Heads_Named"])
def test_a_view_of_a_damaged_part_names_the_part(tmp_path: Path, sql: str) -> None:
    from attlas.extract.store import Refusal
    from tests.analysis.synthetic import write_dataset

    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2)
    part = root / "documents" / "shard-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(Refusal, match=re.escape("documents/shard-00000.parquet")):
        query(root, sql)
    assert query(root, "SELECT COUNT(*) AS n FROM residual")["n"].to_pylist() != [0]
