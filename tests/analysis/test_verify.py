"""Every manipulation is found, in the part that has it. Rewritten parts get new checksums, so that only their rows are wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from attlas.analysis.verify import Finding, verify
from tests.analysis.synthetic import rewrite, write_dataset
from tests.files import read_json, write_json

HEADS = "heads/shard-00000.parquet"
COUNTS = ("sequences", "query_rows", "masked_rows", "nonfinite_rows")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "d", documents=4, layers=1, heads=3)


def change_column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        values = change(table.column(name).to_numpy(zero_copy_only=False).copy())
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return apply


def set_first_row(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[0] = value
        return values

    return change


def checks(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(f.part, f.check) for f in findings}


def test_an_intact_dataset_has_no_findings(dataset: Path) -> None:
    assert verify(dataset) == []


def test_the_report_and_the_card_are_no_stray_files(dataset: Path) -> None:
    (dataset / "report.html").write_text("<html>")
    assert verify(dataset) == []


def test_a_flipped_byte(dataset: Path) -> None:
    raw = bytearray((dataset / HEADS).read_bytes())
    raw[100] ^= 1
    (dataset / HEADS).write_bytes(raw)
    assert (HEADS, "checksum") in checks(verify(dataset))


def test_a_truncated_part(dataset: Path) -> None:
    (dataset / HEADS).write_bytes((dataset / HEADS).read_bytes()[:-20])
    assert {(HEADS, "size"), (HEADS, "unreadable")} <= checks(verify(dataset))


def test_a_missing_part(dataset: Path) -> None:
    (dataset / HEADS).unlink()
    assert (HEADS, "missing part") in checks(verify(dataset))


@pytest.mark.parametrize("name", ["heads/shard-00077.parquet", "heads/notes.txt", "heads/x.tmp", "_work/run.json"])
def test_a_stray_file(dataset: Path, name: str) -> None:
    (dataset / name).parent.mkdir(exist_ok=True)
    (dataset / name).write_text("x")
    assert checks(verify(dataset)) == {(name, "stray file")}


def test_a_manifest_that_counts_wrong(dataset: Path) -> None:
    manifest = read_json(dataset / "manifest.json")
    assert manifest is not None
    manifest["tables"]["heads"]["rows"] += 1
    manifest["corpus"]["tokens"] += 1
    write_json(dataset / "manifest.json", manifest)
    assert checks(verify(dataset)) == {("manifest.json", "row count"), ("manifest.json", "corpus")}


def rename_column(table: pa.Table) -> pa.Table:
    return table.rename_columns(["entropy" if n == "entropy_nats" else n for n in table.column_names])


def change_type(table: pa.Table) -> pa.Table:
    i = table.schema.get_field_index("entropy_nats")
    return table.set_column(i, table.schema.field(i).with_type(pa.float64()), table.column(i).cast(pa.float64()))


def change_metadata(table: pa.Table) -> pa.Table:
    i = table.schema.get_field_index("entropy_nats")
    return table.cast(table.schema.set(i, table.schema.field(i).with_metadata({"formula": "another"})))


def make_nullable(table: pa.Table) -> pa.Table:
    i = table.schema.get_field_index("query_rows")
    return table.cast(table.schema.set(i, table.schema.field(i).with_nullable(True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_column, "lacks entropy_nats; has unknown entropy"),
        (change_type, "entropy_nats is double, the contract says float"),
        (change_metadata, "entropy_nats has other metadata"),
        (make_nullable, "query_rows is nullable"),
    ],
)
def test_another_schema(dataset: Path, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    rewrite(dataset, HEADS, change)
    found = [f for f in verify(dataset) if (f.part, f.check) == (HEADS, "schema")]
    assert [message in f.message for f in found] == [True]


@pytest.mark.parametrize(
    ("column", "value", "check"),
    [
        ("entropy_nats", float("inf"), "not finite"),
        ("entropy_nats", -0.1, "bounds"),
        ("entropy_nats", 99.0, "bounds"),  # above ln n
        ("mass_previous", 1.01, "bounds"),
        ("attended_keys", 99.0, "bounds"),  # above n
        ("offset_tokens", -99.0, "bounds"),  # below −(n−1)
        ("received_max_key", 99, "bounds"),
        ("masked_rows", -1, "bounds"),
        ("mass_self", 0.5, "masses"),
        ("mass_number", 0.9, "class masses"),
        ("query_rows", 1, "rows"),
        ("layer", 5, "order"),
        ("document_id", 3, "links"),
        ("sequence_id", 10**6, "links"),
    ],
)
def test_a_wrong_value_in_one_row(dataset: Path, column: str, value: float, check: str) -> None:
    rewrite(dataset, HEADS, change_column(column, set_first_row(value)))
    assert (HEADS, check) in checks(verify(dataset))


def test_rows_of_several_stacks_are_counted_where_they_are_of_tokens(dataset: Path) -> None:
    rewrite(dataset, HEADS, change_column("query_rows", set_first_row(1)))
    path = dataset / "manifest.json"
    for of_tokens, found in ((True, True), (False, False)):
        manifest = read_json(path)
        assert manifest is not None
        model = manifest["model"]
        model["stacks"] = [{**model["stacks"][0], "of_tokens": of_tokens}, {"stack": "cross", "layers": 0, "heads": 0}]
        model |= {"stack": None, "layers": None, "heads": None}
        write_json(path, manifest)
        assert any(name == "rows" for _, name in checks(verify(dataset))) == found


def test_a_lost_row(dataset: Path) -> None:
    rewrite(dataset, HEADS, lambda table: table.slice(1))
    assert (HEADS, "row count") in checks(verify(dataset))


def test_a_lost_head(dataset: Path) -> None:
    rewrite(dataset, HEADS, lambda table: table.filter(pc.field("head") != 2))
    assert (HEADS, "row count") in checks(verify(dataset))


def test_a_row_twice(dataset: Path) -> None:
    rewrite(dataset, HEADS, lambda table: pa.concat_tables([table.slice(0, 1), table]))
    assert {(HEADS, "keys"), (HEADS, "row count")} <= checks(verify(dataset))


@pytest.mark.parametrize("table", ["heads", "residual", "profiles", "sequences", "weights"])
def test_rows_out_of_order(dataset: Path, table: str) -> None:
    part = f"{table}/shard-00000.parquet"
    rewrite(dataset, part, lambda rows: rows.take(list(reversed(range(rows.num_rows)))))
    assert (part, "order") in checks(verify(dataset))


@pytest.mark.parametrize("profile", ["offset", "received_by_position", "max_weight", "entropy_by_position"])
def test_profiles_that_do_not_add_up(dataset: Path, profile: str) -> None:
    part = "profiles/shard-00000.parquet"

    def change(table: pa.Table) -> pa.Table:
        hit = np.array(table["profile"].to_pylist()) == profile
        for name in ("sum", "count"):
            table = change_column(name, lambda values: np.where(hit, 2 * values, values))(table)
        return table

    rewrite(dataset, part, change)
    found = [f.message for f in verify(dataset) if f.check == "profile sums"]
    assert found
    assert all(profile in message for message in found)


def test_profiles_of_another_shard(dataset: Path) -> None:
    part = "profiles/shard-00000.parquet"
    rewrite(dataset, part, change_column("shard", set_first_row(9)))
    assert (part, "shard") in checks(verify(dataset))


def test_a_sequence_of_no_document(dataset: Path) -> None:
    rewrite(dataset, "sequences/shard-00000.parquet", change_column("document_id", lambda ids: ids + 100))
    assert ("documents, sequences", "links") in checks(verify(dataset))


def test_documents_that_miscount_their_sequences(dataset: Path) -> None:
    rewrite(dataset, "documents/shard-00000.parquet", change_column("sequences", lambda counts: counts + 1))
    assert ("documents, sequences", "links") in checks(verify(dataset))


def test_sequences_that_are_not_numbered_from_zero(dataset: Path) -> None:
    rewrite(dataset, "sequences/shard-00000.parquet", change_column("sequence_id", lambda ids: ids + 1))
    assert ("sequences", "keys") in checks(verify(dataset))


def test_a_column_that_is_missing_is_found(dataset):
    rewrite(dataset, HEADS, lambda t: t.drop_columns(["mass_number"]))
    assert any("lacks mass_number" in f.message for f in verify(dataset))
