"""A dataset of any number of `heads` rows, generated shard by shard: `python -m tests.benchmarks.large FOLDER ROWS`.

Documents have one to forty sequences and lie across the borders of shards. Values are random; of 12 layers of 12 heads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attlas.extract.store import Part, Store, read_part
from attlas.extract.tables import SCHEMA_VERSION, TABLES, concluded_tables, derived_tables

LAYERS = HEADS = 12
_WRITERS = 2
_BLOCKS = 8  # different blocks of random values, which shards take in turn


def write_large(root: Path, rows: int, *, sequences: int = 256, seed: int = 0) -> Path:
    """Write a dataset with at least so many rows of `heads`, in shards of so many sequences; one that is there already is kept."""
    store = Store.at(root)
    if store.manifest is not None:
        return root
    shards = -(-rows // (LAYERS * HEADS * sequences))
    blocks = [_values(np.random.default_rng([seed, block]), sequences) for block in range(_BLOCKS)]
    with ThreadPoolExecutor(_WRITERS) as threads:
        written = list(threads.map(lambda shard: _write_shard(store, blocks, *shard), _shards(shards, sequences, seed)))
    parts: dict[str, list[Part]] = {}
    for of_shard in written:
        for name, part in of_shard.items():
            parts.setdefault(name, []).append(part)
    totals = concluded_tables(lambda name: (read_part(store.storage, part) for part in parts[name]))
    parts |= {name: [store.write_part(name, 0, rows)] for name, rows in totals.items()}
    store.finish(_manifest(parts, shards * sequences), "# random values\n")
    return root


def _shards(shards: int, size: int, seed: int) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """Each shard's number, sequences and documents."""
    random = np.random.default_rng(seed)
    document, left, window = -1, 0, 0
    for shard in range(shards):
        sequences: list[dict[str, Any]] = []
        documents: list[dict[str, Any]] = []
        for number in range(size):
            if left == 0:
                document, left = document + 1, int(np.clip(random.lognormal(1.0, 1.0), 1, 40))
                left = min(left, (shards - shard) * size - number)
                documents.append(_document(document, left))
                window = 0
            tokens = int(random.integers(100, 513))
            sequences.append(_sequence(shard * size + number, document, shard, window, tokens))
            window, left = window + 1, left - 1
        yield shard, _table("sequences", sequences), _table("documents", documents)


def _document(number: int, sequences: int) -> dict[str, Any]:
    facts = {"document_id": number, "source": f"{'ab'[number % 2]}.jsonl:{number + 1}", "sequences": sequences}
    return facts | {
        "digest": None,
        "characters": 1000 * sequences,
        "content_tokens": 250 * sequences,
        "dropped_reason": None,
    }


def _sequence(number: int, document: int, shard: int, window: int, tokens: int) -> dict[str, Any]:
    facts = {"sequence_id": number, "document_id": document, "shard": shard, "window": window, "tokens": tokens}
    return facts | {"first_token": 250 * window, "special_tokens": 2}


def _table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TABLES[name].schema())


def _values(random: np.random.Generator, sequences: int) -> dict[str, pa.Array]:
    """The statistics of a shard's heads."""
    rows = LAYERS * HEADS * sequences
    level = np.repeat(random.uniform(0.1, 0.9, LAYERS * HEADS), sequences)
    names = [field.name for field in TABLES["heads"].schema() if pa.types.is_floating(field.type)]
    absent = {"mass_sink", "distance_patches", "mass_patches"}
    return {
        name: pa.nulls(rows, pa.float32()) if name in absent else pa.array(_near(level, random), pa.float32())
        for name in names
    }


def _near(level: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.clip(level + random.normal(0, 0.05, len(level)), 0, 1).astype(np.float32)


def _write_shard(
    store: Store, blocks: list[dict[str, pa.Array]], shard: int, sequences: pa.Table, documents: pa.Table
) -> dict[str, Part]:
    places, size, schema = LAYERS * HEADS, len(sequences), TABLES["heads"].schema()
    columns: dict[str, Any] = {
        name: np.tile(sequences[name].to_numpy(), places) for name in ("sequence_id", "document_id")
    }
    columns["stack"] = pa.DictionaryArray.from_arrays(np.zeros(places * size, np.int8), ["encoder"])
    columns["layer"] = np.repeat(np.arange(LAYERS, dtype=np.int16), HEADS * size)
    columns["head"] = np.tile(np.repeat(np.arange(HEADS, dtype=np.int16), size), LAYERS)
    columns["query_rows"] = np.tile(sequences["tokens"].to_numpy(), places)
    columns |= blocks[shard % len(blocks)]
    zeros = np.zeros(places * size)
    arrays = [pa.array(columns.get(f.name, zeros)).cast(f.type) for f in schema]
    tables = {"sequences": sequences, "documents": documents, "heads": pa.Table.from_arrays(arrays, schema=schema)}
    core = {"heads": [c for c in TABLES["heads"].facts if c.core]}
    tables |= derived_tables(tables, core, shard=shard)
    return {name: store.write_part(name, shard, table) for name, table in tables.items()}


def _manifest(parts: dict[str, list[Part]], sequences: int) -> dict[str, Any]:
    documents = sum(part.rows for part in parts["documents"])
    stack = {"stack": "encoder", "layers": LAYERS, "heads": HEADS, "of_tokens": True}
    return {
        "schema_version": SCHEMA_VERSION,
        "run": {"model": "random", "corpus": "random", "max_length": 512, "tokens": "classes"},
        "model": {
            "name": "random",
            "architecture": "none",
            "stacks": [stack],
            "width": 768,
            "residual": "none",
            "layout": {"attention": []},
            **stack,
        },
        "tokenizer": {"name": "none", "digest": ""},
        "corpus": {
            "name": "random",
            "digest": "0" * 64,
            "digest_keyed": False,
            "documents": documents,
            "sequences": sequences,
            "tokens": 0,
            "content_tokens": 0,
            "dropped": {},
        },
        "software": {},
        "engine": "none",
        "device": "cpu",
        "dtype": "float32",
        "shards": len(parts["heads"]),
        "tables": {
            name: {"rows": sum(p.rows for p in of_table), "parts": [asdict(p) for p in of_table]}
            for name, of_table in parts.items()
        },
    }


if __name__ == "__main__":
    write_large(Path(sys.argv[1]), int(sys.argv[2]))
