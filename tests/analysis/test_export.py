"""Exports equal what is computed from the rows alone, and other statistics software takes them and agrees."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from scipy import stats

from attlas.analysis import export as module
from attlas.analysis.dataset import Dataset
from attlas.analysis.export import document_means, export, sequence_rows
from attlas.analysis.heads import HEAD, head_estimates
from attlas.analysis.inference import estimates
from attlas.analysis.summaries import summarize_frame
from attlas.extract.store import Refusal
from tests.analysis.synthetic import changed_copy, write_dataset

sm = pytest.importorskip("statsmodels.api")
smf = pytest.importorskip("statsmodels.formula.api")
LONG = ["document_id", "source", "sequences", "tokens", "stack", "layer", "head", "column", "value", "weight"]
# from the rows alone; a bracket in a path is a pattern to DuckDB
BY_SQL = """
SELECT document_id, layer, head, SUM({column}::DOUBLE * query_rows) / SUM(query_rows) AS value, SUM(query_rows) AS weight
FROM read_parquet('{parts}') WHERE {column} IS NOT NULL GROUP BY ALL ORDER BY ALL
"""


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two sequences, so that most documents lie in several."""
    return write_dataset(tmp_path_factory.mktemp("export") / "d", documents=8, shard_sequences=2)


@pytest.mark.parametrize("column", ["entropy_nats", "mass_previous", "mass_induction"])
def test_means_of_documents_equal_those_recomputed_from_parquet_alone(
    in_pieces: Path, tmp_path: Path, column: str
) -> None:
    found = pl.read_csv(export(in_pieces, tmp_path / "long.csv", columns=[column]))
    assert found.columns == LONG
    with duckdb.connect() as connection:
        rows = connection.sql(BY_SQL.format(column=column, parts=in_pieces / "heads" / "*.parquet")).fetchall()
    assert found.select("document_id", "layer", "head").rows() == [row[:3] for row in rows]
    assert found["value"].to_numpy() == pytest.approx(np.array([row[3] for row in rows]), rel=1e-12)
    assert found["weight"].to_list() == [row[4] for row in rows]


def test_a_document_in_several_parts_is_one_row_and_comes_with_its_last_part(in_pieces: Path) -> None:
    dataset = Dataset.open(in_pieces)
    frames = list(document_means(dataset, "heads", ["entropy_nats"]))
    assert len(frames) == len(dataset.parts("heads")) > 4
    parts = [set(rows.select("document_id").unique().collect()["document_id"]) for rows in dataset.scan_parts("heads")]
    for number, frame in enumerate(frames):
        expected = {d for d in parts[number] if all(d not in later for later in parts[number + 1 :])}
        assert set(frame["document_id"]) == expected
    together = pl.concat(frames)
    assert not together.select("document_id", "layer", "head", "column").is_duplicated().any()
    assert together["document_id"].is_sorted()


def test_a_part_is_written_before_the_next_one_is_read(in_pieces: Path, tmp_path: Path, monkeypatch) -> None:
    read: list[int] = []
    written: list[int] = []

    def sums(*arguments) -> Iterator[pl.DataFrame]:
        for number, frame in enumerate(original(*arguments)):
            read.append(number)
            yield frame

    def write(frames: Iterator[pl.DataFrame], path: Path) -> None:
        for _ in frames:
            written.append(len(read))

    original = module.document_sums
    monkeypatch.setattr(module, "document_sums", sums)
    monkeypatch.setattr(module, "write_frames", write)
    export(in_pieces, tmp_path / "x.csv")
    assert written == list(range(1, len(read) + 1))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("table", ["heads", "residual"])
def test_wide_has_the_same_numbers_as_long_in_both_formats(
    in_pieces: Path, tmp_path: Path, table: str, suffix: str
) -> None:
    read = {".csv": pl.read_csv, ".parquet": pl.read_parquet}[suffix]
    long = read(export(in_pieces, tmp_path / f"long{suffix}", table=table))
    wide = read(export(in_pieces, tmp_path / f"wide{suffix}", table=table, form="wide"))
    place = "head" if table == "heads" else "site"
    keys = ["document_id", "source", "sequences", "tokens", "stack", "layer", place]
    statistics = [name for name in wide.columns if name not in (*keys, "weight")]
    assert set(long["column"]) <= set(statistics)
    assert wide.columns == [*keys, "weight", *statistics]
    wide = wide.with_columns(pl.col(statistics).cast(pl.Float64))  # a column of nulls is text in CSV
    unpivoted = wide.unpivot(statistics, index=keys, variable_name="column", value_name="value").drop_nulls("value")
    by = ["document_id", "layer", place, "column"]
    assert unpivoted.sort(by).select(*by, "value").equals(long.sort(by).select(*by, "value"))
    assert wide.select(keys).is_unique().all()
    assert (
        wide.sort(keys)["weight"].to_list()
        == long.group_by(keys).agg(pl.col("weight").max()).sort(keys)["weight"].to_list()
    )


def test_documents_have_their_source_sequences_and_tokens(in_pieces: Path, tmp_path: Path) -> None:
    found = pl.read_parquet(export(in_pieces, tmp_path / "x.parquet", columns=["entropy_nats"]))
    sequences = Dataset.open(in_pieces).scan("sequences").collect()
    for number, source, count, tokens in found.select("document_id", "source", "sequences", "tokens").unique().rows():
        of_document = sequences.filter(pl.col("document_id") == number)
        assert (source, count, tokens) == (f"made-up:{number}", of_document.height, of_document["tokens"].sum())


def test_the_estimates_follow_from_an_export(in_pieces: Path, tmp_path: Path) -> None:
    found = pl.read_csv(
        export(in_pieces, tmp_path / "x.csv", columns=["entropy_nats"]),
        schema_overrides={"layer": pl.Int16, "head": pl.Int16},
    )
    rows = found.rename({"value": "entropy_nats"})
    again = estimates(summarize_frame(rows, ["entropy_nats"], HEAD).lazy(), HEAD).collect()
    ours = head_estimates(Dataset.open(in_pieces), ["entropy_nats"])
    assert again["estimate"].to_numpy() == pytest.approx(ours["estimate"].to_numpy(), rel=1e-9)


def test_a_row_of_a_mixed_model_is_a_sequence_and_a_head(in_pieces: Path, tmp_path: Path) -> None:
    found = pl.read_csv(export(in_pieces, tmp_path / "x.csv", mixed_model="mass_induction"))
    rows = Dataset.open(in_pieces).scan("heads").filter(pl.col("mass_induction").is_not_null()).collect()
    rows = rows.sort("sequence_id", "layer", "head")
    assert found["sequence_id"].to_list() == rows["sequence_id"].to_list()
    assert found["head"].to_list() == [f"L{layer}H{head}" for layer, head in rows.select("layer", "head").rows()]
    assert found["mass_induction"].to_numpy() == pytest.approx(rows["mass_induction"].to_numpy())
    assert found["weight"].to_list() == rows["query_rows"].to_list()
    sequences = dict(Dataset.open(in_pieces).scan("sequences").select("sequence_id", "tokens").collect().rows())
    assert found["tokens"].to_list() == [sequences[s] for s in found["sequence_id"]]
    assert found["log_tokens"].to_numpy() == pytest.approx(np.log(found["tokens"].to_numpy()))
    assert found["share_special"].to_numpy() == pytest.approx(2 / found["tokens"].to_numpy())


def test_sites_and_layers_are_exported_for_mixed_models_too(encoder_run: Path, tmp_path: Path) -> None:
    sites = pl.read_csv(export(encoder_run, tmp_path / "s.csv", table="residual", mixed_model="update_norm"))
    assert set(sites["site"]) == {f"L{layer} {site}" for layer in (0, 1) for site in ("attention", "mlp")}
    layers = pl.read_csv(export(encoder_run, tmp_path / "l.csv", table="layers", mixed_model="block_gain"))
    assert {"layer", "block_gain"} < set(layers.columns) and "head" not in layers.columns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "pairs"}, "--table must be one of heads, residual, layers; got 'pairs'"),
        ({"table": "layers"}, "this dataset has the tables .*; 'layers' is not one"),
        ({"columns": ["entropy_nat"]}, "'entropy_nat' is not one; did you mean entropy_nats"),
        ({"columns": ["update_norm"]}, "'update_norm' is not one; residual has it: use --table residual"),
        ({"columns": ["received_max_key"]}, "'received_max_key' is not one"),
        ({"columns": []}, "an export has at least one column; got none"),
        ({"mixed_model": "nothing of it"}, "'nothing of it' is not one"),
        ({"form": "tall"}, "a form is long or wide; got 'tall'"),
        ({"output": "x.sav"}, r"--output ends in \.csv or \.parquet, which is its format; got .*x\.sav"),
        ({"output": "nowhere/x.csv"}, "--output is a file that can be written; .*No such file"),
    ],
)
def test_what_can_not_be_exported_is_refused_and_nothing_written(
    folder: Path, tmp_path: Path, options, message
) -> None:
    output = tmp_path / options.pop("output", "x.csv")
    with pytest.raises(Refusal, match=message):
        export(folder, output, **options)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_refused_by_name_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=4, shard_sequences=2)
    part = sorted((root / "heads").iterdir())[-1]
    raw = bytearray(part.read_bytes())
    raw[200:400] = bytes(200)
    part.write_bytes(raw)
    (tmp_path / "x.csv").write_text("earlier")
    with pytest.raises(Refusal, match=part.name):
        export(root, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "earlier"


def test_a_full_disk_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full.csv").symlink_to("/dev/full")
    with pytest.raises(Exception, match="No space left on device"):
        export(folder, tmp_path / "full.csv")


# other software

HEADS, DOCUMENTS = (2, 4), 40
HEAD_EFFECTS = np.linspace(-0.4, 0.5, 8)
LENGTH_EFFECT, DOCUMENT_DEVIATION, NOISE = 0.8, 0.3, 0.1


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entropies made of an effect of the head, of the document and of the length, and noise."""
    place = tmp_path_factory.mktemp("planted")
    root = write_dataset(place / "plain", documents=DOCUMENTS, lengths=(5, 40))
    of_document = np.random.default_rng(1).normal(0, DOCUMENT_DEVIATION, DOCUMENTS)

    def change(rows: pl.DataFrame) -> pl.DataFrame:
        noise = np.random.default_rng(int(rows["sequence_id"][0])).normal(0, NOISE, rows.height)
        head = HEAD_EFFECTS[rows["layer"].to_numpy() * 4 + rows["head"].to_numpy()]
        length = LENGTH_EFFECT * np.log(rows["query_rows"].to_numpy())
        return rows.with_columns(
            entropy_nats=pl.Series(head + length + of_document[rows["document_id"].to_numpy()] + noise)
        )

    return changed_copy(root, place / "planted", change)


def test_a_mixed_model_of_statsmodels_finds_what_was_planted(planted: Path, tmp_path: Path) -> None:
    file = export(planted, tmp_path / "x.parquet", mixed_model="entropy_nats")
    data = pl.read_parquet(file).to_pandas()
    model = smf.mixedlm("entropy_nats ~ C(head) + log_tokens", data, groups=data["document_id"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its optimizer
        fit = model.fit(method="powell")
    assert fit.params["log_tokens"] == pytest.approx(LENGTH_EFFECT, abs=4 * fit.bse["log_tokens"])
    names = [f"C(head)[T.L{place // 4}H{place % 4}]" for place in range(1, 8)]
    errors = fit.params[names].to_numpy() - (HEAD_EFFECTS[1:] - HEAD_EFFECTS[0])
    assert (np.abs(errors) < 4 * fit.bse[names].to_numpy()).all()
    assert np.sqrt(fit.scale) == pytest.approx(NOISE, rel=0.1)
    assert np.sqrt(fit.cov_re.iloc[0, 0]) == pytest.approx(DOCUMENT_DEVIATION, rel=0.35)


def _equal_documents(random: np.random.Generator, *, documents: int, rows: int) -> pl.DataFrame:
    """Documents of equal weight, with rows of unequal weights."""
    weights = random.integers(1, 20, rows).astype(float)
    document = np.repeat(np.arange(documents), rows)
    y = random.normal(size=documents)[document] + random.normal(size=documents * rows)
    return pl.DataFrame({"document_id": document, "weight": np.tile(weights, documents), "g": 0, "y": y})


@pytest.mark.parametrize("documents", [3, 12, 50])
def test_the_error_of_equal_documents_is_the_cluster_robust_one_of_statsmodels(documents: int) -> None:
    frame = _equal_documents(np.random.default_rng(documents), documents=documents, rows=7)
    (ours,) = estimates(summarize_frame(frame, ["y"], ["g"]).lazy(), ["g"]).collect().iter_rows(named=True)
    y, w, document = (frame[name].to_numpy() for name in ("y", "weight", "document_id"))
    fit = sm.WLS(y, np.ones_like(y), weights=w).fit(cov_type="cluster", cov_kwds={"groups": document}, use_t=True)
    assert ours["estimate"] == pytest.approx(fit.params[0], rel=1e-12)
    assert ours["se"] == pytest.approx(fit.bse[0], rel=1e-9)
    low, high = fit.conf_int()[0]
    assert (ours["low"], ours["high"]) == pytest.approx((low, high), rel=1e-9)


def test_a_row_for_each_document_gives_the_students_interval_of_scipy() -> None:
    y = np.random.default_rng(3).normal(2, 1, 25)
    frame = pl.DataFrame({"document_id": np.arange(25), "weight": 4.0, "g": 0, "y": y})
    (ours,) = estimates(summarize_frame(frame, ["y"], ["g"]).lazy(), ["g"]).collect().iter_rows(named=True)
    assert ours["se"] == pytest.approx(stats.sem(y), rel=1e-12)
    interval = stats.t.interval(0.95, 24, loc=y.mean(), scale=stats.sem(y))
    assert (ours["low"], ours["high"]) == pytest.approx(interval, rel=1e-12)


def test_sequences_without_a_value_are_left_out(in_pieces: Path) -> None:
    frames = list(sequence_rows(Dataset.open(in_pieces), "heads", "distance_patches"))
    assert sum(frame.height for frame in frames) == 0
