"""A run from corpus to dataset: the same bytes every time, readable by everyone, and no text in it."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

import attlas
from attlas.extract.errors import Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, plan_run
from attlas.extract.store import MANIFEST, WORK
from attlas.extract.tables import TABLES
from tests.extract.runs import complete_run
from tests.files import file_sha256

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the quick brown fox jumps again.",
    "",
    "Zanzibar-Quokka 42 is a word no other corpus has. " * 12,
    "Attention patterns differ between heads; some look at the previous token.",
    "Short.",
    "A second paragraph about nothing in particular, with numbers 1, 2 and 3. " * 3,
]

OF_EVERY_RUN = {name: table for name, table in TABLES.items() if not table.on_request}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


def run(corpus: Path, out: Path, **changes) -> Path:
    options = RunOptions(
        **({"model": "demo", "corpus": str(corpus), "out": out, "max_length": 32, "shard_sequences": 4} | changes)
    )
    complete_run(options)
    return out


@pytest.fixture(scope="module")
def dataset(corpus, tmp_path_factory) -> Path:
    return run(corpus, tmp_path_factory.mktemp("out") / "a")


def parts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_runs_give_the_same_bytes_in_every_file(corpus, dataset, tmp_path):
    assert parts(run(corpus, tmp_path / "b")) == parts(dataset)


def test_a_run_that_stopped_between_any_two_shards_goes_on_to_the_same_bytes(corpus, dataset, tmp_path):
    options = RunOptions(model="demo", corpus=str(corpus), out=tmp_path / "c", max_length=32, shard_sequences=4)
    shards = plan_run(options).remaining
    assert len(shards) >= 3
    for shard in reversed(shards):  # each time a new start, and in another order
        planned = plan_run(options)
        assert shard in planned.remaining
        measure_shard(planned.open_worker(), shard)
    assert parts(finish(options.out)) == parts(dataset)


def test_a_part_that_was_cut_off_is_measured_again(corpus, dataset, tmp_path):
    options = RunOptions(model="demo", corpus=str(corpus), out=tmp_path / "d", max_length=32, shard_sequences=4)
    planned = plan_run(options)
    for shard in planned.remaining:
        measure_shard(planned.open_worker(), shard)
    part = tmp_path / "d" / "heads" / "shard-00001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    again = plan_run(options)
    assert again.remaining == [1]
    measure_shard(again.open_worker(), 1)
    assert parts(finish(options.out)) == parts(dataset)


def test_rows_do_not_depend_on_the_shard_size_or_the_batches(corpus, dataset, tmp_path):
    other = run(corpus, tmp_path / "e", shard_sequences=100, batch_tokens=40)
    for table, keys in (("heads", ["layer", "head", "sequence_id"]), ("residual", ["layer", "site", "sequence_id"])):
        a, b = (pl.read_parquet(f / table / "*.parquet").sort(keys) for f in (dataset, other))
        assert a.height == b.height > 0
        for name, dtype in a.schema.items():
            if dtype == pl.Float32:
                np.testing.assert_allclose(
                    a[name].fill_null(-9).to_numpy(),
                    b[name].fill_null(-9).to_numpy(),
                    rtol=1e-4,
                    atol=1e-5,
                    err_msg=name,
                )


def test_no_text_and_no_token_ids_are_anywhere_in_the_default_output(dataset, demo):
    ids = demo.tokenizer("Zanzibar-Quokka 42 is a word no other", add_special_tokens=False)["input_ids"]
    for path in dataset.rglob("*"):
        if path.is_file():
            held = path.read_bytes().lower()
            assert b"quokka" not in held and b"zanzibar" not in held, path
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            assert not {"token_ids", "text"} & set(table.column_names)
            for column in table.columns:
                values = [v for v in column.to_pylist() if not isinstance(v, float)]
                assert ids[:4] not in [values[n : n + 4] for n in range(len(values))]
    assert not (dataset / WORK).exists()


def test_ids_and_text_are_there_when_asked_for(corpus, tmp_path, demo):
    sequences = pl.read_parquet(run(corpus, tmp_path / "f", tokens="text") / "sequences" / "*.parquet")
    assert "quokka" in " ".join(sequences["text"]).lower()
    for row in sequences.iter_rows(named=True):
        assert len(row["token_ids"]) == row["tokens"]
        assert row["token_ids"][0] == demo.tokenizer.cls_token_id


def test_without_token_classes_the_columns_that_need_them_are_null(corpus, tmp_path):
    heads = pl.read_parquet(run(corpus, tmp_path / "g", tokens="none") / "heads" / "*.parquet")
    for name in ("mass_bos", "mass_punctuation", "mass_same_token", "mass_induction"):
        assert heads[name].null_count() == heads.height
    assert heads["entropy_nats"].null_count() == 0


def test_documents_and_sequences_account_for_everything(dataset):
    documents = pl.read_parquet(dataset / "documents" / "*.parquet")
    sequences = pl.read_parquet(dataset / "sequences" / "*.parquet")
    heads = pl.read_parquet(dataset / "heads" / "*.parquet")
    manifest = json.loads((dataset / MANIFEST).read_text())
    assert documents.height == len(TEXTS) == manifest["corpus"]["documents"]
    assert documents.filter(pl.col("dropped_reason").is_not_null())["document_id"].to_list() == [1]
    assert sum(manifest["corpus"]["dropped"].values()) == 1
    assert documents["sequences"].sum() == sequences.height == manifest["corpus"]["sequences"]
    assert (sequences["tokens"] - sequences["special_tokens"]).sum() == documents["content_tokens"].sum()
    assert heads.height == sequences.height * 6 * 12
    unknown = heads["distance_vs_uniform"].null_count() + 3 * heads.height  # mass_sink, distance_patches, mass_patches
    assert heads.null_count().sum_horizontal()[0] == unknown
    assert 0 <= manifest["padding_waste"] < 1


def test_everyone_reads_it_as_it_is(dataset, tmp_path):
    from datasets import load_dataset

    rows = json.loads((dataset / MANIFEST).read_text())["tables"]["heads"]["rows"]
    pattern = str(dataset / "heads" / "*.parquet")
    assert pl.read_parquet(pattern).height == rows
    assert duckdb.execute("SELECT count(*) FROM read_parquet(?)", [pattern]).fetchall() == [(rows,)]
    assert len(pd.read_parquet(dataset / "heads")) == rows
    for name in OF_EVERY_RUN:
        loaded = load_dataset(str(dataset), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == json.loads((dataset / MANIFEST).read_text())["tables"][name]["rows"]


def test_every_field_carries_its_formula(dataset):
    for name, table in OF_EVERY_RUN.items():
        schema = pq.read_schema(dataset / name / "shard-00000.parquet")
        assert schema.names == table.schema().names
        for field in schema:
            assert field.metadata[b"formula"], (name, field.name)


@pytest.mark.parametrize("name", list(OF_EVERY_RUN))
def test_the_parts_are_sorted_as_the_contract_says(dataset, name):
    for part in sorted((dataset / name).iterdir()):
        keys = pl.read_parquet(part).select(
            [pl.col(c).cast(pl.String) if c in ("stack", "site", "profile") else c for c in TABLES[name].order]
        )
        assert keys.equals(keys.sort(keys.columns, maintain_order=True, nulls_last=True)), part


def test_another_run_in_the_same_folder_is_refused_with_what_differs(corpus, dataset):
    with pytest.raises(Refusal, match="max_length: there 32, asked 64"):
        run(corpus, dataset, max_length=64)


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(corpus, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match="holds something else"):
        run(corpus, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["_work/notes.txt", "manifest.json"])
def test_a_folder_that_only_looks_like_a_run_is_left_alone(corpus, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(Refusal, match="holds something else"):
        run(corpus, tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 4096}, "max_length 4096 is beyond this model's 512 positions"),
        ({"max_length": 2}, "special"),
        ({"max_length": -1}, "max_length must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"stride": -2}, "stride must be at least 0"),
        ({"stride": 32}, "stride"),
        ({"model": "no/such/folder"}, "there is no folder"),
        ({"engine": "quantum"}, "an engine is one of auto, reference, cpu"),
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"corpus": "no-such-file.txt"}, "no-such-file.txt"),
        ({"digest_key": Path("no-such-key")}, "--digest-key"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(corpus, tmp_path, changes, message):
    with pytest.raises(Refusal, match=message):
        run(**{"corpus": corpus, "out": tmp_path / "h"} | changes)
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize(
    ("content", "message"), [("", "at least one document"), ('{"text": ""}\n{"text": "  "}\n', "empty")]
)
def test_a_corpus_without_text_is_refused_and_nothing_is_written(tmp_path, content, message):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(Refusal, match=message):
        run(tmp_path / "c.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_and_pickled_weights_are_refused(corpus, tmp_path, demo):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(Refusal, match=r"a model folder has a config\.json"):
        run(corpus, tmp_path / "o", model=str(folder))
    demo.model.config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(Refusal, match="only pickled weights"):
        run(corpus, tmp_path / "o", model=str(folder))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_saved_to_a_folder_runs_end_to_end(family, corpus, tmp_path, demo):
    from tests.extract.models import tiny

    model = tiny(family)
    model.resize_token_embeddings(len(demo.tokenizer))
    model.save_pretrained(tmp_path / "model")
    demo.tokenizer.save_pretrained(tmp_path / "model")
    out = run(corpus, tmp_path / "out", model=str(tmp_path / "model"))
    heads = pl.read_parquet(out / "heads" / "*.parquet")
    assert set(heads["stack"].cast(pl.String)) == {"decoder"}
    assert heads["mass_forward"].max() == 0
    sites = pl.read_parquet(out / "residual" / "*.parquet")["site"].cast(pl.String).unique()
    assert set(sites) == {"embedding", "attention", "mlp", "final_norm"}


def test_the_data_dictionary_is_the_schemas():
    from attlas.extract.dictionary import data_dictionary

    committed = Path(__file__).parents[2] / "data" / "README.md"
    assert committed.read_text("utf-8") == data_dictionary(), "run: make dictionary"


def test_a_run_from_python_is_one_call_and_goes_on_where_it_was(demo, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS[0].split()) * 4)
    options = {"model": "demo", "corpus": str(text), "max_length": 16, "shard_sequences": 2, "device": "cpu"}
    out = attlas.run(out=tmp_path / "out", **options)
    assert attlas.verify(out) == []
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(out).rglob("*.parquet"))
    assert before and attlas.run(out=tmp_path / "out", **options) == out
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(out).rglob("*.parquet")) == before
    with pytest.raises(Refusal, match="max_length must be at least 1"):
        attlas.run(out=tmp_path / "other", **options | {"max_length": 0})
