"""A plan in a storage: the totals of the corpus, and a spool per shard with everything that measuring it needs.

Both are checked against their SHA-256 whenever they are read, so a shard is measured as it was planned or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields

import pyarrow as pa

from attlas.extract.errors import Damaged, first_line
from attlas.extract.shapes import Malformed, count, list_of, mapping_of, nullable, record, sha256
from attlas.extract.store import Storage
from attlas.extract.store.layout import PLAN, SPOOL, WORK, spool_key
from attlas.extract.store.sealed import get_sealed, put_sealed
from attlas.extract.tables import TABLES, Table

Progress = Callable[[int, int], None]
# the columns that each mode of `tokens` keeps of the tokens themselves
_KEPT: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "classes": frozenset(),
    "ids": frozenset({"token_ids"}),
    "text": frozenset({"token_ids", "text"}),
}


@dataclass(frozen=True)
class Growth:
    """What a generation of a dataset has that the one before had not. `next_sequence`: the first sequence_id that is never used."""

    number: int
    next_sequence: int
    added: int  # documents
    changed: int
    removed: int


@dataclass(frozen=True)
class Plan:
    """The totals of a corpus. `tokens` counts special tokens and overlaps of windows, `content_tokens` neither."""

    shards: int
    shard_sequences: int
    sequences: int
    documents: int
    tokens: int
    content_tokens: int
    dropped: dict[str, int]
    corpus_digest: str
    spools: tuple[str | None, ...]  # SHA-256 of each shard's spool; None for the shards of an earlier generation
    generation: Growth

    @property
    def to_measure(self) -> list[int]:
        """The shards that are not those of an earlier generation."""
        return [shard for shard, spool in enumerate(self.spools) if spool is not None]

    def spool_of(self, shard: int) -> str:
        """The SHA-256 of the spool of a shard that is to be measured."""
        spool = self.spools[shard]
        assert spool is not None, "the shard is one of an earlier generation"
        return spool


_GROWTH = record(dict.fromkeys((f.name for f in fields(Growth)), count))
_PLAN = record(
    {
        "shards": count,
        "shard_sequences": count,
        "sequences": count,
        "documents": count,
        "tokens": count,
        "content_tokens": count,
        "dropped": mapping_of(count),
        "corpus_digest": sha256,
        "spools": list_of(nullable(sha256)),
        "generation": _GROWTH,
    }
)


def write_plan(storage: Storage, plan: Plan) -> None:
    put_sealed(storage, PLAN, asdict(plan))


def load_plan(storage: Storage) -> Plan | None:
    """The plan, or None if there is none or it is damaged. Spools are not checked: read_shard does that."""
    try:
        facts = get_sealed(storage, PLAN)
        if facts is None:
            return None
        _PLAN(facts, "")
        plan = Plan(**{**facts, "spools": tuple(facts["spools"]), "generation": Growth(**facts["generation"])})
    except (Damaged, Malformed, TypeError):  # TypeError: unknown keys
        return None
    return plan if len(plan.spools) == plan.shards else None


def read_plan(storage: Storage) -> Plan | None:
    """The plan, or None if there is none, or it or one of its spools is damaged."""
    plan = load_plan(storage)
    try:
        if plan is not None:
            for shard in plan.to_measure:
                _read_spool(storage, shard, plan.spools[shard])
    except Damaged:
        return None
    return plan


def read_shard(storage: Storage, shard: int, *, digest: str | None = None) -> tuple[pa.Table, pa.Table]:
    """The sequences and the documents of a shard. Raises Damaged, also if the spool does not have this SHA-256."""
    with pa.BufferReader(_read_spool(storage, shard, digest)) as file:
        try:
            return pa.ipc.open_stream(file).read_all(), pa.ipc.open_stream(file).read_all()
        except (pa.ArrowException, OSError) as error:
            raise Damaged(f"{storage.place(spool_key(shard))} is not a spool ({first_line(error)})") from error


def _read_spool(storage: Storage, shard: int, digest: str | None) -> bytes:
    content = storage.get(spool_key(shard))
    if content is None or (digest is not None and hashlib.sha256(content).hexdigest() != digest):
        raise Damaged(
            f"{storage.place(spool_key(shard))} is {'missing' if content is None else 'not as it was written'}; "
            "the same command plans again"
        )
    return content


def write_spool(storage: Storage, shard: int, sequences: pa.Table, documents: pa.Table) -> str:
    """Write a shard's spool; returns its SHA-256."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for table in (sequences, documents):
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    storage.put(spool_key(shard), content)
    return hashlib.sha256(content).hexdigest()


def clear_plan(storage: Storage) -> None:
    """Delete a plan and what a killed pass has left; the plan first, so that there is never one without its spools."""
    storage.delete(PLAN)
    for name in storage.names(WORK) or ():
        if name.startswith(SPOOL) and ".arrow" in name:
            storage.delete(f"{WORK}/{name}")


def planned_tables(sequences: pa.Table, documents: pa.Table, *, tokens: str) -> dict[str, pa.Table]:
    """The rows of `sequences` and `documents` of a shard, with the tokens themselves only if that mode keeps them."""
    planned = {"sequences": sequences, "documents": documents}
    schemas = {name: planned_schema(TABLES[name], tokens=tokens) for name in planned}
    return {name: rows.select(schemas[name].names).cast(schemas[name]) for name, rows in planned.items()}


def planned_schema(table: Table, *, tokens: str) -> pa.Schema:
    """The schema of `sequences` or `documents`, with the tokens themselves only if that mode keeps them."""
    return table.schema(optional=_KEPT[tokens] & table.optional)
