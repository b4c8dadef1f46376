"""A table is a module, and a row quantity a record, a function and a column: toys of each kind, from end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from attlas.analysis.query import query
from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.dictionary import data_dictionary
from attlas.extract.engines import reference
from attlas.extract.engines.quantities import ROW_QUANTITIES, RowQuantity
from attlas.extract.errors import Refusal
from attlas.extract.options import RunOptions
from attlas.extract.tables import TABLES
from attlas.extract.tables.column import column
from tests.extract.models import eager_patterns
from tests.extract.runs import complete_run
from tests.extract.toys import additive, dense, ragged, static

TOYS = {module.TABLE.name: module.TABLE for module in (dense, ragged, additive, static)}


def add_toys(patch: pytest.MonkeyPatch) -> None:
    for name, table in TOYS.items():
        patch.setitem(TABLES, name, table)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    add_toys(monkeypatch)


def run(tmp_path: Path, **options) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("A table is a module. " * 30)
    chosen = {"model": "demo", "corpus": str(text), "max_length": 24, "shard_sequences": 3, "device": "cpu", **options}
    complete_run(RunOptions(out=tmp_path / "out", **chosen))
    return tmp_path / "out"


def rows(dataset: Path, table: str) -> pl.DataFrame:
    return pl.read_parquet(dataset / table / "*.parquet")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        add_toys(patch)
        return run(tmp_path_factory.mktemp("written"), statistics="toy_queries")


@pytest.fixture
def dataset(toys: None, written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "out")


def test_every_toy_is_written_and_verified(dataset: Path):
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert set(TOYS) <= set(manifest["tables"])
    assert manifest["shards"] > 1
    assert verify(dataset) == []


def test_a_dense_row_is_what_its_heads_come_to(dataset: Path):
    heads, layers = rows(dataset, "heads"), rows(dataset, "toy_layers")
    weight = pl.col("query_rows")
    expected = heads.group_by("sequence_id", "layer").agg((pl.col("entropy_nats") * weight).sum() / weight.sum())
    joined = layers.join(expected, on=("sequence_id", "layer"))
    assert joined.height == layers.height == expected.height
    np.testing.assert_allclose(joined["layer_entropy_nats"], joined["entropy_nats"], rtol=1e-5)


def test_ragged_rows_average_to_their_heads(dataset: Path):
    heads, queries = rows(dataset, "heads"), rows(dataset, "toy_queries")
    by = ("sequence_id", "layer", "head")
    means = queries.group_by(*by).agg(pl.col("row_entropy_nats").mean(), n=pl.len(), last=pl.col("query").max())
    joined = heads.join(means, on=by)
    assert joined.height == heads.height
    assert (joined["n"] == joined["query_rows"]).all() and (joined["last"] == joined["n"] - 1).all()
    np.testing.assert_allclose(joined["row_entropy_nats"], joined["entropy_nats"], rtol=1e-5, atol=1e-6)


def test_additive_rows_are_one_set_for_each_shard(dataset: Path):
    counts, sequences = rows(dataset, "toy_counts"), rows(dataset, "sequences")
    assert counts.height == 6 * sequences["shard"].n_unique()
    assert counts.filter(layer=2)["rows_of_heads"].sum() == 12 * sequences["tokens"].sum()


def test_static_rows_are_there_once(dataset: Path, demo):
    weights = rows(dataset, "toy_weights")
    assert len(list((dataset / "toy_weights").glob("*.parquet"))) == 1
    weight = demo.model.encoder.layer[4].attention.self.value.weight[32 * 7 : 32 * 8]
    found = weights.filter(layer=4, head=7)["value_weight_norm"].item()
    assert found == pytest.approx(weight.norm().item(), rel=1e-6)


def test_toys_can_be_queried_measured_and_looked_up(dataset: Path, demo):
    assert (
        query(dataset, "SELECT count(*) AS n FROM toy_queries")["n"][0].as_py() == rows(dataset, "toy_queries").height
    )
    inputs = demo.tokenizer(["one two three", "four"], padding=True, return_tensors="pt")
    measured = measure(demo.model, **inputs)
    assert {"toy_layers", "toy_counts"} <= set(measured) and not {"toy_queries", "toy_weights"} & set(measured)
    (of_parameters,) = measure(demo.model, tables=("toy_weights",), **inputs).values()
    assert of_parameters.num_rows == 6 * 12
    (alone,) = measure(demo.model, tables=("toy_queries",), **inputs).values()
    assert alone.num_rows == 6 * 12 * int(inputs["attention_mask"].sum())
    assert all(f"## `{name}`" in data_dictionary() for name in TOYS)


@pytest.mark.parametrize(
    ("table", "column", "check"),
    [
        ("toy_layers", "layer_entropy_nats", "toy"),
        ("toy_layers", "sequence_id", "order"),
        ("toy_queries", "row_entropy_nats", "bounds"),
        ("toy_counts", "rows_of_heads", "toy sums"),
        ("toy_weights", "layer", "order"),
    ],
)
def test_what_is_wrong_with_a_toy_is_found(dataset: Path, table: str, column: str, check: str):
    part = dataset / table / "shard-00000.parquet"
    rows = pq.read_table(part)
    place = rows.schema.get_field_index(column)
    wrong = rows.column(place).to_numpy().copy()
    wrong[0] = 9
    pq.write_table(rows.set_column(place, rows.schema.field(place), [wrong]), part)
    manifest = json.loads((dataset / "manifest.json").read_text())
    entry = manifest["tables"][table]["parts"][0]
    entry |= {"bytes": part.stat().st_size, "sha256": sha256_of(part)}
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    assert check in {finding.check for finding in verify(dataset)}


def sha256_of(path: Path) -> str:
    from tests.files import file_sha256

    return file_sha256(path)


def test_an_unknown_statistic_is_refused_with_the_nearest_names(toys, tmp_path: Path):
    with pytest.raises(Refusal, match=r"a statistic is core, all, .*'toy_querys' is none; did you mean toy_queries"):
        run(tmp_path, statistics="all,toy_querys")
    with pytest.raises(Refusal, match=r"'residual.entropy_nats' is none"):
        run(tmp_path, statistics=("residual.entropy_nats",))
    assert not (tmp_path / "out").exists()


# --- quantities

GAP = RowQuantity(name="gap", formula="largest weight − second largest")


@column(formula="mean of the largest weight less the second largest", bounds=(0, 1), nullable=True)
def weight_gap(o):
    """How clearly the largest weight of a row leads."""
    return o.mean("gap")


@column(formula="mean of Σ|x'|", bounds=(0, None), nullable=True)
def stream_l1(o):
    """Size of the stream by another norm."""
    return o.mean(o.after.abs().sum(-1))


@pytest.fixture
def quantity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record, the reference engine's function and the column: nothing else."""
    monkeypatch.setitem(ROW_QUANTITIES, "gap", GAP)
    monkeypatch.setitem(reference.OF_BLOCKS, "gap", lambda block: -block.pattern.topk(2).values.diff()[..., 0])
    monkeypatch.setitem(TABLES, "heads", replace(TABLES["heads"], facts=(*TABLES["heads"].facts, weight_gap)))
    residual = TABLES["residual"]
    monkeypatch.setitem(TABLES, "residual", replace(residual, facts=(*residual.facts, stream_l1)))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_row_quantity_is_a_record_a_function_and_a_column(quantity, demo, engine: str):
    inputs = demo.tokenizer(["every engine makes it, one way or the other", "short"], padding=True, return_tensors="pt")
    heads = pl.DataFrame(measure(demo.model, engine=engine, **inputs)["heads"])
    lengths = inputs["attention_mask"].sum(-1).tolist()
    for layer, pattern in enumerate(eager_patterns(demo.model, **inputs)):
        for sequence, n in enumerate(lengths):
            sorted_rows = pattern[sequence, :, :n, :n].sort(-1, descending=True).values
            expected = (sorted_rows[..., 0] - sorted_rows[..., 1]).mean(-1)
            found = heads.filter(sequence_id=sequence, layer=layer).sort("head")["weight_gap"]
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_residual_column_that_is_not_compiled_is_computed_in_plain_torch(quantity, demo):
    ids = torch.tensor([[101, 2000, 2003, 102]])
    found = pl.DataFrame(measure(demo.model, input_ids=ids)["residual"]).filter(layer=1, site="mlp")
    read: list[torch.Tensor] = []
    hook = demo.model.encoder.layer[1].output.LayerNorm.register_forward_hook(
        lambda m, given, wrote: read.append(given[0])
    )
    with torch.inference_mode():
        demo.model(input_ids=ids)
    hook.remove()
    assert found["stream_l1"].item() == pytest.approx(read[0].abs().sum(-1).mean().item(), rel=1e-5)


def test_the_manifest_says_what_the_reference_engine_made(quantity, demo, tmp_path: Path):
    dataset = run(tmp_path, engine="cpu")
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["by_reference"] == {"rows": ["gap"], "residual": ["stream_l1"]}
    assert rows(dataset, "heads")["weight_gap"].null_count() == 0
    assert verify(dataset) == []


# --- computing less


def test_what_no_column_needs_is_not_computed(demo, monkeypatch: pytest.MonkeyPatch):
    """Fewer columns of `heads`, no output norms: neither projections nor tokens nor the stream are looked at."""
    heads = TABLES["heads"]
    few = tuple(c for c in heads.facts if c.name in ("entropy_nats", "query_rows"))
    monkeypatch.setitem(TABLES, "heads", replace(heads, facts=few, rules=()))
    asked: list[str] = []
    for name, compute in list(reference.OF_BLOCKS.items()):
        monkeypatch.setitem(reference.OF_BLOCKS, name, lambda block, n=name, c=compute: asked.append(n) or c(block))
    for name in reference.OF_CALLS:
        monkeypatch.setitem(reference.OF_CALLS, name, lambda *arguments, n=name: pytest.fail(f"{n} is not needed"))
    monkeypatch.setattr(
        "attlas.extract.capture.runtime.instrumented_pass.write_factors",
        lambda *arguments: pytest.fail("no projection is needed"),
    )
    monkeypatch.setattr(
        "attlas.extract.capture.runtime.instrumented_pass.Stream",
        lambda *arguments: pytest.fail("the stream is not needed"),
    )
    inputs = demo.tokenizer(["as little as possible"], return_tensors="pt")
    (table,) = measure(demo.model, engine="reference", tables=("heads",), **inputs).values()
    assert set(asked) == {"entropy"}
    assert table.column_names == ["sequence_id", "stack", "layer", "head", "entropy_nats", "query_rows"]
    assert table["entropy_nats"].null_count == 0
