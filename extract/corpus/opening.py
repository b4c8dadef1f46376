"""A corpus by its name: everything that can be checked before the documents are read, and then these."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from extract.corpus.columns import check_column
from extract.corpus.compression import READ_ERRORS
from extract.corpus.delimited import check_delimited, delimited_documents
from extract.corpus.documents import Corpus, Document
from extract.corpus.files import IMAGES, CorpusFile, LocalFiles, local_files
from extract.corpus.hub import demo_documents, hub_documents
from extract.corpus.json_lines import json_columns, json_documents
from extract.corpus.parquet import check_parquet, parquet_documents
from extract.corpus.reading import AUTO, Reading, Unit
from extract.corpus.text import text_documents
from extract.errors import Refusal

_DEMO, _HUB = "demo", "hub:"


def open_corpus(
    corpus: str,
    *,
    text_column: str = "text",
    unit: Unit = "document",
    delimiter: str | None = None,
    encoding: str = AUTO,
    limit: int | None = None,
    strict: bool = False,
) -> Corpus:
    """Check everything that can be checked before the documents are read, and give them.

    `corpus`: `demo`, `hub:NAME` (or `hub:NAME/CONFIG:SPLIT` with NAME as owner/name), a file, a folder or a glob.
    `text_column` may lead into nested columns, `meta.text`. `delimiter`: one character; None is that of the file's kind.
    `encoding`: a name that Python knows; a byte order mark wins over it. `limit` counts documents, dropped ones too.
    Raises Refusal.
    """
    if limit is not None and limit < 1:
        raise Refusal(f"limit must be at least 1; got {limit}; give a larger number or none")
    reading = Reading(text_column=text_column, unit=unit, delimiter=delimiter, encoding=encoding)
    reading.check()
    opened = partial(Corpus, limit=limit, strict=strict)
    if corpus == _DEMO or corpus.startswith(_HUB):
        reading.check_for(corpus)
        return opened(corpus, (), demo_documents if corpus == _DEMO else hub_documents(corpus, text_column))
    if corpus == "random-repeats":
        raise Refusal("random-repeats is made of token ids and can't be read as documents; give texts")
    local = local_files(corpus)
    reading.check_for(local.kind)
    for file in local.files:
        _check_file(file, reading)
    sizes = tuple((file.name, file.size) for file in local.files)
    folder = local.folder if local.kind == IMAGES else None
    return opened(local.name, sizes, partial(_documents, local, reading), folder)


def _check_file(file: CorpusFile, reading: Reading) -> None:
    """Refuse a file that can't be opened as its kind or lacks the column; one without rows passes."""
    check = _CHECKS.get(file.kind)
    if check is None:
        return  # a text or an image that can't be read is one dropped document
    try:
        check(file, reading)
    except (*READ_ERRORS, UnicodeDecodeError, csv.Error) as error:
        raise Refusal(f"{file.name} must be readable as {file.kind}; {error}; repair it or leave it out") from error


def _check_json(file: CorpusFile, reading: Reading) -> None:
    if columns := json_columns(file, reading):
        check_column(columns, reading.text_column, file.name)


def _documents(local: LocalFiles, reading: Reading) -> Iterator[Document]:
    for file in local.files:
        yield from _read_to_its_end(file, reading)
    for link in local.links_to_read_folders:
        yield Document(link, "", "link to a folder that is read already")


def _read_to_its_end(file: CorpusFile, reading: Reading) -> Iterator[Document]:
    place = file.name
    try:
        for document in _READERS[file.kind](file, reading):
            place = document.source
            yield document
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        # what is behind the damage can't be counted, so it can't be dropped
        raise Refusal(
            f"a corpus must be readable to its end; {file.name} fails after {place}: {error}; repair it or leave it out"
        ) from error


def _image(file: CorpusFile, _: Reading) -> Iterable[Document]:
    return (Document(file.name, "", file=file.path),)


_CHECKS: dict[str, Callable[[CorpusFile, Reading], None]] = {
    "JSON lines": _check_json,
    "CSV": check_delimited,
    "TSV": check_delimited,
    "Parquet": check_parquet,
}
_READERS: dict[str, Callable[[CorpusFile, Reading], Iterable[Document]]] = {
    "text": text_documents,
    "JSON lines": json_documents,
    "CSV": delimited_documents,
    "TSV": delimited_documents,
    "Parquet": parquet_documents,
    IMAGES: _image,
}
