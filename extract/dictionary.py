"""The data dictionary and the dataset card as Markdown, generated from the tables.

`python -m attlas.extract.dictionary > data/README.md` writes the dictionary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from attlas.extract.card import Card, front_matter
from attlas.extract.store import generation_of
from attlas.extract.tables import TABLES, Column, Table
from attlas.extract.tables.description import OTHER, PATTERNS, example_of, grouped, known_text, measured_when

_GROUND_RULES = """\
A sequence has n real tokens; padding is neither query nor key. Positions i (query) and j (key) count the real tokens from
0; p[i,j] is the pattern after softmax in eval mode, s[i,j] the masked and scaled score, V_i the keys that row i may see,
m_i = |V_i|, d = j − i. A `heads` column is the unweighted mean over the sequence's measured rows (`query_rows` says how
many: weight by it when averaging over sequences). Rows that see nothing or have non-finite scores are left out and
counted. Logarithms are natural; 0 ln 0 = 0; `_std` is a population deviation. Statistics are float32, accumulators float64.

The sequence of an image is what the model makes of it: patches row by row, and class or register tokens, all counted as
tokens. Columns that need token ids or a tokenizer's classes are null for images. `distance_patches` is given if changing
one patch at a time changes one token at a time, in raster order; otherwise the grid is not known.

Float32 columns agree with their formula in float64, on the pattern the model really used, to 1e-5 absolute or 1e-4
relative, whichever is larger (float32 models). null means undefined; NaN and infinities never occur.
"""

_READING = (
    """\
`attlas stats NAME` shows a column's entry by itself, and `attlas stats --format json` all of them for machines. Known values are those
of a pattern over n tokens (tests compare each with what the code computes): """
    + "; ".join(
        f"**{name}**" + {"uniform": " (all of n keys)", "causal uniform": " (row i evenly on keys 0…i)"}.get(name, "")
        for name in PATTERNS.values()
    )
    + ". h = 1 + 1/2 + … + 1/n.\n"
)

_PRIVACY = """\
A dataset contains no text and no token ids unless asked for (`--tokens ids` or `text`). A document's `digest` is keyed with
a secret, and null without one. The manifest's corpus digest is unkeyed unless a key is given: it shows whether two runs read
the same corpus, and lets anyone who has exactly this corpus confirm it. Until a run is finished, its working folder `_work`
holds token ids (with `--tokens text` also the text; for images, names and SHA-256), and is then removed.
"""


def data_dictionary() -> str:
    """The whole dictionary as Markdown."""
    parts = [
        "# The data dictionary",
        "Written by `make dictionary` from the tables in `extract/tables/`; do not edit.",
        "## Ground rules",
        _GROUND_RULES,
        "## How to read an entry",
        _READING,
        "## Privacy",
        _PRIVACY,
        *(_table_section(t) for t in TABLES.values()),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def dataset_card(manifest: Mapping[str, Any], card: Card | None = None, *, is_growing: bool = False) -> str:
    """The dataset card: front matter for the hub's viewer and `load_dataset(folder, "heads")`, then facts and tables.

    card: what the user says of the dataset. is_growing: whether its next generation has been begun; then, and in every generation but the
    first, the card names the parts one by one, because their folders also have parts of other generations.
    """
    card = card or Card()
    lists_parts = is_growing or generation_of(manifest) > 1
    model, corpus = manifest["model"], manifest["corpus"]
    facts = [
        (
            "model",
            f"{_escape(model.get('title') or model['name'])} ({model['architecture']}, {_layers_and_heads(model['stacks'])})",
        ),
        (
            "corpus",
            f"{_escape(corpus['name'])}: {corpus['documents']:,} documents, {corpus['sequences']:,} sequences, {corpus['tokens']:,} tokens",
        ),
        _sequence_facts(manifest),
        ("engine", f"{manifest['engine']} on {manifest['device']}, {manifest['dtype']}"),
        ("residual", _escape(model["residual"])),
    ]
    facts += [("source", _escape(card.source))] if card.source is not None else []
    facts += [
        (f"{own['table']}.{own['name']}", f"{_escape(own['formula'])} (by {_escape(own['origin'])})")
        for own in manifest.get("own_statistics", ())
    ]
    parts = [
        front_matter(card, manifest, lists_parts=lists_parts),
        "# Attention statistics",
        "Statistics of every attention head and every residual update, one row per sequence, written by attlas.",
        _markdown_table(("what", "which"), facts),
        "## Tables",
        _markdown_table(
            ("table", "one row per", "rows"),
            [(f"`{n}`", TABLES[n].row, f"{t['rows']:,}") for n, t in manifest["tables"].items()],
        ),
        "Each column's formula, unit and bounds are in the Parquet field metadata.",
        "## Ground rules",
        _GROUND_RULES,
        "## Privacy",
        _PRIVACY,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _sequence_facts(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """(label, text) on what a sequence is: a window of a text, a document of a generated corpus, or an image."""
    if "blocks" in manifest["run"]:
        return "sequences", _generated_facts(manifest["run"])
    if "images" not in manifest:
        return "windows", f"{manifest['run']['max_length']} tokens, overlapping by {manifest['run']['stride']}"
    images = manifest["images"]
    grids = "".join(f", {g['rows']} × {g['columns']} patches" for g in images["grids"].values())
    return (
        "images",
        f"{' × '.join(map(str, images['pixels']))} pixels by {images['preprocessor']}, {images['tokens']} tokens each{grids}",
    )


def _generated_facts(run: Mapping[str, Any]) -> str:
    if "depths" in run:
        depths = ", ".join(map(str, run["depths"]))
        what = f"a haystack of {run['length']} tokens with a needle at {depths} %, a question and its answer"
        return f"{what}; {run['blocks']} documents at each depth by seed {run['seed']}"
    return f"a block of {run['length']} random tokens, twice; {run['blocks']} blocks by seed {run['seed']}"


def _layers_and_heads(stacks: Sequence[Mapping[str, Any]]) -> str:
    """Numbers of layers and heads, by stack if there are several."""
    texts = [f"{s['layers']} layers" + ("" if s["heads"] is None else f" × {s['heads']} heads") for s in stacks]
    return (
        texts[0]
        if len(texts) == 1
        else ", ".join(f"{s['stack']} {text}" for s, text in zip(stacks, texts, strict=True))
    )


def _table_section(table: Table) -> str:
    order = ", ".join(f"`{n}`" for n in table.order)
    title = f"## `{table.name}`: one row per {table.row}\n\nSorted by {order} within a part."
    first = next(iter(table.facts), table.keys[0])
    example = f'For example:\n\n```\nattlas query DIR "{example_of(table, first)}"\n```'
    groups = grouped(table.facts)
    if set(groups) == {OTHER}:
        columns = [_columns_section(table, table.columns)]
    else:
        columns = [_columns_section(table, table.keys)]
        columns += [f"### {table.name}: {g}\n\n{_columns_section(table, c)}" for g, c in groups.items()]
    if table.profiles:
        columns.append(f"### {table.name}: profiles on request\n\n{_columns_section(table, table.profiles)}")
    return "\n\n".join(part for part in (title, example, *columns, table.notes) if part)


def _columns_section(table: Table, columns: Sequence[Column]) -> str:
    """A table of columns; what none of them has is left out."""
    header = ("column", "type", "unit", "bounds", "formula", "known values", "measured", "meaning")
    rows = [_column_row(table, column) for column in columns]
    kept = [
        n for n, name in enumerate(header) if name not in ("unit", "bounds", "known values") or any(r[n] for r in rows)
    ]
    return _markdown_table(tuple(header[n] for n in kept), [tuple(row[n] for n in kept) for row in rows])


def _column_row(table: Table, column: Column) -> tuple[str, ...]:
    kind = column.dtype + ("" if not column.nullable else ", nullable")
    meaning = column.meaning + (f" ({column.reference})" if column.reference else "")
    if column.elsewhere:
        meaning += f" Elsewhere: {column.elsewhere}."
    facts = (column.unit, column.bounds_text, column.formula, known_text(column), measured_when(table, column), meaning)
    return (f"`{column.name}`", kind, *facts)


def _markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _escape(text: str) -> str:
    """A name from the data with everything escaped that Markdown or HTML could interpret."""
    return "".join(c if c.isalnum() or c in " -_./:,=()+'’" else f"&#{ord(c)};" for c in text)


if __name__ == "__main__":
    sys.stdout.write(data_dictionary())
