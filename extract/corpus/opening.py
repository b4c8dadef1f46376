"""Open a corpus by name: check everything that can be checked before the documents are read, and read them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attlas.extract.corpus.columns import check_column
from attlas.extract.corpus.compression import READ_ERRORS
from attlas.extract.corpus.delimited import check_delimited, delimited_documents
from attlas.extract.corpus.documents import Corpus, Document
from attlas.extract.corpus.files import IMAGES, CorpusFile, CorpusFiles, corpus_files
from attlas.extract.corpus.generated import generation_of
from attlas.extract.corpus.hub import demo_documents, hub_documents
from attlas.extract.corpus.json_lines import json_columns, json_documents
from attlas.extract.corpus.options import AUTO, MAX_DOCUMENT_BYTES, ReadOptions, Unit
from attlas.extract.corpus.parquet import check_parquet, parquet_documents
from attlas.extract.corpus.text import text_documents
from attlas.extract.errors import Refusal

_DEMO, _HUB = "demo", "hub:"


def open_corpus_of(corpus: str, run: Any) -> Corpus:
    """Open the corpus of a run, which has all options of `open_corpus` as attributes. Raises Refusal."""
    return open_corpus(corpus, **{name: getattr(run, name) for name in open_corpus.__kwdefaults__ or ()})


def open_corpus(
    corpus: str,
    *,
    text_column: str = "text",
    unit: Unit = "document",
    delimiter: str | None = None,
    encoding: str = AUTO,
    seed: int | None = None,
    blocks: int | None = None,
    length: int | None = None,
    depths: str | Collection[int] | None = None,
    limit: int | None = None,
    strict: bool = False,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Corpus:
    """Open a corpus and check its files, without reading the documents. Raises Refusal.

    `corpus`: `demo`, `random-repeats`, `needle`, `hub:NAME` (or `hub:NAME/CONFIG:SPLIT` with NAME as owner/name), a file, a
    folder or a glob, or the URL of an object, a prefix or a glob in an object store (`s3://bucket/folder/*.jsonl`).
    `text_column`: a column's name, or the path to a nested one, such as `meta.text`.
    `delimiter`: one character; by default a comma for CSV and a tab for TSV.
    `encoding`: any encoding of Python; a byte order mark takes precedence.
    `seed`, `blocks`, `length`, `depths`: of the generated corpora, random-repeats and needle.
    `limit`: the maximum number of documents, including dropped ones.
    `max_document_bytes`: a longer text is dropped; a longer line of a file is refused, because what it hides can't be counted.
    """
    if limit is not None and limit < 1:
        raise Refusal(f"limit must be at least 1; got {limit}; use a larger number or none")
    if max_document_bytes < 1:
        raise Refusal(f"max_document_bytes must be at least 1; got {max_document_bytes}; use a larger number")
    options = ReadOptions(
        text_column=text_column,
        unit=unit,
        delimiter=delimiter,
        encoding=encoding,
        max_document_bytes=max_document_bytes,
    )
    options.check()
    new_corpus = partial(Corpus, limit=limit, strict=strict, max_document_bytes=max_document_bytes)
    generation = generation_of(corpus, seed=seed, blocks=blocks, length=length, depths=depths)
    if generation is not None:
        options.check_for_ids(corpus)
        return new_corpus(corpus, (), lambda: iter(()), generation=generation)
    if corpus == _DEMO or corpus.startswith(_HUB):
        options.check_for(corpus)
        return new_corpus(corpus, (), demo_documents if corpus == _DEMO else hub_documents(corpus, text_column))
    found = corpus_files(corpus)
    options.check_for(found.kind)
    for file in found.files:
        _check_file(file, options)
    sizes = tuple((file.name, file.size) for file in found.files)
    folder = found.folder if found.kind == IMAGES else None
    return new_corpus(found.name, sizes, partial(_documents, found, options), folder)


def _check_file(file: CorpusFile, options: ReadOptions) -> None:
    """Raise Refusal if a file can't be opened as its kind or lacks the text column. A file without rows is valid."""
    check = _CHECKS.get(file.kind)
    if check is None:
        return  # an unreadable text or image is one dropped document
    try:
        check(file, options)
    except (*READ_ERRORS, UnicodeDecodeError, csv.Error) as error:
        raise Refusal(f"{file.name} must be readable as {file.kind}; {error}; repair it or leave it out") from error


def _check_json(file: CorpusFile, options: ReadOptions) -> None:
    if columns := json_columns(file, options):
        check_column(columns, options.text_column, file.name)


def _documents(found: CorpusFiles, options: ReadOptions) -> Iterator[Document]:
    for file in found.files:
        yield from _read_file(file, options)
    for link in found.duplicate_links:
        yield Document(link, "", "link to a folder that is read already")


def _read_file(file: CorpusFile, options: ReadOptions) -> Iterator[Document]:
    """Read the documents of a file. Raises Refusal for damage after the first document."""
    place = file.name
    try:
        for document in _READERS[file.kind](file, options):
            place = document.source
            yield document
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        # documents after the damage can't be counted, so they can't be dropped
        raise Refusal(
            f"a corpus must be readable to its end; {file.name} fails after {place}: {error}; repair it or leave it out"
        ) from error


def _image_document(file: CorpusFile, _: ReadOptions) -> Iterable[Document]:
    assert isinstance(file.path, Path), "images are in a local folder"
    return (Document(file.name, "", file=file.path),)


_CHECKS: dict[str, Callable[[CorpusFile, ReadOptions], None]] = {
    "JSON lines": _check_json,
    "CSV": check_delimited,
    "TSV": check_delimited,
    "Parquet": check_parquet,
}
_READERS: dict[str, Callable[[CorpusFile, ReadOptions], Iterable[Document]]] = {
    "text": text_documents,
    "JSON lines": json_documents,
    "CSV": delimited_documents,
    "TSV": delimited_documents,
    "Parquet": parquet_documents,
    IMAGES: _image_document,
}
