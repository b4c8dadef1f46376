"""A dataset on disk: parts, shard records, the manifest. Nothing exists until its atomic rename.

OUT/manifest.json            written last: without it there is no dataset
OUT/README.md                the dataset card
OUT/heads/shard-00000.parquet …
OUT/_work/                   plan, spool and shard records of an unfinished run; gone when it is finished
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from extract.errors import Refusal as Refusal

MANIFEST = "manifest.json"
CARD = "README.md"
WORK = "_work"
_RUN = "run.json"
# nearly all of a part are the last digits of floats, which nothing packs: 3 gives 0.5 % more bytes, 15 gives 2 % less for
# six times the time
_LEVEL = 6


@dataclass(frozen=True)
class Part:
    """One Parquet file of a table."""

    path: str  # relative to the dataset, with forward slashes
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """Written after all parts of a shard are in place: the shard is done."""

    shard: int
    parts: Mapping[str, Part]
    facts: Mapping[str, Any]  # counts that the manifest adds up


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def read_json(path: Path) -> Any | None:
    """The file's value, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Store:
    """The folder of one dataset."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / WORK

    @property
    def manifest(self) -> dict[str, Any] | None:
        return read_json(self.root / MANIFEST)

    def held_run(self) -> dict[str, Any] | None:
        """The parameters of the run that the folder holds, finished or not."""
        return read_json(self.work / _RUN) or (self.manifest or {}).get("run")

    def refuse_foreign(self) -> None:
        """Refuse a place that is no folder, or a folder that holds something and no run."""
        if self.root.exists() and not self.root.is_dir():
            raise Refusal(f"the output must be a folder; {self.root} is a file; give --out another name")
        held = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        if held and self.held_run() is None and not self._only_an_unfinished_claim(held):
            raise Refusal(
                f"the output folder must be new, empty or hold the same run; {self.root} holds something else "
                f"({', '.join(held[:3])}); give --out another folder"
            )

    def _only_an_unfinished_claim(self, held: list[str]) -> bool:
        """A run that was killed while it took the folder leaves an empty working folder, or a temporary file in it."""
        return held == [WORK] and all(path.name.endswith(".tmp") for path in self.work.iterdir())

    def claim(self, run: Mapping[str, Any]) -> None:
        """Take the folder for this run, or refuse it where it holds another run or something else."""
        self.refuse_foreign()
        held = self.held_run()
        if held is None:
            write_json(self.work / _RUN, dict(run))
            return
        differences = _differences(held, json.loads(json.dumps(run)))
        if differences:
            raise Refusal(
                f"{self.root} holds a different run ({'; '.join(differences)}); "
                "give --out another folder, or the same options"
            )

    def part_path(self, table: str, shard: int) -> str:
        return f"{table}/shard-{shard:05d}.parquet"

    def write_part(self, table: str, shard: int, rows: pa.Table) -> Part:
        """Write one part. Floats are byte-stream-split, so zstd finds their common exponents."""
        path = self.part_path(table, shard)
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        floats = [f.name for f in rows.schema if pa.types.is_floating(f.type)]
        others = [f.name for f in rows.schema if not pa.types.is_floating(f.type)]
        pq.write_table(
            rows,
            temporary,
            compression="zstd",
            compression_level=_LEVEL,
            use_dictionary=others,  # pyright: ignore[reportArgumentType]
            use_byte_stream_split=floats,  # pyright: ignore[reportArgumentType]
            store_schema=True,
            row_group_size=1 << 17,
        )
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        part = Part(path, rows.num_rows, temporary.stat().st_size, file_sha256(temporary))
        temporary.replace(target)
        return part

    def write_record(self, record: ShardRecord) -> None:
        write_json(self.work / "records" / f"{record.shard:05d}.json", asdict(record))

    def read_record(self, shard: int) -> ShardRecord | None:
        """The record of a finished shard whose parts are all there, else None."""
        raw = read_json(self.work / "records" / f"{shard:05d}.json")
        if raw is None:
            return None
        parts = {table: Part(**part) for table, part in raw["parts"].items()}
        whole = all(_size(self.root / p.path) == p.bytes for p in parts.values())
        return ShardRecord(raw["shard"], parts, raw["facts"]) if whole else None

    def finish(self, manifest: Mapping[str, Any], card: str) -> None:
        """Make the dataset exist: the card, then the manifest; the working folder goes."""
        write_atomically(self.root / CARD, card.encode())
        write_json(self.root / MANIFEST, dict(manifest))
        self.clear_work()

    def clear_work(self) -> None:
        """Remove what only an unfinished run needs, token ids among it, and temporary files of killed writers."""
        shutil.rmtree(self.work, ignore_errors=True)
        for leftover in [*self.root.glob("*.tmp"), *self.root.glob("*/*.tmp")]:
            leftover.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    names = sorted(held.keys() | asked.keys())
    return [f"{n}: there {held.get(n)!r}, asked {asked.get(n)!r}" for n in names if held.get(n) != asked.get(n)]


def open_dataset(folder: Path | str) -> tuple[Path, dict[str, Any]]:
    """A finished dataset's folder and manifest; refuses one that is not finished."""
    root = Path(folder)
    if not root.is_dir():
        raise Refusal(f"a dataset is a folder; there is none at {root}; give the --out of a finished run")
    manifest = Store(root).manifest
    if manifest is None:
        state = "an unfinished run" if (root / WORK).exists() else "no manifest.json"
        raise Refusal(f"a dataset has a manifest; {root} holds {state}; finish it with the same attlas run")
    return root, manifest


def parts_of(manifest: Mapping[str, Any], table: str) -> Iterator[Part]:
    """The parts of a table, in shard order."""
    for part in manifest["tables"].get(table, {"parts": []})["parts"]:
        yield Part(**part)
