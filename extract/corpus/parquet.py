"""Parquet: a document per row, its text in a column of strings, at the top or inside structs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from extract.corpus.columns import check_column
from extract.corpus.documents import Document, document_of
from extract.corpus.files import CorpusFile
from extract.corpus.reading import Reading
from extract.errors import Refusal

_ROWS = 256  # at a time
# null: a column of nothing but missing values; binary: how some writers store strings
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
    path: tuple[str, ...]  # from the top through structs
    type: pa.DataType

    @property
    def name(self) -> str:
        return ".".join(self.path)


def check_parquet(file: CorpusFile, reading: Reading) -> None:
    """Refuse a file that can't be opened, lacks the text column, or holds something else in it."""
    import pyarrow.parquet as pq

    column = _text_column(pq.read_schema(file.path), reading.text_column, file.name)
    if any(test(_value_type(column.type)) for test in _TEXT_TYPES):
        return
    what_to_do = "use --text-column"
    if pa.types.is_struct(column.type):
        what_to_do = f"name a field of it, such as --text-column {column.name}.{column.type.field(0).name}"
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        what_to_do = "join each list into one text first, or use --text-column"
    raise Refusal(f"the text column must hold text; {column.name!r} of {file.name} holds {column.type}; {what_to_do}")


def parquet_documents(file: CorpusFile, reading: Reading) -> Iterator[Document]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
        column = _text_column(parquet.schema_arrow, reading.text_column, file.name)
        for batch in parquet.iter_batches(_ROWS, columns=[column.name]):
            for value in _values(batch, column.path):
                number += 1
                yield _document(f"{file.name}:{number}", value)
        if number != parquet.metadata.num_rows:
            raise OSError(f"its footer tells of {parquet.metadata.num_rows} rows")


def _text_column(schema: pa.Schema, text_column: str, name: str) -> _Column:
    top = [_Column((field.name,), field.type) for field in schema]
    # a column whose own name has the dot wins
    nested = [c for column in top for c in _columns_inside(column) if c.name not in schema.names]
    columns = [*top, *nested]
    check_column((c.name for c in columns), text_column, name)
    return next(c for c in columns if c.name == text_column)


def _columns_inside(column: _Column) -> Iterator[_Column]:
    if pa.types.is_struct(column.type):
        for n in range(column.type.num_fields):
            field = column.type.field(n)
            inner = _Column((*column.path, field.name), field.type)
            yield inner
            yield from _columns_inside(inner)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """What is stored under an extension type or a dictionary."""
    if isinstance(kind, pa.BaseExtensionType):
        return _value_type(kind.storage_type)
    return _value_type(kind.value_type) if isinstance(kind, pa.DictionaryType) else kind


def _values(batch: pa.RecordBatch, path: tuple[str, ...]) -> list[bytes | None]:
    """The column as bytes: writers don't check that text is UTF-8, and one bad row must not take its batch along."""
    column: pa.Array = batch.column(path[0])
    for name in path[1:]:
        # flattened, a field is null where its struct is
        column = column.flatten()[column.type.get_field_index(name)]
    while column.type != _value_type(column.type):
        column = column.storage if isinstance(column, pa.ExtensionArray) else column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _document(source: str, value: bytes | None) -> Document:
    if value is None:
        return document_of(source, None)
    try:
        return document_of(source, value.decode())
    except UnicodeDecodeError as error:
        return Document(source, "", f"not UTF-8 at byte {error.start}")
