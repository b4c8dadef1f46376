"""What is measured besides the core: chosen by name, absent otherwise, and listed in the manifest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from attlas.analysis.dataset import Dataset
from attlas.analysis.query import query
from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.collector import open_collector
from attlas.extract.engines import choose
from attlas.extract.errors import Refusal
from attlas.extract.measurement import layout_of, observe
from attlas.extract.options import RunOptions
from attlas.extract.run import plan_run
from attlas.extract.store import open_dataset
from attlas.extract.tables import TABLES, columns_beyond_core, measured_columns
from tests.extract.runs import complete_run
from tests.files import read_json, write_json

MEASURABLE = {
    name: tuple(c for c in table.statistics if not c.corpus and not c.by_name) for name, table in TABLES.items()
}
EXTRA = sorted(c.name for c in MEASURABLE["heads"] if not c.core)


def options(tmp_path: Path, statistics: str, out: str = "out") -> RunOptions:
    corpus = tmp_path / "text.txt"
    corpus.write_text("Only what is asked for is measured, and nothing else is there. " * 6)
    return RunOptions(
        model="demo", corpus=str(corpus), out=tmp_path / out, max_length=24, shard_sequences=3, statistics=statistics
    )


def tiny_swin() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinModel(config).eval()


def names(columns) -> set[str]:
    return {column.name for column in columns}


def test_the_core_is_always_measured_and_names_add_to_it() -> None:
    core = measured_columns()
    assert set(core) == {name for name, table in TABLES.items() if table.recorder and not table.on_request}
    assert {"heads", "residual", "layers", "profiles", "residual_profiles", "pairs", "weights", "norms"} <= set(core)
    assert not names(core["heads"]) & set(EXTRA)
    assert len(EXTRA) >= 6
    assert measured_columns("core") == core == measured_columns(())
    everything = measured_columns("all")
    assert all(everything[name] == facts for name, facts in MEASURABLE.items() if name in everything)
    one = measured_columns("query_norm")
    assert names(one["heads"]) - names(core["heads"]) == {"query_norm"}
    assert one == measured_columns("core, heads.query_norm") == measured_columns(["query_norm"])
    assert columns_beyond_core(TABLES.values(), one) == ["heads.query_norm"]
    assert columns_beyond_core(TABLES.values(), core) == []
    assert measured_columns("heads")["heads"] == MEASURABLE["heads"]


def test_a_costly_column_is_measured_by_its_own_name_alone() -> None:
    costly = {c.name for c in TABLES["heads"].facts if c.by_name}
    assert costly == {"pattern_effective_rank"}
    for statistics in ("core", "all", "heads", "all,heads"):
        assert not names(measured_columns(statistics)["heads"]) & costly
    for statistics in ("pattern_effective_rank", "heads.pattern_effective_rank", "all,pattern_effective_rank"):
        assert costly <= names(measured_columns(statistics)["heads"])


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ("query_nrm", "'query_nrm' is none; did you mean query_norm, query_rows, key_norm"),
        ("residual.query_norm", "'residual.query_norm' is none; did you mean query_norm"),
        ("ALL", "'ALL' is none; attlas stats lists them"),
        ("documents", "'documents' is none"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_is_written(tmp_path: Path, statistics: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        plan_run(options(tmp_path, statistics))
    assert not (tmp_path / "out").exists()


def test_a_dataset_has_the_columns_that_were_asked_for_and_lists_them(demo, tmp_path: Path) -> None:
    for statistics, extra in (("core", []), ("sink_keys", ["sink_keys"]), ("all", EXTRA)):
        out = Path(str(complete_run(options(tmp_path, statistics, statistics)).options.out))
        manifest = open_dataset(out)[1]
        columns = pq.read_schema(next((out / "heads").iterdir())).names
        assert sorted(set(columns) & set(EXTRA)) == extra
        assert manifest["tables"]["heads"]["columns"] == columns
        asked = manifest["run"]["statistics"]
        assert [name for name in asked if name.startswith("heads.")] == [f"heads.{name}" for name in extra]
        assert (len(asked) > len(extra)) == (statistics == "all"), "of other tables, too"
        assert verify(out) == []
        assert Dataset.open(out).scan("heads").collect_schema().names() == columns
        assert query(out, "SELECT * FROM heads LIMIT 1").column_names == columns
        assert Path(str(write_report(out))).exists()
    shared = pq.read_schema(tmp_path / "core" / "heads" / "shard-00000.parquet").names
    core, everything = (
        pl.read_parquet(tmp_path / name / "heads" / "*.parquet", columns=shared) for name in ("core", "all")
    )
    assert core.equals(everything), "asking for more changes no number"


SAMPLED = (
    *("gini", "keys_for_half_mass", "mass_top_16", "mass_streaming", "norm_entropy_nats"),
    "pattern_effective_rank",
)
WITH_COSTLY = "all,pattern_effective_rank"


def test_sampled_columns_are_those_of_the_first_sequences_of_each_shard(demo, tmp_path: Path) -> None:
    few = replace(options(tmp_path, WITH_COSTLY, "few"), sample=2, shard_sequences=4)
    every = replace(options(tmp_path, WITH_COSTLY, "every"), sample=4, shard_sequences=4)
    tables = []
    for asked in (few, every):
        out = Path(str(complete_run(asked).options.out))
        assert verify(out) == []
        tables.append(pl.read_parquet(out / "heads" / "*.parquet").sort("sequence_id", "layer", "head"))
    sampled, whole = tables
    in_sample = pl.col("sequence_id") % 4 < 2
    assert sampled.filter(in_sample).equals(whole.filter(in_sample))
    others = sampled.filter(~in_sample)
    assert others.height > 0
    assert all(others[name].null_count() == others.height for name in SAMPLED)
    assert all(whole[name].null_count() == 0 for name in SAMPLED)
    core = [name for name in sampled.columns if name not in TABLES["heads"].optional]
    assert sampled.select(core).equals(whole.select(core))


def test_sampled_quantities_of_windows_are_of_their_sequences() -> None:
    """Swin attends within windows, each a row of the call's batch."""
    model, pixels = tiny_swin(), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    layout = layout_of(model, {"pixel_values": pixels})
    values = {}
    for name, sample in (("all", None), ("second", torch.tensor([False, True, False]))):
        numbers = np.arange(3)
        collector = open_collector(measured_columns("gini"), model, layout, sequence_ids=numbers, document_ids=numbers)
        batch = Batch(3, sample=sample)
        observe(model, layout, {"pixel_values": pixels}, batch=batch, engine=choose("auto"), collector=collector)
        values[name] = pl.DataFrame(collector.tables()["heads"]).sort("sequence_id", "stack", "layer", "head")
    second = pl.col("sequence_id") == 1
    assert values["all"]["gini"].null_count() == 0
    assert values["second"].filter(second).equals(values["all"].filter(second))
    assert values["second"].filter(~second)["gini"].null_count() == values["second"].filter(~second).height


def test_a_column_that_the_manifest_lists_and_a_part_lacks_is_found(demo, tmp_path: Path) -> None:
    out = Path(str(complete_run(options(tmp_path, "core")).options.out))
    manifest = read_json(out / "manifest.json")
    manifest["tables"]["heads"]["columns"].insert(-1, "sink_keys")
    write_json(out / "manifest.json", manifest)
    assert {finding.check for finding in verify(out)} == {"schema"}


def test_a_run_is_not_resumed_with_other_statistics(demo, tmp_path: Path) -> None:
    plan_run(options(tmp_path, "core"))
    with pytest.raises(Refusal, match=r"statistics: there \[\], asked \['heads\.query_norm'\]"):
        plan_run(options(tmp_path, "query_norm"))


def test_measure_takes_statistics_too(demo) -> None:
    inputs = demo.tokenizer("measured in a notebook", return_tensors="pt")
    assert set(EXTRA) <= set(measure(demo.model, statistics="all", **inputs)["heads"].column_names)
    (heads,) = measure(demo.model, tables=("heads",), statistics=("key_norm",), **inputs).values()
    assert set(heads.column_names) & set(EXTRA) == {"key_norm"}
    assert not set(measure(demo.model, **inputs)["heads"].column_names) & set(EXTRA)
