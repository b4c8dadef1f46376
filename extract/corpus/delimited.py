"""CSV and TSV: a document per record.

A quote that is opened by mistake makes one field of all lines up to the next quote. Such a record can't be counted as
one dropped document, nor can it be told where it should have ended: a file that has one is refused.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from extract.corpus.columns import check_column
from extract.corpus.documents import Document, document_of
from extract.corpus.files import CorpusFile
from extract.corpus.lines import Line, decoded_lines
from extract.corpus.reading import Reading
from extract.errors import Refusal

_DELIMITER_OF_KIND = {"CSV": ",", "TSV": "\t"}
_USUAL_DELIMITERS = {";": "';'", "\t": r"'\t'", ",": "','", "|": "'|'"}
# of which sort the fields of a column are: prose is of another than numbers, dates and names
_SORTS = {"number": r"(?=\D*\d)[\d.,:/TZ%+-]+", "name": r"[\w.@/+-]+", "empty": r"\s*"}


class Record(NamedTuple):
    """The fields of a record, or what is wrong with it; `lines` are those that it stands on."""

    fields: list[str]
    wrong: str | None
    lines: Sequence[Line]


def check_delimited(file: CorpusFile, reading: Reading) -> None:
    """Refuse a file whose first record is no header with the text column; one without records passes."""
    delimiter = _delimiter(file, reading)
    header = next(_records(file, reading), None)
    if header is None:
        return
    if header.wrong:
        raise Refusal(
            f"{file.name} must begin with a header; its first line is {header.wrong}; "
            "say --delimiter or --encoding if they are others, repair it, or leave it out"
        )
    if len(header.lines) > 2:
        _refuse_swallowed_rows(file, header._replace(lines=header.lines[:-1]), header.fields, delimiter)
    other = next((d for d in _USUAL_DELIMITERS if d != delimiter and d in "".join(header.fields)), None)
    advice = "use --text-column"
    if other and len(header.fields) == 1:
        advice = f"use --delimiter {_USUAL_DELIMITERS[other]} if that is what separates them, or --text-column"
    check_column(header.fields, reading.text_column, file.name, advice=advice)


def delimited_documents(file: CorpusFile, reading: Reading) -> Iterator[Document]:
    records = _records(file, reading)
    header = next(records, Record([], None, ()))
    for number, record in enumerate(records, 1):
        source = f"{file.name}:{number}"
        wrong = record.wrong
        if len(record.lines) > 1:
            _refuse_swallowed_rows(file, record, header.fields, _delimiter(file, reading))
        if wrong is None and len(record.fields) != len(header.fields):
            wrong = f"invalid {file.kind}: {len(record.fields)} fields where the header has {len(header.fields)}"
        if wrong:
            yield Document(source, "", wrong)
        else:
            yield document_of(source, record.fields[header.fields.index(reading.text_column)])


def _delimiter(file: CorpusFile, reading: Reading) -> str:
    return reading.delimiter or _DELIMITER_OF_KIND[file.kind]


def _records(file: CorpusFile, reading: Reading) -> Iterator[Record]:
    """Every record, the header first; blank lines are none. Raises Refusal for one that runs on from a stray quote."""
    lines: list[Line] = []
    # a process-wide setting, and the only one there is: the default refuses texts of more than 128 KiB
    csv.field_size_limit(sys.maxsize)
    texts = _texts(decoded_lines(file, reading.encoding), lines)
    records = csv.reader(texts, delimiter=_delimiter(file, reading), strict=True)
    while True:
        lines.clear()  # the reader takes no line beyond its record
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if len(lines) > 1:
                raise _stray_quote(file, lines, str(error)) from error
            yield Record([], f"invalid {file.kind}: {error}", tuple(lines))
            continue
        if fields:
            undecodable = next((line.wrong for line in lines if line.wrong), None)
            yield Record(fields, undecodable, tuple(lines))


def _texts(lines: Iterator[Line], taken: list[Line]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line.text


def _stray_quote(file: CorpusFile, lines: Sequence[Line], why: str) -> Refusal:
    first, last = lines[0].number, lines[-1].number
    return Refusal(
        f"a quoted field ends at the quote that closes it; in {file.name} the quote that opens in line {first} runs on to "
        f"line {last} ({why}), and how many rows it swallows can't be known; close it, or double it, or quote the field"
    )


def _refuse_swallowed_rows(file: CorpusFile, record: Record, header: Sequence[str], delimiter: str) -> None:
    """Raise Refusal where lines inside a record look like rows: most of them, or any if the record is wrong as it is.

    Text of several lines is welcome; prose has a space behind its commas, code before its lines, and neither has numbers where the file has.
    """
    if len(header) < 2:
        return  # any line would look like a row of one column
    is_whole = len(record.fields) == len(header)
    beside = [n for n, field in enumerate(record.fields) if not _has_line_end(field)]
    of_a_row = is_whole and record.fields is not header
    expected = {n: _sort(record.fields[n]) for n in beside} if of_a_row else {}
    telling = _lines_that_tell(record) if is_whole else record.lines
    inside = [_fields(line, delimiter) for line in telling]
    rows = [fields for fields in inside if _looks_like_row(fields, header, expected)]
    # beside prose in every column, a line or two of code may look like rows
    enough = 1 if not of_a_row or {"number", "name"} & set(expected.values()) else 3
    if len(rows) >= enough and (2 * len(rows) > len(inside) or not is_whole):
        raise _stray_quote(file, record.lines, f"{len(rows)} of the lines look like rows")


def _lines_that_tell(record: Record) -> Sequence[Line]:
    """The lines that look like rows only if they are: of the first and the last, a column or more is the record's own."""
    long = [n for n, field in enumerate(record.fields) if _has_line_end(field)] or [0]
    first = 0 if long[0] < len(record.fields) - 1 else 1
    last = len(record.lines) if long[-1] > 0 else -1
    return record.lines[first:last]


def _looks_like_row(fields: Sequence[str], header: Sequence[str], expected: Mapping[int, str]) -> bool:
    is_spaced = any(name[:1].isspace() for name in header)
    return (
        len(fields) == len(header)
        and (is_spaced or not any(field[:1].isspace() for field in fields))
        and all(_sort(fields[n]) == sort for n, sort in expected.items())
    )


def _has_line_end(field: str) -> bool:
    return "\n" in field or "\r" in field


def _fields(line: Line, delimiter: str) -> list[str]:
    # a quote without its other is the one that opened or closed the record's field
    if line.text.count('"') % 2:
        return line.content.split(delimiter)
    return next(csv.reader([line.content], delimiter=delimiter), [])


def _sort(field: str) -> str:
    return next((name for name, pattern in _SORTS.items() if re.fullmatch(pattern, field)), "text")
