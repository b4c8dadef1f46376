"""A dataset on disk: parts, shard records, the manifest. Nothing exists until its atomic rename.

OUT/manifest.json            written last: without it there is no dataset
OUT/README.md                the dataset card
OUT/heads/shard-00000.parquet …
OUT/_work/                   plan, spool and shard records of an unfinished run; gone when it is finished

Whose folder it is stands in _work/run.json, which is created and never changed; one run writes at a time, by a lock. All
else in _work can be made again, and is where it is damaged.
"""

import errno
import json
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from extract.errors import Damaged
from extract.errors import Refusal as Refusal
from extract.files import discard, put_if_absent, read_sealed, sealed, write_sealed, written_whole
from extract.files import file_sha256 as file_sha256
from extract.files import read_json as read_json
from extract.files import write_atomically as write_atomically
from extract.files import write_json as write_json
from extract.lock import Lock, refuse_busy, release_lock, take_lock
from extract.manifest import PART, check_manifest
from extract.shapes import Malformed, count, mapping, record, sha256
from extract.tables import TABLES

MANIFEST = "manifest.json"
CARD = "README.md"
WORK = "_work"
_RUN = "run.json"
_LOCK = "lock"
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
    spool: str  # SHA-256 of what was measured: a shard planned otherwise is another shard


_RECORD = record(
    {"shard": count, "parts": mapping(PART), "facts": record({"positions": count, "padded": count}), "spool": sha256}
)


@dataclass(frozen=True)
class Store:
    """The folder of one dataset."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / WORK

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where there is none. Refuses one that is damaged or of another version, by its key."""
        try:
            manifest = read_json(self.root / MANIFEST)
            if manifest is not None:
                check_manifest(manifest)
        except (Damaged, Malformed) as error:
            raise Refusal(
                f"a manifest is as attlas wrote it; {self.root / MANIFEST}: {error}; "
                "restore the file from a copy, or measure again into another folder"
            ) from error
        return manifest

    def held_run(self) -> dict[str, Any] | None:
        """The parameters of the run that the folder holds, finished or not. Refuses what can't tell them any more."""
        try:
            unfinished = read_sealed(self.work / _RUN)
        except Damaged as error:
            if self.manifest is None:
                raise Refusal(
                    f"{self.work / _RUN} says which run a folder holds, and it is damaged: {error}; "
                    f"give --out another folder, or remove {self.root} to measure anew"
                ) from error
            unfinished = None
        # the manifest last: a run that ends writes it before its working folder goes
        return unfinished or (self.manifest or {}).get("run")

    def refuse_foreign(self) -> None:
        """Refuse a place that is no folder, or a folder that holds something and no run."""
        if self.root.exists() and not self.root.is_dir():
            raise Refusal(f"the output must be a folder; {self.root} is a file; give --out another name")
        held = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        if not held or self._only_an_unfinished_claim(held):
            return
        try:
            is_a_run, why = self.held_run() is not None, ", ".join(held[:3])
        except Refusal as refusal:
            is_a_run, why = False, str(refusal)
        if not is_a_run:
            raise Refusal(
                f"the output folder must be new, empty or hold the same run; {self.root} holds something else "
                f"({why}) and no run, of which {MANIFEST} or {WORK}/{_RUN} would tell; give --out another folder"
            )

    def _only_an_unfinished_claim(self, held: list[str]) -> bool:
        """A run that was killed while it took the folder leaves no more than a lock or a temporary file in _work."""
        if held != [WORK] or not self.work.is_dir():
            return False
        return all(path.name == _LOCK or path.name.endswith(".tmp") for path in self.work.iterdir())

    def refuse_busy(self) -> None:
        """Refuse a folder that another process or thread writes into now."""
        refuse_busy(self.work / _LOCK, folder=self.root)

    def lock(self) -> Lock:
        """Keep everyone else from writing into the folder; refused where somebody does, and where nobody may."""
        try:
            return take_lock(self.work / _LOCK, folder=self.root)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise
            raise Refusal(
                f"the output folder must be writable; {self.root}: {error.strerror}; give --out another folder"
            ) from error

    def unlock(self) -> None:
        """Release the folder's lock if this thread holds it."""
        release_lock(self.work / _LOCK)

    def claim(self, run: Mapping[str, Any]) -> bool:
        """Take the folder for this run: True where it was nobody's, False where it is this run's already.

        Refuses a folder that holds another run or something else. Of several runs at once, one takes it.
        """
        self.refuse_foreign()
        is_new = self.held_run() is None and put_if_absent(self.work / _RUN, sealed(run))
        self.refuse_another(run)
        return is_new

    def refuse_another(self, run: Mapping[str, Any]) -> None:
        """Refuse a folder that holds a run which is not this one, with what differs."""
        held = self.held_run()
        differences = [] if held is None else _differences(held, json.loads(json.dumps(run)))
        if differences:
            where = MANIFEST if self.manifest is not None else f"{WORK}/{_RUN}"
            raise Refusal(
                f"{self.root} holds a different run, says its {where} ({'; '.join(differences)}); "
                "give --out another folder, or the same options"
            )

    def part_path(self, table: str, shard: int) -> str:
        return f"{table}/shard-{shard:05d}.parquet"

    def write_part(self, table: str, shard: int, rows: pa.Table) -> Part:
        """Write one part. Floats are byte-stream-split, so zstd finds their common exponents."""
        path = self.part_path(table, shard)
        target = self.root / path
        floats = [f.name for f in rows.schema if pa.types.is_floating(f.type)]
        others = [f.name for f in rows.schema if not pa.types.is_floating(f.type)]
        with written_whole(target) as temporary:
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
            return Part(path, rows.num_rows, temporary.stat().st_size, file_sha256(temporary))

    @property
    def has_records(self) -> bool:
        """Whether shards of the run were done before."""
        return (self.work / "records").is_dir()

    def write_record(self, record: ShardRecord) -> None:
        write_sealed(self._record_path(record.shard), asdict(record))

    def read_record(self, shard: int) -> ShardRecord | None:
        """The record of a finished shard whose parts are all there in their sizes, else None."""
        try:
            raw = read_sealed(self._record_path(shard))
            if raw is None:
                return None
            _RECORD(raw, "")
        except (Damaged, Malformed):
            return None
        parts = {table: _part(part) for table, part in raw["parts"].items()}
        in_place = all(part.path == self.part_path(table, shard) for table, part in parts.items())
        if raw["shard"] != shard or not in_place or any(_size(self.root / p.path) != p.bytes for p in parts.values()):
            return None
        return ShardRecord(shard, parts, raw["facts"], raw["spool"])

    def discard_damaged(self, shard: int, *, spool: str) -> None:
        """Remove a shard's record unless its parts are those that were written, from the spool of this SHA-256.

        Refuses what lies in the way of the parts that will be written then.
        """
        record = self.read_record(shard)
        if record is not None and record.spool == spool and all(map(self._is_as_written, record.parts.values())):
            return
        discard(self._record_path(shard))
        for table in TABLES:
            path = self.root / self.part_path(table, shard)
            refuse_obstacle(path.parent, is_folder=True)
            refuse_obstacle(path, is_folder=False)

    def discard_beyond(self, shards: int) -> None:
        """Remove parts and records of shards that the plan does not have: those of a plan that was lost."""
        parts = [path for table in TABLES for path in (self.root / table).glob("shard-*.parquet")]
        for path in [*self.work.glob("records/*.json"), *parts]:
            number = path.stem.removeprefix("shard-")
            if number.isdigit() and int(number) >= shards:
                discard(path)

    def _is_as_written(self, part: Part) -> bool:
        try:
            return file_sha256(self.root / part.path) == part.sha256
        except OSError:
            return False

    def _record_path(self, shard: int) -> Path:
        return self.work / "records" / f"{shard:05d}.json"

    def clear_obstacles(self) -> None:
        """Make room for what is written at the end and for records; refuses what is not ours to remove."""
        refuse_obstacle(self.root / CARD, is_folder=False)
        records = self.work / "records"
        if records.exists() and not records.is_dir():
            discard(records)

    def finish(self, manifest: Mapping[str, Any], card: str) -> None:
        """Make the dataset exist: the card, then the manifest; the working folder goes."""
        write_atomically(self.root / CARD, card.encode())
        write_json(self.root / MANIFEST, dict(manifest))
        self.clear_work()

    def clear_work(self) -> None:
        """Remove what only an unfinished run needs, token ids among it, and temporary files of killed writers."""
        shutil.rmtree(self.work, ignore_errors=True)
        for leftover in [*self.root.glob("*.tmp"), *self.root.glob("*/*.tmp")]:
            if leftover.is_file() or leftover.is_symlink():
                leftover.unlink(missing_ok=True)


def refuse_obstacle(path: Path, *, is_folder: bool) -> None:
    """Refuse a path at which something else lies than the file or folder that will be written there."""
    if path.is_symlink() and not path.exists():
        is_free = not is_folder  # a broken link; a file takes its place
    else:
        is_free = not path.exists() or path.is_dir() == is_folder
    if not is_free:
        kind, came = ("folder", "something else") if is_folder else ("file", "a folder")
        raise Refusal(f"a {kind} is to be written at {path}, where {came} lies; move it away and run again")


def _size(path: Path) -> int:
    """The size of a regular file, not followed if it is a link; −1 for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    names = sorted(held.keys() | asked.keys())
    return [f"{n}: there {held.get(n)!r}, asked {asked.get(n)!r}" for n in names if held.get(n) != asked.get(n)]


def open_dataset(folder: Path | str) -> tuple[Path, dict[str, Any]]:
    """A finished dataset's folder and its manifest, whose shape is checked. Raises Refusal for anything else."""
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
        yield _part(part)


def _part(raw: Mapping[str, Any]) -> Part:
    return Part(raw["path"], raw["rows"], raw["bytes"], raw["sha256"])
