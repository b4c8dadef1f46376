"""A dataset of another version of the schema is refused by name, with the way to read it."""

import json
from pathlib import Path

import pytest

from attlas.extract.errors import Refusal
from attlas.extract.store import MANIFEST, Storage, open_dataset
from attlas.extract.tables import SCHEMA_VERSION


def with_manifest(storage: Storage, **manifest: object) -> Storage:
    storage.put(MANIFEST, json.dumps(manifest).encode())
    return storage


@pytest.mark.parametrize(
    ("version", "software", "message"),
    [
        (
            SCHEMA_VERSION - 1,
            {"attlas": "0.1.7"},
            "that of an older attlas, 0.1.7; read it with that version, or measure again into another folder",
        ),
        (SCHEMA_VERSION + 1, {"attlas": "9.0"}, "that of a newer attlas, 9.0; read it with that version"),
        (SCHEMA_VERSION + 1, {"attlas": "9\x1b[2J"}, "that of a newer attlas; read it with that version"),
        (SCHEMA_VERSION + 1, None, "that of a newer attlas; read it with that version"),
    ],
)
def test_an_older_and_a_newer_version_are_told_apart(
    storage: Storage, version: int, software: object, message: str
) -> None:
    """Whatever else such a manifest holds: its keys are another version's."""
    with pytest.raises(Refusal) as refused:
        open_dataset(with_manifest(storage, schema_version=version, software=software))
    rule = f"{storage.place(MANIFEST)}: schema_version must be {SCHEMA_VERSION}, which this attlas reads"
    assert str(refused.value) == f"{rule}; got {version}, {message}"


@pytest.mark.parametrize("version", [None, True, "1", float(SCHEMA_VERSION), -1, 10**30])
def test_what_is_no_version_is_a_damaged_manifest(storage: Storage, version: object) -> None:
    with pytest.raises(Refusal, match=f"a manifest is as attlas wrote it; .*schema_version must be {SCHEMA_VERSION}"):
        open_dataset(with_manifest(storage, schema_version=version))


def test_a_run_into_a_folder_with_an_older_dataset_says_so(tmp_path: Path) -> None:
    from attlas.extract.store import LocalFolder, Store

    storage = with_manifest(LocalFolder(tmp_path), schema_version=SCHEMA_VERSION - 1)
    with pytest.raises(Refusal, match=r"holds something else \(.*that of an older attlas.*; give --out another folder"):
        Store(storage).refuse_foreign()
