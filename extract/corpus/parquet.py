"""Read Parquet: one document per row, with its text in a column of strings, nested in structs or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from attlas.extract.corpus.columns import check_column
from attlas.extract.corpus.documents import Document, make_document
from attlas.extract.corpus.files import CorpusFile
from attlas.extract.corpus.options import ReadOptions
from attlas.extract.errors import Refusal

_BATCH_ROWS = 256
# text is packed to a third or a tenth of its size; a thousandth is a decompression bomb
_UNPACKED_PER_BYTE, _UNUSUAL = 1_000, 20
_BATCH_BYTES = 1 << 30
# null: a column of missing values only; binary: some writers store strings this way
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_null,
)


class _Column(NamedTuple):
    path: tuple[str, ...]  # names of the column and of nested fields
    type: pa.DataType

    @property
    def name(self) -> str:
        return ".".join(self.path)


def check_parquet(file: CorpusFile, options: ReadOptions) -> None:
    """Raise Refusal if a file can't be opened, lacks the text column, or has no text in it."""
    import pyarrow.parquet as pq

    column = _text_column(pq.read_schema(_source(file)), options.text_column, file.name)
    if any(test(_value_type(column.type)) for test in _TEXT_TYPES):
        return
    advice = "use --text-column"
    if pa.types.is_struct(column.type):
        advice = f"use a field of it, such as --text-column {column.name}.{column.type.field(0).name}"
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        advice = "join each list into one text first, or use --text-column"
    raise Refusal(f"the text column must hold text; {column.name!r} of {file.name} holds {column.type}; {advice}")


def parquet_documents(file: CorpusFile, options: ReadOptions) -> Iterator[Document]:
    """The document of each row."""
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(_source(file), page_checksum_verification=True) as parquet:
        column = _text_column(parquet.schema_arrow, options.text_column, file.name)
        rows = _rows_at_once(file, parquet.metadata, column, options.max_document_bytes)
        for batch in parquet.iter_batches(rows, columns=[column.name]):
            for value in _values(batch, column.path):
                number += 1
                yield _document(f"{file.name}:{number}", value)
        if number != parquet.metadata.num_rows:
            raise OSError(f"its footer states {parquet.metadata.num_rows} rows")


def _rows_at_once(file: CorpusFile, metadata: Any, column: _Column, longest: int) -> int:
    """How many rows to unpack at once. Raises Refusal for a file that is tiny for what it unpacks to.

    A dictionary holds a text once for any number of rows, so each row may have the size of the whole column.
    """
    rows = _BATCH_ROWS
    for chunk in _chunks(metadata, column):
        packed, unpacked = max(1, chunk.total_compressed_size), chunk.total_uncompressed_size
        if unpacked > max(longest, _UNPACKED_PER_BYTE * packed):
            raise Refusal(
                f"a Parquet file unpacks to at most {_UNPACKED_PER_BYTE:,} times its size; {column.name} of {file.name} says "
                f"{packed:,} bytes unpack to {unpacked:,}; leave it out, or write it again"
            )
        if unpacked > _UNUSUAL * packed:
            rows = min(rows, max(1, _BATCH_BYTES // unpacked))
    return rows


def _chunks(metadata: Any, column: _Column) -> Iterator[Any]:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            chunk = group.column(place)
            if chunk.path_in_schema == column.name:
                yield chunk


def _source(file: CorpusFile) -> Path | BinaryIO:
    return file.path if isinstance(file.path, Path) else file.path.ranges()


def _text_column(schema: pa.Schema, text_column: str, name: str) -> _Column:
    top = [_Column((field.name,), field.type) for field in schema]
    # a column with the dotted name itself takes precedence
    nested = [c for column in top for c in _nested_columns(column) if c.name not in schema.names]
    columns = [*top, *nested]
    check_column((c.name for c in columns), text_column, name)
    return next(c for c in columns if c.name == text_column)


def _nested_columns(column: _Column) -> Iterator[_Column]:
    if pa.types.is_struct(column.type):
        for n in range(column.type.num_fields):
            field = column.type.field(n)
            inner = _Column((*column.path, field.name), field.type)
            yield inner
            yield from _nested_columns(inner)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """The storage type of an extension type, or the value type of a dictionary."""
    if isinstance(kind, pa.BaseExtensionType):
        return _value_type(kind.storage_type)
    return _value_type(kind.value_type) if isinstance(kind, pa.DictionaryType) else kind


def _values(batch: pa.RecordBatch, path: tuple[str, ...]) -> list[bytes | None]:
    """The column as bytes: writers don't check that text is UTF-8, and an invalid row must not affect its batch."""
    column: pa.Array = batch.column(path[0])
    for name in path[1:]:
        # flatten() makes a field null where its struct is null
        column = column.flatten()[column.type.get_field_index(name)]
    while column.type != _value_type(column.type):
        column = column.storage if isinstance(column, pa.ExtensionArray) else column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _document(source: str, value: bytes | None) -> Document:
    if value is None:
        return make_document(source, None)
    try:
        return make_document(source, value.decode())
    except UnicodeDecodeError as error:
        return Document(source, "", f"not UTF-8 at byte {error.start}")
