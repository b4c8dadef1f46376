"""Commands on damaged datasets answer, refuse (exit code 2) or report findings (3), always in words and without a traceback."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.tables import TABLES
from attlas.flows.cli import exit_code
from tests.analysis.synthetic import WRITTEN, with_new_checksums, write_dataset
from tests.files import read_json, write_json

COMMANDS = ("info", "report", "query", "verify", "findings")
# names of exceptions and messages of Rust panics (DuckDB writes "Catalog Error")
RAW = re.compile(r"Traceback|panicked|\b\w+(Error|Exception)\b|Arrow[A-Z]\w+")
QUERY = "SELECT * FROM heads JOIN sequences USING (sequence_id), documents, profiles, residual LIMIT 1"
REMOVED = object()
VALUES: dict[str, Any] = {
    "removed": REMOVED,
    "null": None,
    "text": "\x1b[31m?",
    "number": -1,
    "fraction": 0.5,
    "flag": True,
    "empty list": [],
    "empty object": {},
    "huge": 10**40,
    "not a number": float("nan"),
    "list": [[["x"]]],
    "object": {"x": {"y": None}},
    "long": "x" * 100_000,
    "no unicode": "\ud800",
}

RunCommand = Callable[[str, Path], tuple[int, str]]  # exit code and output


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("intact") / "d", documents=3, layers=1, heads=2, lengths=(5, 7))


@pytest.fixture
def dataset(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "d")


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    def run(command: str, folder: Path) -> tuple[int, str]:
        code = exit_code([command, str(folder), *([QUERY] if command == "query" else [])])
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key of a manifest; of each list only the first item."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


def with_value(manifest: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(manifest)
    inner: Any = copied
    for key in place[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copied


def assert_in_words(code: int, output: str) -> None:
    assert code in (0, 2, 3), output
    assert not RAW.search(output), output
    assert output.strip()


def run_every_command(folder: Path, run_command: RunCommand) -> dict[str, int]:
    codes = {}
    for command in COMMANDS:
        codes[command], output = run_command(command, folder)
        assert_in_words(codes[command], output)
    return codes


def write_manifest(folder: Path, manifest: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_every_command_accepts_an_intact_dataset(dataset: Path, run_command: RunCommand) -> None:
    assert set(run_every_command(dataset, run_command).values()) == {0}


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        (("model", "name"), "null"),
        (("model", "stacks", 0, "layers"), "text"),
        (("model", "layout", "attention", 0, "heads"), "removed"),
        (("model", "width"), "number"),
        (("corpus", "tokens"), "huge"),
        (("corpus",), "null"),
        (("corpus", "dropped"), "list"),
        (("padding_waste",), "not a number"),
        (("tables", "heads"), "object"),
        (("tables", "heads", "parts"), "removed"),
        (("tables", "heads", "parts", 0, "path"), "no unicode"),
        (("tables", "sequences", "parts", 0, "rows"), "flag"),
    ],
)
def test_a_fact_of_another_kind(dataset: Path, run_command: RunCommand, place: tuple[Any, ...], kind: str) -> None:
    write_manifest(dataset, with_value(read_json(dataset / "manifest.json") or {}, place, VALUES[kind]))
    run_every_command(dataset, run_command)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", VALUES)
def test_every_fact_of_another_kind(dataset: Path, run_command: RunCommand, kind: str) -> None:
    """Every fact once, with the kinds in turn: all of each would be thousands of reports."""
    manifest = read_json(dataset / "manifest.json")
    assert manifest is not None
    for place in list(places(manifest))[list(VALUES).index(kind) :: len(VALUES)]:
        write_manifest(dataset, with_value(manifest, place, VALUES[kind]))
        run_every_command(dataset, run_command)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"\x00" * 9,
        b"[" * 100_000,
        b'{"tables": {"heads": ' + b"9" * 5000,
    ],
)
def test_a_garbled_manifest_is_refused(dataset: Path, run_command: RunCommand, content: bytes) -> None:
    (dataset / "manifest.json").write_bytes(content)
    assert set(run_every_command(dataset, run_command).values()) == {2}


def test_a_folder_in_the_manifests_place_is_refused(dataset: Path, run_command: RunCommand) -> None:
    (dataset / "manifest.json").unlink()
    (dataset / "manifest.json").mkdir()
    assert set(run_every_command(dataset, run_command).values()) == {2}


def test_a_refusal_names_the_fact(dataset: Path, run_command: RunCommand) -> None:
    manifest = read_json(dataset / "manifest.json") or {}
    write_manifest(dataset, with_value(manifest, ("model", "stacks", 0, "layers"), "two"))
    for command in COMMANDS:
        code, output = run_command(command, dataset)
        assert code == 2
        assert re.search(r"model\.stacks.*layers must be .* got 'two'", output)


# --- parts ---------------------------------------------------------------------------------------------------------


def other_table(name: str) -> str:
    return "profiles" if name != "profiles" else "heads"


def flip_byte(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]


def byte_damages(table: str, root: Path) -> dict[str, Callable[[Path], object]]:
    def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(change(path.read_bytes()))

    def replace_by_folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    return {
        "truncated": with_bytes(lambda raw: raw[: len(raw) // 2]),
        "without its end": with_bytes(lambda raw: raw[:-9]),
        "emptied": with_bytes(lambda raw: b""),
        "garbled header": with_bytes(lambda raw: b"XXXX" + raw[4:]),
        "garbled footer": with_bytes(lambda raw: flip_byte(raw, len(raw) - 100)),
        "flipped early": with_bytes(lambda raw: flip_byte(raw, 60)),
        "flipped in the middle": with_bytes(lambda raw: flip_byte(raw, len(raw) // 3)),
        "text": with_bytes(lambda raw: b"sequence_id,layer\n1,2\n"),
        "missing": lambda path: path.unlink(),
        "a folder": replace_by_folder,
        "of another table": lambda path: shutil.copy(root / other_table(table) / path.name, path),
    }


def row_damages(table: str) -> dict[str, Callable[[pa.Table], pa.Table]]:
    first = next(key.name for key in TABLES[table].keys if key.dtype.startswith("int"))
    facts = TABLES[table].facts
    statistic = next((c.name for c in facts if c.nullable), facts[-1].name)
    numeric = next(c.name for c in TABLES[table].facts if c.dtype.startswith(("int", "float")))

    def fill_column(name: str, value: Any, dtype: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
        def change(rows: pa.Table) -> pa.Table:
            at = rows.schema.get_field_index(name)
            kind = dtype or rows.schema.field(at).type
            return rows.set_column(at, pa.field(name, kind), pa.array([value] * rows.num_rows, kind))

        return change

    damages = {
        "key dropped": lambda rows: rows.drop_columns([first]),
        "column dropped": lambda rows: rows.drop_columns([c for c in [statistic] if c in rows.column_names]),
        "only a stranger": lambda rows: pa.table({"x": list(range(rows.num_rows))}),
        "retyped": fill_column(numeric, "text", pa.string()),
        "nested": fill_column(numeric, [1], pa.list_(pa.int64())),
        "narrowed": fill_column(first, 1, pa.int8()),
        "column twice": lambda rows: rows.append_column(first, rows[first]),
        "rows twice": lambda rows: pa.concat_tables([rows, rows]),
        "no rows": lambda rows: rows.slice(0, 0),
        "null key": fill_column(first, None),
        "negative key": fill_column(first, -1),
        "null numbers": fill_column(numeric, None),
        "huge key": fill_column(first, 2**31 - 1, pa.int64()),
    }
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("huge", 3e38), ("negative", -3e38)):
        floats = [c.name for c in TABLES[table].facts if c.core and c.dtype.startswith("float")]
        if floats:
            damages[f"{name} everywhere"] = lambda rows, floats=floats, value=value: _fill_columns(rows, floats, value)
    return damages


def _fill_columns(rows: pa.Table, names: list[str], value: float) -> pa.Table:
    for name in names:
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array([value] * rows.num_rows, rows.schema.field(at).type))
    return rows


def damage_rows(folder: Path, table: str, damage: str, *, every_part: bool) -> None:
    """Rewrite parts with the damage and update sizes, row counts and checksums in the manifest: only the rows are wrong."""
    for path in sorted((folder / table).glob("*.parquet"))[: None if every_part else 1]:
        pq.write_table(row_damages(table)[damage](pq.read_table(path)), path)
    write_json(folder / "manifest.json", with_new_checksums(folder, read_json(folder / "manifest.json") or {}))


@pytest.mark.parametrize("table", ["documents", "sequences", "heads", "residual", "profiles"])
def test_a_part_that_is_missing_or_truncated_is_refused_and_found(
    dataset: Path, run_command: RunCommand, table: str
) -> None:
    part = next(iter(sorted((dataset / table).glob("*.parquet"))))
    part.write_bytes(part.read_bytes()[:-9])
    codes = run_every_command(dataset, run_command)
    of_findings = 0 if table == "documents" else 2  # which are in the summaries already
    assert codes == {"info": 0, "report": 2, "query": 2, "verify": 3, "findings": of_findings}
    for command in ("report", "query"):
        assert f"{table}/{part.name}: it cannot be read as Parquet" in run_command(command, dataset)[1]


@pytest.mark.parametrize("damage", ["of another table", "a folder", "flipped in the middle"])
def test_a_part_of_other_bytes(dataset: Path, run_command: RunCommand, damage: str) -> None:
    part = next(iter(sorted((dataset / "heads").glob("*.parquet"))))
    byte_damages("heads", dataset)[damage](part)
    assert run_every_command(dataset, run_command)["verify"] == 3


@pytest.mark.parametrize(
    ("damage", "answered"),
    [
        ("column dropped", True),  # as in a dataset written before the column existed
        ("key dropped", False),
        ("retyped", False),
        ("null key", False),
        ("negative key", False),
        ("inf everywhere", True),  # left out of the report, with a note
    ],
)
def test_rows_that_the_manifest_vouches_for(
    dataset: Path, run_command: RunCommand, damage: str, answered: bool
) -> None:
    damage_rows(dataset, "heads", damage, every_part=True)
    codes = run_every_command(dataset, run_command)
    assert (codes["report"], codes["verify"]) == (0 if answered else 2, 3)
    if damage == "inf everywhere":
        assert "NaN and infinities in heads are left out of every number here" in run_command("report", dataset)[1]


def turn(damages: Iterable[str], table: str, *, of: int) -> list[str]:
    """One in so many of the damages, others for each table, so that tables with such columns have all between them; heads all."""
    return list(damages)[0 if table == "heads" else WRITTEN.index(table) % of :: 1 if table == "heads" else of]


@pytest.mark.exhaustive
@pytest.mark.parametrize("table", WRITTEN)
def test_every_damage_to_the_bytes_of_tables(intact: Path, tmp_path: Path, run_command: RunCommand, table: str) -> None:
    for number, damage in enumerate(turn(byte_damages(table, intact), table, of=4)):
        folder = shutil.copytree(intact, tmp_path / str(number))
        byte_damages(table, folder)[damage](folder / table / "shard-00000.parquet")
        assert run_every_command(folder, run_command)["verify"] == 3, damage


@pytest.mark.exhaustive
@pytest.mark.parametrize("table", WRITTEN)
def test_every_damage_to_the_rows_of_tables(intact: Path, tmp_path: Path, run_command: RunCommand, table: str) -> None:
    for number, damage in enumerate(turn(row_damages(table), table, of=3)):
        folder = shutil.copytree(intact, tmp_path / str(number))
        damage_rows(folder, table, damage, every_part=number % 2 == 0)
        run_every_command(folder, run_command)


@pytest.mark.exhaustive
@pytest.mark.parametrize("update_checksum", [True, False])
def test_a_flipped_byte_anywhere(intact: Path, tmp_path: Path, run_command: RunCommand, update_checksum: bool) -> None:
    content = (intact / "heads" / "shard-00000.parquet").read_bytes()
    folder = shutil.copytree(intact, tmp_path / "d")
    manifest = read_json(folder / "manifest.json") or {}
    for at in range(7 * update_checksum, len(content), len(content) // 20):
        (folder / "heads" / "shard-00000.parquet").write_bytes(flip_byte(content, at))
        if update_checksum:
            write_json(folder / "manifest.json", _with_checksums(folder, manifest))
        run_every_command(folder, run_command)


def _with_checksums(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    from tests.files import file_sha256

    copied = copy.deepcopy(manifest)
    for part in copied["tables"]["heads"]["parts"]:
        part["sha256"] = file_sha256(folder / part["path"])
    return copied


@pytest.mark.parametrize("table", WRITTEN)
def test_a_dataset_without_a_table_is_answered(dataset: Path, run_command: RunCommand, table: str) -> None:
    manifest = read_json(dataset / "manifest.json") or {}
    del manifest["tables"][table]
    write_json(dataset / "manifest.json", manifest)
    shutil.rmtree(dataset / table)
    codes = run_every_command(dataset, run_command)
    assert (codes["info"], codes["report"], codes["verify"]) == (
        0,
        2 if table == "heads" else 0,
        3 if TABLES[table].is_always_written or table in ("residual", "summaries") else 0,  # sums are made of them
    )


def test_a_part_that_unpacks_beyond_measure_is_refused(dataset: Path, run_command: RunCommand) -> None:
    part = dataset / "heads" / "shard-00000.parquet"
    pq.write_table(pa.table({"sequence_id": pa.repeat(0, 3_000_000)}), part, compression="zstd", row_group_size=1 << 20)
    write_json(dataset / "manifest.json", with_new_checksums(dataset, read_json(dataset / "manifest.json") or {}))
    codes = run_every_command(dataset, run_command)
    assert codes == {"info": 0, "report": 2, "query": 2, "verify": 3, "findings": 2}
    assert "it claims 3,000,000 rows in" in run_command("verify", dataset)[1]
