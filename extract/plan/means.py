"""The means of a model's parts over the sample of a plan, as they are kept in a storage.

They are checked against their SHA-256 whenever they are read, so that every shard is measured with the same means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from attlas.extract.errors import Damaged
from attlas.extract.plan.stored import Plan
from attlas.extract.shapes import Malformed, record, sha256
from attlas.extract.store import Storage
from attlas.extract.store.layout import MEAN_VECTORS, MEANS
from attlas.extract.store.sealed import get_sealed, put_sealed

# of an attention layer by its number, its head or sublayer, and the number of the head: float32 [width]
Vectors = Mapping[tuple[int, str, int], np.ndarray]
_SCHEMA = pa.schema({"attention": pa.int32(), "part": pa.string(), "head": pa.int32(), "mean": pa.list_(pa.float32())})
_SEAL = record({"plan": sha256, "vectors": sha256})


@dataclass(frozen=True)
class StoredMeans:
    """Means by their parts, and the SHA-256 of what is stored."""

    vectors: Vectors
    digest: str

    def source_of(self, spool: str) -> str:
        """The SHA-256 of what a shard is measured from: its spool, and these means."""
        return _digest(f"{spool} {self.digest}".encode())


def write_means(storage: Storage, plan: Plan, vectors: Vectors) -> StoredMeans:
    """Write the means over the sample of a plan."""
    keys = sorted(vectors)
    columns = [*zip(*keys, strict=True)] if keys else [[], [], []]
    table = pa.table([*map(list, columns), [vectors[key] for key in keys]], schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    storage.put(MEAN_VECTORS, content)
    put_sealed(storage, MEANS, {"plan": _plan_digest(plan), "vectors": _digest(content)})
    return StoredMeans(vectors, _digest(content))


def load_means(storage: Storage, plan: Plan) -> StoredMeans | None:
    """The means over the sample of a plan; None if there are none, or they are damaged or of another plan."""
    try:
        seal, content = get_sealed(storage, MEANS), storage.get(MEAN_VECTORS)
        if seal is None or content is None:
            return None
        _SEAL(seal, "")
    except (Damaged, Malformed):
        return None
    if seal != {"plan": _plan_digest(plan), "vectors": _digest(content)}:
        return None
    with pa.BufferReader(content) as file:
        table = pa.ipc.open_stream(file).read_all()
    keys = zip(*(table[name].to_pylist() for name in ("attention", "part", "head")), strict=True)
    vectors = (np.asarray(mean, np.float32) for mean in table["mean"].to_pylist())
    return StoredMeans(dict(zip(keys, vectors, strict=True)), seal["vectors"])


def _plan_digest(plan: Plan) -> str:
    """The SHA-256 of all spools of a plan."""
    return _digest(" ".join(map(plan.spool_of, range(plan.shards))).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
