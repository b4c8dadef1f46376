"""The stored plan: totals of the pass over the corpus, and a spool per shard, from which the shard is measured.

Both are checked against their SHA-256 whenever they are read; if one is damaged, the corpus is planned again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from attlas.extract.errors import Damaged, first_line
from attlas.extract.shapes import Malformed, count, list_of, mapping_of, record, sha256
from attlas.extract.store import Storage
from attlas.extract.store.layout import PLAN, SPOOL, WORK, spool_key
from attlas.extract.store.sealed import get_sealed, put_sealed

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """Totals of the pass; `tokens` includes special tokens and overlaps, `content_tokens` only the documents' ids."""

    shards: int
    shard_sequences: int
    sequences: int
    documents: int
    tokens: int
    content_tokens: int
    dropped: dict[str, int]
    corpus_digest: str
    spools: tuple[str, ...]  # SHA-256 of each shard's spool


_PLAN_SHAPE = record(
    {
        "shards": count,
        "shard_sequences": count,
        "sequences": count,
        "documents": count,
        "tokens": count,
        "content_tokens": count,
        "dropped": mapping_of(count),
        "corpus_digest": sha256,
        "spools": list_of(sha256),
    }
)


def write_plan(storage: Storage, plan: Plan) -> None:
    put_sealed(storage, PLAN, asdict(plan))


def read_plan(storage: Storage, *, progress: Progress | None = None) -> Plan | None:
    """The finished plan, or None if there is none yet, or it or one of its spools is damaged.

    `progress` is called with the number of checked spools and the number of all spools.
    """
    try:
        stored = get_sealed(storage, PLAN)
        if stored is None:
            return None
        _PLAN_SHAPE(stored, "")
        facts: dict[str, Any] = {**stored, "spools": tuple(stored["spools"])}
        plan = Plan(**facts)
        for shard, digest in enumerate(plan.spools):
            _read_spool(storage, shard, digest)
            if progress is not None:
                progress(shard + 1, plan.shards)
    except (Damaged, Malformed, TypeError):  # TypeError: keys that a plan does not have
        return None
    return plan if len(plan.spools) == plan.shards else None


def read_shard(storage: Storage, shard: int, *, digest: str | None = None) -> tuple[pa.Table, pa.Table]:
    """(sequences, documents) of a shard. Raises Damaged, also if the spool does not have this digest."""
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
    """Remove a plan and its spools; the plan first, so that it never exists without them."""
    storage.delete(PLAN)
    for name in storage.names(WORK) or ():
        if name.startswith(SPOOL) and ".arrow" in name:
            storage.delete(f"{WORK}/{name}")
