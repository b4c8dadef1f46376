"""What two datasets have in common: documents, places and columns, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attlas.analysis.dataset import Dataset
from attlas.analysis.manifest import section
from attlas.analysis.margins import nearest_names
from attlas.analysis.naming import corpus_title, model_title
from attlas.analysis.summaries import averaged_columns
from attlas.extract.store import Refusal
from attlas.extract.tables import TABLES, Column

COMPARED = tuple(table.name for table in TABLES.values() if table.weight)
# settings that change what is measured, or of what; those that only say how it is computed are left out
_SETTINGS = {
    "max_length": "columns in tokens and nats depend on the length of sequences",
    "stride": "windows overlap otherwise",
    "unit": "documents are other pieces of the corpus",
    "text_column": "documents are other columns of the corpus",
    "limit": "",
    "dtype": "",
    "device": "",
    "engine": "",
    "sample": "columns of the sample have values for other sequences",
    "stacks": "",
    "tokenizer_digest": "tokens are other pieces of text",
    "attlas": "",
}


def same_documents(a: Dataset, b: Dataset) -> str | None:
    """How it is known that both are of the same documents in the same order; None if they are not, or it isn't known."""
    documents = [
        d.scan("documents").select("source", "digest", "characters", "content_tokens").collect() for d in (a, b)
    ]
    if documents[0].height != documents[1].height:
        return None
    digests = [frame["digest"] for frame in documents]
    keyed = [section(d.manifest, "corpus").get("digest_keyed") for d in (a, b)]
    if not any(d.null_count() for d in digests) and digests[0].equals(digests[1]):
        return "the same digest of every document"
    corpora = [section(d.manifest, "corpus").get("digest") for d in (a, b)]
    if corpora[0] is not None and corpora[0] == corpora[1] and keyed[0] == keyed[1]:
        return "the same digest of the corpus"
    if any(digest.null_count() for digest in digests) or keyed[0] != keyed[1]:
        places = [frame.select("source", "characters") for frame in documents]
        if places[0].equals(places[1]) and places[0]["characters"].null_count() == 0:
            return "the same source and length of every document"
    return None


def setting_differences(a: Dataset, b: Dataset) -> Iterator[str]:
    """The settings in which two datasets differ, as sentences."""
    first, second = (section(d.manifest, "run") for d in (a, b))
    for name, meaning in _SETTINGS.items():
        if first.get(name) != second.get(name):
            values = f"{_text(first.get(name))} and {_text(second.get(name))}"
            yield f"{name}: {values}{f' ({meaning})' if meaning else ''}"


def hidden_cells(min_documents: int) -> Iterator[str]:
    """That not all numbers are shown, as a sentence, if min_documents is more than 1."""
    if min_documents > 1:
        yield f"Numbers of fewer than {min_documents:,} documents are not shown."


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) > 40 else text


def descriptions(a: Dataset, b: Dataset) -> list[str]:
    """What each dataset is of."""
    return [f"{letter}: {' on '.join(model_and_corpus(d))}, {_size(d)}" for letter, d in zip("ab", (a, b), strict=True)]


def model_and_corpus(dataset: Dataset) -> tuple[str, str]:
    """The names of the model and the corpus."""
    return model_title(dataset.manifest), corpus_title(dataset.manifest)


def _size(dataset: Dataset) -> str:
    corpus = section(dataset.manifest, "corpus")
    return f"{corpus.get('documents'):,} documents, {corpus.get('tokens'):,} tokens"


@dataclass(frozen=True)
class Columns:
    """The columns to compare of each table, and those that not every dataset has, by the datasets that do."""

    common: Mapping[str, Mapping[str, Column]]
    only: Mapping[str, Sequence[str]]


def columns_to_compare(a: Dataset, b: Dataset, names: Sequence[str] | None = None) -> Columns:
    """All averaged columns that both have, or those named (COLUMN or TABLE.COLUMN).

    Raises Refusal for a name that the catalogue lacks, and for one that a dataset has not measured.
    """
    return common_columns({"a": a, "b": b}, names)


def common_columns(datasets: Mapping[str, Dataset], names: Sequence[str] | None = None) -> Columns:
    """All averaged columns that these datasets have, or those named (COLUMN or TABLE.COLUMN).

    Raises Refusal for a name that the catalogue lacks, and for one that a dataset has not measured.
    """
    measured = {
        letter: {t: averaged_columns(d, t) if t in d.tables else [] for t in COMPARED} for letter, d in datasets.items()
    }
    first = next(iter(datasets.values()))
    common = {
        table: {c.name: c for c in first.table(table).facts if all(c.name in of[table] for of in measured.values())}
        for table in COMPARED
    }
    only = {
        letter: [f"{t}.{n}" for t in COMPARED for n in this[t] if n not in common[t]]
        for letter, this in measured.items()
    }
    if names is None:
        return Columns(common, only)
    chosen: dict[str, dict[str, Column]] = {table: {} for table in COMPARED}
    for name in names:
        found = [(table, c) for table in COMPARED for c in common[table] if name in (c, f"{table}.{c}")]
        if not found:
            raise _refuse_column(name, measured)
        for table, column in found:
            chosen[table][column] = common[table][column]
    return Columns(chosen, {})


def name_some(names: Sequence[str], *, at_most: int = 3) -> list[str]:
    """The first names, and the number of the others, for messages."""
    more = len(names) - at_most
    return [*names[:at_most], *([f"{more} more"] if more > 0 else [])]


def _refuse_column(name: str, measured: Mapping[str, Mapping[str, Sequence[str]]]) -> Refusal:
    has = {letter: any(name in (c, f"{t}.{c}") for t in COMPARED for c in of[t]) for letter, of in measured.items()}
    known = sorted({c.name for t in COMPARED for c in TABLES[t].facts if c.is_averaged})
    if any(has.values()) or name.rpartition(".")[2] in known:
        lacking = " and ".join(name_some([letter for letter in has if not has[letter]]))
        return Refusal(
            f"a column is compared that {'both' if len(has) == 2 else 'all'} datasets have; {name} was not measured in {lacking}; "
            f"measure it with --statistics {name}, or leave it out"
        )
    return Refusal(
        f"a column to compare is a statistic of {', '.join(COMPARED)}; {name!r} is none; {nearest_names(name, known)}"
    )
