"""Lower what a finished dataset keeps about the tokens of its corpus, as if it had been measured so.

Parts are written anew beside the old ones, under names of their own. The manifest, replaced last and atomically, turns to them, and
then the old parts are deleted. Killed at any moment the dataset is the old or the new one, and the same call finishes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from attlas.extract.dictionary import dataset_card
from attlas.extract.engines.quantities import ROW_QUANTITIES
from attlas.extract.errors import Refusal
from attlas.extract.options import TokenMode
from attlas.extract.plan import planned_schema
from attlas.extract.store import (
    CARD,
    MANIFEST,
    MANIFESTS,
    REPORT,
    Location,
    Part,
    Storage,
    Store,
    generations,
    parts_of,
    read_part,
)
from attlas.extract.store.parts import write_part
from attlas.extract.store.sealed import as_json
from attlas.extract.tables import CLASS_MASSES, TABLES

MODES: tuple[TokenMode, ...] = ("none", "classes", "ids", "text")  # each keeps what those before it keep, and more
_CLASS_PROFILES = frozenset({"class_flow"})


def redact(location: Location, *, tokens: TokenMode) -> list[str]:
    """Lower a dataset to a mode of `tokens`; returns the names of the tables that were written anew.

    Deletes its report.html too, which may show what is removed. Copies elsewhere stay as they are. Raises Refusal for a
    mode above the dataset's own.
    """
    if tokens not in MODES:
        raise Refusal(f"tokens must be one of {', '.join(MODES)}; got {tokens!r}; choose one of them")
    store = Store.at(location)
    manifest = store.manifest
    if manifest is None:
        raise Refusal(f"only a finished dataset is redacted; {store.storage.place()} is none; finish its run first")
    current = _mode_of(manifest, store.storage)
    if MODES.index(tokens) > MODES.index(current):
        raise Refusal(
            f"a dataset is redacted to a lower mode (of {', '.join(MODES)}); {store.storage.place()} has {current}, and {tokens} "
            "would need the corpus; measure again"
        )
    if tokens == "none" != current and manifest.get("own_statistics"):
        raise Refusal(
            f"with tokens none nothing rests on token classes; {store.storage.place()} has statistics of your own, which may; "
            "measure again with --tokens none"
        )
    lock = store.lock()
    try:
        _refuse_generations(store)
        changed = _changed_tables(manifest, current, tokens)
        if changed:
            redacted = _write_redacted(store.storage, manifest, changed, tokens)
            _replace_card(store.storage, manifest, redacted)
            _replace_manifest(store.storage, redacted)
        elif current != tokens:
            _replace_manifest(store.storage, _with_mode(manifest, tokens))
        store.storage.delete(REPORT)
        store.clear_work()  # and parts that the manifest names no longer
    finally:
        lock.release()
    return changed


def _refuse_generations(store: Store) -> None:
    """Refuse a dataset whose other generations, or one that has been begun, keep what is to be removed."""
    place, kept = store.storage.place(), generations(store.storage)
    if store.is_growing:
        raise Refusal(f"only a finished dataset is redacted; {place} has begun its next generation; finish it first")
    if len(kept) > 1:
        raise Refusal(
            f"a dataset is redacted whole; {place} has {len(kept)} generations; remove the others with attlas gc --keep 1 first"
        )


def _replace_manifest(storage: Storage, manifest: Mapping[str, Any]) -> None:
    for key in list(storage.list(MANIFESTS)):  # a copy; the next generation makes it again
        storage.delete(key)
    storage.put(MANIFEST, as_json(manifest))


def _mode_of(manifest: Mapping[str, Any], storage: Storage) -> TokenMode:
    mode = manifest["run"].get("tokens")
    if mode not in MODES:
        raise Refusal(
            f"a manifest states what a dataset keeps of tokens; that of {storage.place()} has {mode!r} for run.tokens; restore it"
        )
    return mode


def _changed_tables(manifest: Mapping[str, Any], current: TokenMode, tokens: TokenMode) -> list[str]:
    """The tables whose rows or columns differ between two modes."""
    columns = {name: facts.get("columns", ()) for name, facts in manifest["tables"].items()}
    wanted = planned_schema(TABLES["sequences"], tokens=tokens).names
    changed = [name for name in ("sequences",) if name in columns and list(columns[name]) != wanted]
    if tokens == "none" != current:
        changed += [
            name
            for name in columns
            if name in ("profiles", "summaries", "totals") or _of_tokens(name).intersection(columns[name])
        ]
    return changed


def _of_tokens(table: str) -> frozenset[str]:
    """The columns of a table that rest on token ids or classes."""
    if TABLES[table].kind not in ("dense", "ragged"):
        return frozenset()
    found = {*CLASS_MASSES} if table == "heads" else set()
    for column in TABLES[table].facts:
        needs = TABLES[table].needs((column,))
        quantities = [ROW_QUANTITIES[name] for name in needs.rows | needs.head_quantities if name in ROW_QUANTITIES]
        if any({"token_ids", "classes"} & set(quantity.needs) for quantity in quantities):
            found.add(column.name)
    return frozenset(found)


def _write_redacted(
    storage: Storage, manifest: Mapping[str, Any], changed: list[str], tokens: TokenMode
) -> dict[str, Any]:
    """Write the parts of the changed tables; returns the manifest that names them."""
    tables = dict(manifest["tables"])
    for table in changed:
        parts: list[Part] = []
        names: list[str] = []
        for old in parts_of(manifest, table):
            rows = _redacted(table, read_part(storage, old), tokens)
            parts.append(write_part(storage, table, 0, rows, key=_redacted_key(old, tokens)))
            names = rows.column_names
        facts = {"rows": sum(part.rows for part in parts), "parts": [asdict(part) for part in parts]}
        tables[table] = tables[table] | facts | ({"columns": names} if parts else {})
    return _with_mode(manifest, tokens) | {"tables": tables}


def _redacted_key(old: Part, tokens: TokenMode) -> str:
    """The key of a part as it becomes: that of its shard, and what it is made of."""
    digest = hashlib.sha256(f"{old.sha256} {tokens}".encode()).hexdigest()[:12]
    folder, _, name = old.path.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}.{digest}.parquet"


def _redacted(table: str, rows: pa.Table, tokens: TokenMode) -> pa.Table:
    """The rows of a table as a run with this mode writes them."""
    if table == "sequences":
        return rows.select(planned_schema(TABLES[table], tokens=tokens).names)
    if table in ("summaries", "totals"):
        return _without(rows, "column", _of_tokens("heads"))
    if table == "profiles":
        return _without(rows, "profile", _CLASS_PROFILES)
    for name in sorted(_of_tokens(table).intersection(rows.column_names)):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(place), pa.nulls(len(rows), rows.schema.field(place).type))
    return rows


def _without(rows: pa.Table, column: str, values: frozenset[str]) -> pa.Table:
    names = rows[column].cast(pa.string())
    kept = rows.filter(pc.invert(pc.is_in(names, pa.array(sorted(values)))))  # pyright: ignore[reportAttributeAccessIssue]
    # a dictionary would keep the name of what is gone
    texts = [f.with_type(pa.string()) if pa.types.is_dictionary(f.type) else f for f in rows.schema]
    return kept.cast(pa.schema(texts)).cast(rows.schema)


def _with_mode(manifest: Mapping[str, Any], tokens: TokenMode) -> dict[str, Any]:
    changed = {**manifest, "run": {**manifest["run"], "tokens": tokens}}
    if tokens == "none" and "classes" in manifest.get("tokenizer", {}):
        changed["tokenizer"] = {**manifest["tokenizer"], "classes": None}
    return changed


def _replace_card(storage: Storage, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Correct the lines of the card that the manifest decides; those of the user stay."""
    content = storage.get(CARD)
    if content is None:
        return
    old, new = (dataset_card(manifest).splitlines() for manifest in (before, after))
    replaced = {a: b for a, b in zip(old, new, strict=False) if a != b} if len(old) == len(new) else {}
    lines = content.decode(errors="replace").splitlines()
    storage.put(CARD, ("\n".join(replaced.get(line, line) for line in lines) + "\n").encode())
