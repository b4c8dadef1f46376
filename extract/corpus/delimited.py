"""Read CSV and TSV: one document per record.

A stray opening quote turns all lines up to the next quote into one field. It is impossible to tell where such a record
should have ended, or how many documents it swallowed, so a file with one is refused.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from attlas.extract.corpus.columns import check_column
from attlas.extract.corpus.documents import Document, make_document
from attlas.extract.corpus.files import CorpusFile
from attlas.extract.corpus.lines import Line, read_lines
from attlas.extract.corpus.options import ReadOptions
from attlas.extract.errors import Refusal

_DELIMITER_OF_KIND = {"CSV": ",", "TSV": "\t"}
_COMMON_DELIMITERS = {";": "';'", "\t": r"'\t'", ",": "','", "|": "'|'"}
# categories of fields: a column of numbers, dates or names differs from one of prose
_CATEGORIES = {"number": r"(?=\D*\d)[\d.,:/TZ%+-]+", "name": r"[\w.@/+-]+", "empty": r"\s*"}


class Record(NamedTuple):
    """The fields of a record or its error, and the lines it spans."""

    fields: list[str]
    error: str | None
    lines: Sequence[Line]


def check_delimited(file: CorpusFile, options: ReadOptions) -> None:
    """Raise Refusal if the first record is not a header with the text column. A file without records is valid."""
    delimiter = _delimiter(file, options)
    header = next(_records(file, options), None)
    if header is None:
        return
    if header.error:
        raise Refusal(
            f"{file.name} must begin with a header; its first line is {header.error}; "
            "set --delimiter or --encoding if they are wrong, repair the file, or leave it out"
        )
    if len(header.lines) > 2:
        _refuse_swallowed_rows(file, header._replace(lines=header.lines[:-1]), header.fields, delimiter)
    other = next((d for d in _COMMON_DELIMITERS if d != delimiter and d in "".join(header.fields)), None)
    advice = "use --text-column"
    if other and len(header.fields) == 1:
        advice = f"use --delimiter {_COMMON_DELIMITERS[other]} if that separates the fields, or --text-column"
    check_column(header.fields, options.text_column, file.name, advice=advice)


def delimited_documents(file: CorpusFile, options: ReadOptions) -> Iterator[Document]:
    """The document of each record after the header."""
    records = _records(file, options)
    header = next(records, Record([], None, ()))
    for number, record in enumerate(records, 1):
        source = f"{file.name}:{number}"
        error = record.error
        if len(record.lines) > 1:
            _refuse_swallowed_rows(file, record, header.fields, _delimiter(file, options))
        if error is None and len(record.fields) != len(header.fields):
            error = f"invalid {file.kind}: {len(record.fields)} fields where the header has {len(header.fields)}"
        if error:
            yield Document(source, "", error)
        else:
            yield make_document(source, record.fields[header.fields.index(options.text_column)])


def _delimiter(file: CorpusFile, options: ReadOptions) -> str:
    return options.delimiter or _DELIMITER_OF_KIND[file.kind]


def _records(file: CorpusFile, options: ReadOptions) -> Iterator[Record]:
    """Yield all records, starting with the header, without blank lines. Raises Refusal for a stray quote."""
    lines: list[Line] = []
    # by default, csv rejects fields of more than 128 KiB; the limit can only be set for the whole process
    csv.field_size_limit(options.max_document_bytes)
    texts = _texts(read_lines(file, options), lines)
    records = csv.reader(texts, delimiter=_delimiter(file, options), strict=True)
    while True:
        lines.clear()  # the csv reader never reads past its record
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                raise _too_long_field(file, lines, options.max_document_bytes) from error
            if len(lines) > 1:
                raise _stray_quote(file, lines, str(error)) from error
            yield Record([], f"invalid {file.kind}: {error}", tuple(lines))
            continue
        if fields:
            undecodable = next((line.error for line in lines if line.error), None)
            yield Record(fields, undecodable, tuple(lines))


def _texts(lines: Iterator[Line], consumed: list[Line]) -> Iterator[str]:
    """Yield the text of each line, and add the line to `consumed`."""
    for line in lines:
        consumed.append(line)
        yield line.text


def _stray_quote(file: CorpusFile, lines: Sequence[Line], reason: str) -> Refusal:
    first, last = lines[0].number, lines[-1].number
    return Refusal(
        f"a quoted field must end at its closing quote; in {file.name} the quote opened in line {first} runs on to line {last} "
        f"({reason}), and the number of rows it swallows is unknown; close it, double it, or quote the field"
    )


def _too_long_field(file: CorpusFile, lines: Sequence[Line], longest: int) -> Refusal:
    return Refusal(
        f"a field has at most {longest:,} characters; in {file.name} one that begins in line {lines[0].number} has more; close its "
        "quote if it is a stray one, give a larger --max-document-bytes, or leave the file out"
    )


def _refuse_swallowed_rows(file: CorpusFile, record: Record, header: Sequence[str], delimiter: str) -> None:
    """Raise Refusal if lines inside a record look like rows: most of them, or any if the record itself is invalid.

    Text of several lines is allowed. It can be told from rows: prose has spaces after its commas, code has indentation,
    and neither has numbers in the same columns as the file.
    """
    if len(header) < 2:
        return  # any line would look like a row of one column
    is_complete = len(record.fields) == len(header)
    single_line = [n for n, field in enumerate(record.fields) if not _has_line_end(field)]
    is_row = is_complete and record.fields is not header
    expected = {n: _category(record.fields[n]) for n in single_line} if is_row else {}
    candidates = _inner_lines(record) if is_complete else record.lines
    inside = [_fields(line, delimiter) for line in candidates]
    rows = [fields for fields in inside if _looks_like_row(fields, header, expected)]
    # if all columns are prose, one or two lines of code may look like rows
    required = 1 if not is_row or {"number", "name"} & set(expected.values()) else 3
    if len(rows) >= required and (2 * len(rows) > len(inside) or not is_complete):
        raise _stray_quote(file, record.lines, f"{len(rows)} of the lines look like rows")


def _inner_lines(record: Record) -> Sequence[Line]:
    """The lines that can look like rows only by being rows: not a first or last line with other columns of the record."""
    multiline = [n for n, field in enumerate(record.fields) if _has_line_end(field)] or [0]
    first = 0 if multiline[0] < len(record.fields) - 1 else 1
    last = len(record.lines) if multiline[-1] > 0 else -1
    return record.lines[first:last]


def _looks_like_row(fields: Sequence[str], header: Sequence[str], expected: Mapping[int, str]) -> bool:
    is_spaced = any(name[:1].isspace() for name in header)
    return (
        len(fields) == len(header)
        and (is_spaced or not any(field[:1].isspace() for field in fields))
        and all(_category(fields[n]) == category for n, category in expected.items())
    )


def _has_line_end(field: str) -> bool:
    return "\n" in field or "\r" in field


def _fields(line: Line, delimiter: str) -> list[str]:
    # an unpaired quote is the one that opens or closes the record's field
    if line.text.count('"') % 2:
        return line.content.split(delimiter)
    return next(csv.reader([line.content], delimiter=delimiter), [])


def _category(field: str) -> str:
    return next((name for name, pattern in _CATEGORIES.items() if re.fullmatch(pattern, field)), "text")
