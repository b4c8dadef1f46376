"""Synthetic datasets with known attention patterns, for tests of the analysis without a model."""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from attlas.extract.store import Part, Store
from attlas.extract.tables import SCHEMA_VERSION, TABLES, concluded_tables, derived_tables
from tests import oracles
from tests.files import file_sha256, read_json, write_json

Floats = NDArray[np.float64]
WIDTH = 16
# the tables that the synthetic datasets have
WRITTEN = (
    "compositions",
    "documents",
    "heads",
    "norms",
    "profiles",
    "residual",
    "residual_profiles",
    "sequences",
    "summaries",
    "totals",
    "weights",
)
PROFILES = ("offset", "entropy", "max_weight", "entropy_by_position", "distance_by_position", "received_by_position")


def softmax(scores: Floats) -> Floats:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def local_scores(random: np.random.Generator, n: int, *, scale: float) -> Floats:
    """Noisy scores that decrease with distance."""
    d = np.abs(oracles.offsets(n))
    return -d / scale + random.normal(0, 0.3, (n, n))


def offset_scores(random: np.random.Generator, n: int, *, offset: int) -> Floats:
    """Scores with a peak at one offset, clipped to the sequence."""
    target = np.clip(np.arange(n) + offset, 0, n - 1)
    return random.normal(0, 0.3, (n, n)) + 6.0 * (np.arange(n)[None, :] == target[:, None])


def first_token_scores(random: np.random.Generator, n: int) -> Floats:
    return random.normal(0, 0.5, (n, n)) + 5.0 * (np.arange(n) == 0)[None, :]


def even_scores(random: np.random.Generator, n: int) -> Floats:
    return random.normal(0, 0.2, (n, n))


def collapsed_scores(random: np.random.Generator, n: int) -> Floats:
    """All rows attend to one key: an entropy collapse."""
    return random.normal(0, 0.1, (n, n)) + 40.0 * (np.arange(n) == n // 2)[None, :]


def broken_scores(random: np.random.Generator, n: int) -> Floats:
    """Scores of which two rows are not finite."""
    scores = random.normal(0, 0.3, (n, n))
    scores[[1, 2], 0] = np.nan
    return scores


Recipe = Callable[[np.random.Generator, int], Floats]
Stream = Callable[[Floats, int], Floats]
RECIPES: tuple[Recipe, ...] = (
    lambda r, n: offset_scores(r, n, offset=-1),
    lambda r, n: offset_scores(r, n, offset=1),
    lambda r, n: offset_scores(r, n, offset=0),
    first_token_scores,
    even_scores,
    lambda r, n: local_scores(r, n, scale=1.5),
    lambda r, n: local_scores(r, n, scale=6.0),
    collapsed_scores,
)


@dataclass(frozen=True)
class Planted:
    """What the heads and the stream of a synthetic dataset do."""

    recipes: Sequence[Recipe]
    is_causal: bool
    dead: frozenset[tuple[int, int]]
    stream: Stream
    massive: Sequence[int]


def write_dataset(
    root: Path,
    *,
    documents: int = 6,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
    shard_sequences: int = 6,
    lengths: tuple[int, int] = (5, 14),
    recipes: Sequence[Recipe] = RECIPES,
    is_causal: bool = False,
    dead: Sequence[tuple[int, int]] = (),
    stream: Stream = lambda x, _: x,
    massive: Sequence[int] = (),
    statistics: Sequence[str] = (),
    model_name: str = "known patterns",
    corpus_name: str = "made up",
    tokens_mode: str = "classes",
    summaries: bool = True,
) -> Path:
    """Write a complete dataset in which document 1 is dropped; the same seed gives the same bytes.

    recipes: the scores of head 0 of layer 0 and those after it, over and over. dead: (layer, head) of heads that write nothing. stream: what
    becomes of the stream that enters a layer. massive: the keys that mass_massive counts. statistics: columns of `heads` and `residual` besides the core. summaries: False for a test that changes rows, which analyses then read.
    """
    random = np.random.default_rng(seed)
    document_rows, sequence_rows = _corpus(random, documents, lengths, shard_sequences)
    shards = max(row["shard"] for row in sequence_rows) + 1
    store = Store.at(root)
    parts: dict[str, list[Part]] = {name: [] for name in WRITTEN if summaries or name not in ("summaries", "totals")}
    for shard in range(shards):
        shard_rows = [row for row in sequence_rows if row["shard"] == shard]
        planted = Planted(recipes, is_causal, frozenset(dead), stream, massive)
        tables = _measure(random, shard_rows, planted, layers=layers, heads=heads)
        tables["documents"] = [row for row in document_rows if row["shard"] == shard]
        tables["sequences"] = shard_rows
        if shard == 0:
            tables |= _of_parameters(np.random.default_rng(seed), layers=layers, heads=heads)
        asked = frozenset(statistics)
        written = {name: _table(name, rows, asked) for name, rows in tables.items()}
        columns = {name: [c for c in TABLES[name].facts if c.core or c.name in asked] for name in ("heads", "residual")}
        written |= derived_tables(written, columns, shard=shard) if summaries else {}
        for name, rows in written.items():
            parts[name].append(store.write_part(name, shard, rows))
    if summaries:
        parts |= _write_totals(root, store)
    store.finish(
        _manifest(parts, document_rows, sequence_rows, layers, heads, model_name, corpus_name), "# known patterns\n"
    )
    return root


def _write_totals(root: Path, store: Store) -> dict[str, list[Part]]:
    def parts_of(name: str) -> Iterator[pa.Table]:
        return (pq.ParquetFile(part).read() for part in sorted((root / name).iterdir()))

    return {name: [store.write_part(name, 0, rows)] for name, rows in concluded_tables(parts_of).items()}


def rewrite(root: Path, part: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a part, and update the manifest to match the new file."""
    table = change(pq.read_table(root / part))
    name, number = part.split("/")[0], int(part[-13:-8])
    Store.at(root).write_part(name, number, table)
    manifest = read_json(root / "manifest.json")
    assert manifest is not None
    entry = manifest["tables"][name]
    path = root / part
    new = Part(part, table.num_rows, path.stat().st_size, file_sha256(path))
    entry["parts"] = [asdict(new) if p["path"] == part else p for p in entry["parts"]]
    entry["rows"] = sum(p["rows"] for p in entry["parts"])
    write_json(root / "manifest.json", manifest)


def add_table(root: Path, name: str, shards: Sequence[list[dict[str, Any]]]) -> None:
    """Add a table that the synthetic datasets lack, from the rows of each shard."""
    store, manifest = Store.at(root), read_json(root / "manifest.json")
    assert manifest is not None
    parts = [store.write_part(name, shard, _table(name, rows)) for shard, rows in enumerate(shards)]
    entry = {"rows": sum(part.rows for part in parts), "parts": [asdict(part) for part in parts]}
    manifest["tables"] = dict(sorted({**manifest["tables"], name: entry}.items()))
    write_json(root / "manifest.json", manifest)


def changed_copy(root: Path, copy: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Path:
    """A copy of a dataset with other values in `heads`, summarized again."""
    shutil.copytree(root, copy)
    for part in sorted((copy / "heads").iterdir()):
        rewrite(copy, f"heads/{part.name}", lambda rows: _change_values(rows, change))
        shard = {
            name: pq.read_table(copy / name / part.name) for name in ("heads", "residual", "documents", "sequences")
        }
        columns = {name: [c for c in TABLES[name].facts if c.core] for name in ("heads", "residual")}
        (derived,) = derived_tables(shard, columns, shard=int(part.stem[-5:])).values()
        rewrite(copy, f"summaries/{part.name}", lambda _, derived=derived: derived)
    _write_totals(copy, Store.at(copy))
    write_json(copy / "manifest.json", with_new_checksums(copy, read_json(copy / "manifest.json") or {}))
    return copy


def enlarged(root: Path, copy: Path, *, layers: int, heads: int) -> Path:
    """A copy of a dataset without summaries for a model with more heads: each has the rows of one of the dataset's, nearly."""
    shutil.copytree(root, copy)
    random = np.random.default_rng(layers)
    few = pl.read_parquet(root / "heads" / "*.parquet").select("layer", "head").unique().sort("layer", "head")
    many = pl.DataFrame({"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)})
    alike = few.rename({"layer": "of_layer", "head": "of_head"})[np.arange(many.height) % few.height]
    places = pl.concat([many.cast(pl.Int16), alike], how="horizontal")
    levels = pl.DataFrame({"layer": np.arange(layers)}).select(
        pl.col("layer").cast(pl.Int16), of_layer=(pl.col("layer") % few["layer"].n_unique()).cast(pl.Int16)
    )

    def enlarge(rows: pa.Table, of: pl.DataFrame) -> pa.Table:
        frame = pl.from_arrow(rows)
        assert isinstance(frame, pl.DataFrame)
        keys = {"layer": "of_layer"} | ({"head": "of_head"} if "of_head" in of.columns else {})
        joined = frame.rename(keys).join(of, on=list(keys.values()))
        near = [
            pl.col(name) * pl.Series(random.uniform(0.9, 1, joined.height), dtype=pl.Float32)
            for name, dtype in joined.schema.items()
            if dtype == pl.Float32
        ]
        found = joined.with_columns(near).sort(*of.columns[: len(keys)], maintain_order=True).to_arrow()
        return pa.table([found[f.name].cast(f.type) for f in rows.schema], schema=rows.schema)

    for table, of in (("heads", places), ("profiles", places), ("residual", levels)):
        for part in sorted((copy / table).iterdir()):
            rewrite(copy, f"{table}/{part.name}", lambda rows, of=of: enlarge(rows, of))
    manifest = read_json(copy / "manifest.json") or {}
    size = {"layers": layers, "heads": heads}
    manifest["model"] |= size
    manifest["model"]["stacks"] = [stack | size for stack in manifest["model"]["stacks"]]
    write_json(copy / "manifest.json", manifest)
    return copy


def _change_values(rows: pa.Table, change: Callable[[pl.DataFrame], pl.DataFrame]) -> pa.Table:
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    changed = change(frame).to_arrow()
    for number, field in enumerate(rows.schema):
        if pa.types.is_floating(field.type):
            rows = rows.set_column(number, field, changed[field.name].cast(field.type))
    return rows


def with_new_checksums(root: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Update the row counts, sizes and checksums in a manifest from the files."""
    for table in manifest["tables"].values():
        for part in table["parts"]:
            path = root / part["path"]
            rows = pq.read_metadata(path).num_rows
            part |= {"rows": rows, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        table["rows"] = sum(part["rows"] for part in table["parts"])
    return manifest


def _corpus(
    random: np.random.Generator, documents: int, lengths: tuple[int, int], shard_sequences: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    document_rows: list[dict[str, Any]] = []
    sequence_rows: list[dict[str, Any]] = []
    for number in range(documents):
        windows = 0 if number == 1 else int(random.integers(1, 4))  # document 1 is dropped
        tokens = 0
        shard = len(sequence_rows) // shard_sequences
        for window in range(windows):
            n = int(random.integers(*lengths))
            sequence_rows.append(
                {
                    "sequence_id": len(sequence_rows),
                    "document_id": number,
                    "shard": len(sequence_rows) // shard_sequences,
                    "window": window,
                    "first_token": tokens,
                    "tokens": n,
                    "special_tokens": 2,
                }
            )
            tokens += n - 2
        document_rows.append(
            {
                "document_id": number,
                "source": f"made-up:{number}",
                "digest": None,
                "characters": tokens * 4,
                "content_tokens": tokens,
                "sequences": windows,
                "dropped_reason": None if windows else "empty",
                "shard": shard,
            }
        )
    last = sequence_rows[-1]["shard"]
    for row in document_rows:
        row["shard"] = min(row["shard"], last)
    return document_rows, sequence_rows


def _measure(
    random: np.random.Generator, sequences: list[dict[str, Any]], planted: Planted, *, layers: int, heads: int
) -> dict[str, list[dict[str, Any]]]:
    head_rows, residual_rows = [], []
    profiles: dict[tuple[int, int, str, int], list[float]] = {}
    norms: dict[tuple[int, str, int], int] = {}
    for row in sequences:
        n = row["tokens"]
        key = {"sequence_id": row["sequence_id"], "document_id": row["document_id"], "stack": "encoder"}
        kinds = ["bos", *random.choice(["word_start", "subword", "punctuation", "number"], n - 2), "separator"]
        ids = np.array([8, *random.integers(0, 8, n - 2), 9])
        effect = random.normal(0, 0.3)  # of the sequence, so that its heads depend on each other
        visible = np.tri(n, dtype=bool) if planted.is_causal else np.ones((n, n), dtype=bool)
        for layer in range(layers):
            for head in range(heads):
                recipe = planted.recipes[(layer * heads + head) % len(planted.recipes)]
                scores = recipe(random, n) * (1 + 0.1 * effect)
                p, v, w_o = (
                    softmax(np.where(visible, scores, -np.inf)),
                    random.normal(size=(n, 4)),
                    random.normal(size=(4, WIDTH)),
                )
                if (layer, head) in planted.dead:
                    w_o *= 0
                columns = oracles.head_columns(p, scores, visible, v=v, w_o=w_o, tokens=ids, classes=kinds)
                columns["mass_massive"] = float(p[:, planted.massive].sum(1).mean())
                head_rows.append({**key, "layer": layer, "head": head, **columns})
                _add_profiles(profiles, layer, head, p, visible, scores)
            rows, states = _residual(random, key, n, layer, layers, planted.stream)
            residual_rows += rows
            for site, after in states.items():
                for number, count in oracles.norm_histogram([after]).items():
                    norms[layer, site, number] = norms.get((layer, site, number), 0) + count
    profile_rows = [
        {
            "shard": sequences[0]["shard"],
            "stack": "encoder",
            "layer": layer,
            "head": head,
            "profile": name,
            "bin": number,
            "sum": total,
            "count": count,
        }
        for (layer, head, name, number), (total, count) in profiles.items()
    ]
    counts = [
        {
            "shard": sequences[0]["shard"],
            "stack": "encoder",
            "layer": layer,
            "site": site,
            "profile": "token_norm",
            "bin": number,
            "sum": count,
            "count": count,
        }
        for (layer, site, number), count in norms.items()
    ]
    return {"heads": head_rows, "residual": residual_rows, "profiles": profile_rows, "residual_profiles": counts}


def _of_parameters(random: np.random.Generator, *, layers: int, heads: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the static tables, of random matrices."""
    stack, places = {"stack": "encoder"}, [(layer, head) for layer in range(layers) for head in range(heads)]
    matrices = [random.normal(size=(WIDTH, 4)) for _ in range(3)]
    columns = oracles.weights_columns(*matrices, random.normal(size=(4, WIDTH)))
    scores = dict.fromkeys(("q_composition", "k_composition", "v_composition", "random_composition"), WIDTH**-0.5)
    gain = {"gain_mean": 1.0, "gain_std": 0.5, "gain_max_abs": 2.0, "bias_norm": 0.0}
    return {
        "weights": [{**stack, "layer": layer, "head": head, **columns} for layer, head in places],
        "norms": [
            {**stack, "layer": layer, "site": site, **gain} for layer in range(layers) for site in ("attention", "mlp")
        ],
        "compositions": [
            {**stack, "layer": a, "head": h, "later_layer": b, "later_head": g, **scores}
            for a, h in places
            for b, g in places
            if b > a
        ],
    }


def _add_profiles(
    profiles: dict[tuple[int, int, str, int], list[float]],
    layer: int,
    head: int,
    p: Floats,
    visible: NDArray[np.bool_],
    scores: Floats,
) -> None:
    values = {
        "offset": oracles.offset_profile(p, visible, s=scores),
        "entropy": oracles.entropy_histogram(p, visible, s=scores),
        "max_weight": oracles.max_weight_histogram(p, visible, s=scores),
        "entropy_by_position": oracles.entropy_by_position(p, visible, s=scores),
        "distance_by_position": oracles.distance_by_position(p, visible, s=scores),
        "received_by_position": oracles.received_by_position(p, visible, s=scores),
    }
    for name in PROFILES:
        for number, (total, count) in values[name].items():
            entry = profiles.setdefault((layer, head, name, number), [0.0, 0.0])
            entry[0] += total
            entry[1] += count


def _residual(
    random: np.random.Generator, key: dict[str, Any], n: int, layer: int, layers: int, stream: Stream
) -> tuple[list[dict[str, Any]], dict[str, Floats]]:
    """The rows of a layer's sites, and the states after them."""
    x = stream(random.normal(size=(n, WIDTH)) * (1 + layer), layer)
    states, sites = {}, []
    if layer == 0:
        states["embedding"] = x
        sites.append(("embedding", oracles.residual_columns(x, None, x)))
    for site in ("attention", "mlp"):
        update = random.normal(size=(n, WIDTH)) * 0.4
        sites.append((site, oracles.residual_columns(x, update, x + update, norm_input=x, norm_output=x)))
        x = x + update
        states[site] = x
    if layer == layers - 1:
        states["final_norm"] = x
        sites.append(("final_norm", oracles.residual_columns(x, None, x)))
    return [{**key, "layer": layer, "site": site, **columns} for site, columns in sites], states


def _table(name: str, rows: list[dict[str, Any]], optional: frozenset[str] = frozenset()) -> pa.Table:
    """Rows as an Arrow table with the schema and the sort order of the contract, and optional columns."""
    table = TABLES[name]
    schema = table.schema(optional=optional)
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if pa.types.is_dictionary(field.type):
            columns.append(pa.array(values, pa.string()).dictionary_encode().cast(field.type))
        else:
            columns.append(pa.array([None if _undefined(v) else v for v in values], field.type))
    decoded = pa.schema(
        [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    )
    table_rows = pa.Table.from_arrays([c.cast(f.type) for c, f in zip(columns, decoded, strict=True)], schema=decoded)
    order = table_rows.sort_by([(column, "ascending") for column in table.order])
    encoded = [
        c.combine_chunks().dictionary_encode().cast(f.type) if pa.types.is_dictionary(f.type) else c
        for c, f in zip(order.columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(encoded, schema=schema)


def _undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _manifest(
    parts: dict[str, list[Part]],
    documents: list[dict[str, Any]],
    sequences: list[dict[str, Any]],
    layers: int,
    heads: int,
    model_name: str,
    corpus_name: str,
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "run": {"model": model_name, "corpus": corpus_name, "max_length": 16, "tokens": "classes"},
        "model": {
            "name": model_name,
            "revision": None,
            "weights_digest": hashlib.sha256(b"none").hexdigest(),
            "architecture": "Known",
            "layers": layers,
            "heads": heads,
            "width": WIDTH,
            "stack": "encoder",
            "parameters": 0,
            "residual": "measured",
            "stacks": [{"stack": "encoder", "layers": layers, "heads": heads, "of_tokens": True}],
            "layout": {
                "attention": [{"stack": "encoder", "layer": n, "heads": heads, "way": "sdpa"} for n in range(layers)]
            },
        },
        "tokenizer": {"name": model_name, "digest": hashlib.sha256(b"words").hexdigest()},
        "corpus": {
            "name": corpus_name,
            "digest": hashlib.sha256(b"corpus").hexdigest(),
            "digest_keyed": False,
            "documents": len(documents),
            "sequences": len(sequences),
            "tokens": sum(row["tokens"] for row in sequences),
            "content_tokens": sum(row["content_tokens"] for row in documents),
            "dropped": {"empty": 1},
        },
        "software": {"attlas": "0.1.0", "python": "3.11"},
        "engine": "reference",
        "device": "cpu",
        "dtype": "float32",
        "padding_waste": 0.1,
        "tables": {
            name: {"rows": sum(p.rows for p in table_parts), "parts": [asdict(p) for p in table_parts]}
            for name, table_parts in parts.items()
        },
    }
