"""Everything that opens a dataset refuses a damaged or forged manifest, and names it in the message."""

import copy
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.info import describe
from attlas.analysis.judge import judge
from attlas.analysis.query import query
from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract.store import MANIFEST, Refusal, open_dataset, parts_of
from attlas.extract.tables import SCHEMA_VERSION
from tests.analysis.synthetic import write_dataset

DEEP = json.loads("[" * 300 + "]" * 300)
WRONG_VALUES: list[Any] = [
    None,
    True,
    -1,
    0.5,
    1 << 63,
    10**400,
    "",
    "x\x1b[2J\nforged: line",
    [],
    [[1]],
    {},
    {"a": {"b": 1}},
    DEEP,
]
READERS: dict[str, Callable[[Path], object]] = {
    "info": lambda root: describe(open_dataset(root)[1]),
    "report": lambda root: write_report(root, root.parent / "page.html"),
    "query": lambda root: query(root, "SELECT count(*) FROM heads"),
    "verify": verify,
    "findings": lambda root: judge(Dataset.open(root)),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("forged") / "d", documents=3, layers=1, heads=2)


@pytest.fixture(scope="module")
def manifest(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / MANIFEST).read_text())


@pytest.fixture
def forge(dataset: Path) -> Iterator[Callable[[bytes | dict[str, Any]], Path]]:
    """Write another manifest to the dataset; the original is restored after the test."""
    before = (dataset / MANIFEST).read_bytes()

    def write(content: bytes | dict[str, Any]) -> Path:
        (dataset / MANIFEST).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return dataset

    yield write
    (dataset / MANIFEST).write_bytes(before)


def value_paths(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every nested value; of each list only the first item."""
    yield above
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, entry in inner:
        yield from value_paths(entry, (*above, key))


def with_change(
    manifest: dict[str, Any], place: tuple[str | int, ...], change: Callable[[Any, Any], None]
) -> dict[str, Any]:
    """A copy of the manifest in which `change` was applied to the parent of the value at this path."""
    copy_run = copy.deepcopy(manifest)
    parent: Any = copy_run
    for key in place[:-1]:
        parent = parent[key]
    change(parent, place[-1])
    return copy_run


def refusal_message(read: Callable[[Path], object], root: Path) -> str | None:
    """The message with which a reader refuses the dataset; None if it accepts it. Other errors propagate."""
    try:
        read(root)
    except Refusal as refusal:
        return str(refusal)
    return None


def tampered_manifests(manifest: dict[str, Any]) -> Iterator[tuple[object, dict[str, Any]]]:
    """Copies of the manifest with each value replaced by each wrong value, and with each key removed."""
    for place in [p for p in value_paths(manifest) if p]:
        for value in WRONG_VALUES:
            yield (
                (place, value),
                with_change(manifest, place, lambda parent, key, value=value: operator.setitem(parent, key, value)),
            )
        yield (place, "left out"), with_change(manifest, place, lambda parent, key: parent.pop(key))


def test_any_value_of_another_type_and_any_missing_key(forge, manifest: dict[str, Any]) -> None:
    refused = 0
    for what, forged in tampered_manifests(manifest):
        message = refusal_message(READERS["info"], forge(forged))
        if message is not None:
            assert MANIFEST in message, what
            assert message.isprintable(), what
            refused += 1
    assert refused > 500


@pytest.mark.exhaustive
def test_every_reader_refuses_the_same_manifests_in_the_same_words(forge, manifest: dict[str, Any]) -> None:
    """The readers take turns."""
    for (what, forged), (name, read) in zip(
        tampered_manifests(manifest), itertools.cycle(READERS.items()), strict=False
    ):
        root = forge(forged)
        message, answer = refusal_message(open_dataset, root), refusal_message(read, root)
        assert answer == message or (message is None and MANIFEST not in str(answer)), (name, what)


def damaged_contents(manifest: dict[str, Any]) -> dict[str, bytes]:
    content = json.dumps(manifest).encode()
    return {
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "null bytes": bytes(len(content)),
        "not UTF-8": content.replace(b"known", b"kn\xffwn", 1),
        "UTF-16": content.decode().encode("utf-16"),
        "half a surrogate pair": content.replace(b"known", b"\\ud800", 1),
        "two values": content + content,
        "NaN": content.replace(b"0.1", b"NaN", 1),
        "infinite": content.replace(b"0.1", b"1e999", 1),
        "no end of digits": content.replace(b"0.1", b"1" * 5000, 1),
        "nested beyond the parser": b"[" * 10**6,
        "a list": b"[]",
        "null": b"null",
        "a number": b"7",
        "no keys": b"{}",
    }


@pytest.mark.parametrize("name", list(damaged_contents({})))
def test_damaged_bytes(forge, manifest: dict[str, Any], name: str) -> None:
    root = forge(damaged_contents(manifest)[name])
    message = refusal_message(open_dataset, root)
    assert message is not None
    assert MANIFEST in message
    assert {refusal_message(read, root) for read in READERS.values()} == {message}


def replace_manifest(path: Path, name: str) -> None:
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
    replace_manifest(root / MANIFEST, name)
    message = refusal_message(open_dataset, root)
    assert message is not None
    assert MANIFEST in message
    assert {refusal_message(read, root) for read in READERS.values()} == {message}


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, SCHEMA_VERSION - 1, float(SCHEMA_VERSION), "1", None])
def test_another_schema_version_is_refused_by_name(forge, manifest: dict[str, Any], version: object) -> None:
    root = forge(manifest | {"schema_version": version})
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
def test_a_part_outside_its_tables_folder_is_refused(forge, manifest: dict[str, Any], path: str) -> None:
    forged = copy.deepcopy(manifest)
    forged["tables"]["heads"]["parts"][0]["path"] = path
    with pytest.raises(Refusal, match=r"tables\.heads must be"):
        open_dataset(forge(forged))


def test_a_repeated_part_and_an_unknown_table_are_refused(forge, manifest: dict[str, Any]) -> None:
    forged = copy.deepcopy(manifest)
    forged["tables"]["heads"]["parts"] *= 2
    with pytest.raises(Refusal, match="parts that are named once each"):
        open_dataset(forge(forged))
    forged = copy.deepcopy(manifest)
    forged["tables"]["sqlite_master"] = {"rows": 0, "parts": []}
    with pytest.raises(Refusal, match="a key of tables must be one of documents"):
        open_dataset(forge(forged))


def test_keys_that_a_later_version_may_add_are_left_alone(forge, manifest: dict[str, Any]) -> None:
    forged = copy.deepcopy(manifest)
    forged["later"] = forged["tables"]["heads"]["parts"][0]["later"] = {"more": [1]}
    _, read = open_dataset(forge(forged))
    assert len(list(parts_of(read, "heads"))) == len(manifest["tables"]["heads"]["parts"])
