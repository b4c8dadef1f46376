"""The generations of a dataset that has grown with its corpus, as a frame; and what is removed of the oldest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from attlas.extract.store import (
    Location,
    Refusal,
    Store,
    discard_generations,
    generation_of,
    generations,
    open_dataset,
    parts_of,
    read_generation,
)
from attlas.extract.tables.documents import GONE

_COLUMNS = {
    "generation": pl.Int64,
    "documents": pl.Int64,
    "sequences": pl.Int64,
    "tokens": pl.Int64,
    "added": pl.Int64,
    "changed": pl.Int64,
    "removed": pl.Int64,
    "shards": pl.Int64,
    "measured_shards": pl.Int64,
    "bytes": pl.Int64,
}


def history(location: Location) -> pl.DataFrame:
    """A row for each generation of a dataset that is kept, the oldest first.

    documents: that have sequences or were dropped, without those that are gone. added, changed, removed: documents, against the generation
    before. measured_shards: that were measured for it; the others are those of earlier ones. bytes: of all its parts. Raises Refusal.
    """
    storage, _ = open_dataset(location)
    rows = [_facts(read_generation(storage, number)) for number in generations(storage)]
    return pl.DataFrame(rows, schema=_COLUMNS)


def _facts(manifest: Mapping[str, Any]) -> dict[str, int]:
    corpus, shards = manifest["corpus"], manifest.get("shards", 0)
    first = {"added": corpus["documents"], "changed": 0, "removed": 0, "measured_shards": shards}
    gone = sum(corpus["dropped"].get(reason, 0) for reason in GONE)
    return {
        "generation": generation_of(manifest),
        "documents": corpus["documents"] - gone,
        "sequences": corpus["sequences"],
        "tokens": corpus["tokens"],
        **{name: manifest.get("generation", first)[name] for name in first},
        "shards": shards,
        "bytes": sum(part.bytes for table in manifest["tables"] for part in parts_of(manifest, table)),
    }


def collect_garbage(location: Location, *, keep: int) -> tuple[list[int], list[str]]:
    """Remove all but the newest generations, and the parts that none of those names.

    Returns the generations and the parts that are gone. Nothing else in the folder is touched. Raises Refusal if a run is writing, or has
    begun another generation, which must be finished first.
    """
    if keep < 1:
        raise Refusal(f"--keep must be at least 1 generation; got {keep}; use a larger number")
    storage, _ = open_dataset(location)
    store = Store(storage)
    lock = store.lock()
    try:
        if store.is_growing:
            raise Refusal(
                f"generations are removed when none is being measured; {storage.place()} has begun its next one; "
                "finish it with the same attlas run"
            )
        return discard_generations(storage, keep), store.clear_work()
    finally:
        lock.release()
