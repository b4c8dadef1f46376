"""A manifest that was damaged or forged is refused in words that name it, by everything that opens a dataset."""

import copy
import json
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attlas.analysis.info import describe
from attlas.analysis.query import query
from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract.store import MANIFEST, Refusal, open_dataset, parts_of
from attlas.extract.tables import SCHEMA_VERSION
from tests.analysis.synthetic import write_dataset

DEEP = json.loads("[" * 300 + "]" * 300)
WRONG = [None, True, -1, 0.5, 1 << 63, 10**400, "", "x\x1b[2J\nforged: line", [], [[1]], {}, {"a": {"b": 1}}, DEEP]
READERS: dict[str, Callable[[Path], object]] = {
    "info": lambda root: describe(open_dataset(root)[1]),
    "report": lambda root: write_report(root, root.parent / "page.html"),
    "query": lambda root: query(root, "SELECT count(*) FROM heads"),
    "verify": verify,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("forged") / "d", documents=3, layers=1, heads=2)


@pytest.fixture(scope="module")
def manifest(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / MANIFEST).read_text())


@pytest.fixture
def forged(dataset: Path) -> Iterator[Callable[[bytes | dict[str, Any]], Path]]:
    """Put another manifest into the dataset until the test ends."""
    before = (dataset / MANIFEST).read_bytes()

    def forge(content: bytes | dict[str, Any]) -> Path:
        (dataset / MANIFEST).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return dataset

    yield forge
    (dataset / MANIFEST).write_bytes(before)


def places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in a JSON value; of a list only its first entry."""
    yield above
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*above, key))


def changed(
    manifest: dict[str, Any], place: tuple[str | int, ...], change: Callable[[Any, Any], None]
) -> dict[str, Any]:
    """A copy in which the object that holds the place was changed."""
    whole = copy.deepcopy(manifest)
    holder: Any = whole
    for key in place[:-1]:
        holder = holder[key]
    change(holder, place[-1])
    return whole


def outcome(read: Callable[[Path], object], root: Path) -> str | None:
    """What a reader refuses a dataset with; None where it reads it. Any other error is the test's."""
    try:
        read(root)
    except Refusal as refusal:
        return str(refusal)
    return None


def tampered(manifest: dict[str, Any]) -> Iterator[tuple[object, dict[str, Any]]]:
    """The manifest with each value replaced by each wrong one, and with each key left out."""
    for place in [p for p in places(manifest) if p]:
        for value in WRONG:
            yield (
                (place, value),
                changed(manifest, place, lambda holder, key, value=value: operator.setitem(holder, key, value)),
            )
        yield (place, "left out"), changed(manifest, place, lambda holder, key: holder.pop(key))


def test_any_value_of_another_type_and_any_missing_key(forged, manifest: dict[str, Any]) -> None:
    refused = 0
    for what, whole in tampered(manifest):
        said = outcome(READERS["info"], forged(whole))
        if said is not None:
            assert MANIFEST in said, what
            assert said.isprintable(), what
            refused += 1
    assert refused > 500


@pytest.mark.slow
def test_every_reader_refuses_the_same_manifests_in_the_same_words(forged, manifest: dict[str, Any]) -> None:
    for what, whole in tampered(manifest):
        root = forged(whole)
        said = outcome(open_dataset, root)
        for name, read in READERS.items():
            answer = outcome(read, root)
            assert answer == said or (said is None and MANIFEST not in str(answer)), (name, what)


def bytes_of(manifest: dict[str, Any]) -> dict[str, bytes]:
    whole = json.dumps(manifest).encode()
    return {
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "null bytes": bytes(len(whole)),
        "not UTF-8": whole.replace(b"known", b"kn\xffwn", 1),
        "UTF-16": whole.decode().encode("utf-16"),
        "half a surrogate pair": whole.replace(b"known", b"\\ud800", 1),
        "two values": whole + whole,
        "NaN": whole.replace(b"0.1", b"NaN", 1),
        "infinite": whole.replace(b"0.1", b"1e999", 1),
        "no end of digits": whole.replace(b"0.1", b"1" * 5000, 1),
        "nested beyond the parser": b"[" * 10**6,
        "a list": b"[]",
        "null": b"null",
        "a number": b"7",
        "no keys": b"{}",
    }


@pytest.mark.parametrize("name", list(bytes_of({})))
def test_damaged_bytes(forged, manifest: dict[str, Any], name: str) -> None:
    root = forged(bytes_of(manifest)[name])
    said = outcome(open_dataset, root)
    assert said is not None
    assert MANIFEST in said
    assert {outcome(read, root) for read in READERS.values()} == {said}


def in_its_place(path: Path, name: str) -> None:
    path.unlink()
    if name == "a directory":
        path.mkdir()
    elif name == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)


@pytest.mark.parametrize("name", ["a directory", "a pipe", "a symlink to itself"])
def test_something_else_in_the_manifests_place(tmp_path: Path, name: str) -> None:
    root = write_dataset(tmp_path / "d", documents=2, layers=1, heads=1)
    in_its_place(root / MANIFEST, name)
    said = outcome(open_dataset, root)
    assert said is not None
    assert MANIFEST in said
    assert {outcome(read, root) for read in READERS.values()} == {said}


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, SCHEMA_VERSION - 1, float(SCHEMA_VERSION), "1", None])
def test_another_schema_version_is_refused_by_name(forged, manifest: dict[str, Any], version: object) -> None:
    root = forged(manifest | {"schema_version": version})
    with pytest.raises(Refusal, match=f"schema_version must be {SCHEMA_VERSION}"):
        open_dataset(root)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../d/heads/shard-00000.parquet",
        "heads/../heads/shard-00000.parquet",
        "./heads/shard-00000.parquet",
        "heads//shard-00000.parquet",
        "documents/shard-00000.parquet",
        "shard-00000.parquet",
        "heads/deeper/shard-00000.parquet",
        "heads\\shard-00000.parquet",
        "heads/shard-00000.parquet\0",
        "heads/*.parquet",
        "heads/",
        "",
    ],
)
def test_a_part_that_is_no_file_of_its_tables_folder(forged, manifest: dict[str, Any], path: str) -> None:
    whole = copy.deepcopy(manifest)
    whole["tables"]["heads"]["parts"][0]["path"] = path
    with pytest.raises(Refusal, match=r"tables\.heads must be"):
        open_dataset(forged(whole))


def test_a_part_that_is_named_twice_and_a_table_that_is_none(forged, manifest: dict[str, Any]) -> None:
    whole = copy.deepcopy(manifest)
    whole["tables"]["heads"]["parts"] *= 2
    with pytest.raises(Refusal, match="parts that are named once each"):
        open_dataset(forged(whole))
    whole = copy.deepcopy(manifest)
    whole["tables"]["sqlite_master"] = {"rows": 0, "parts": []}
    with pytest.raises(Refusal, match="a key of tables must be one of documents"):
        open_dataset(forged(whole))


def test_keys_that_a_later_version_may_add_are_left_alone(forged, manifest: dict[str, Any]) -> None:
    whole = copy.deepcopy(manifest)
    whole["later"] = whole["tables"]["heads"]["parts"][0]["later"] = {"more": [1]}
    _, read = open_dataset(forged(whole))
    assert len(list(parts_of(read, "heads"))) == len(manifest["tables"]["heads"]["parts"])
