"""CSV with invalid quotes, line ends or rows: every row is accounted for, or the file is refused."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attlas.extract.corpus import open_corpus
from attlas.extract.errors import Refusal
from tests.extract.corpora import outcomes, read, written

ROWS = [f"{n},the cat sat on row {n % 3}" for n in range(50)]


def table(rows: Sequence[str], *changes: tuple[int, str], header: str = "id,text") -> str:
    changed = {**dict(enumerate(rows)), **dict(changes)}
    return "\n".join([header, *changed.values()]) + "\n"


def refusal(path: Path, content: str, **options) -> str:
    with pytest.raises(Refusal) as refused:
        read(written(path, content), **options)
    return str(refused.value)


OPENED = (5, '5,"error the cat sat')


@pytest.mark.parametrize(
    ("closed", "last"),
    [
        ([], 51),  # never
        ([(30, '30,"the dog" ran')], 32),  # by a quote that opens another field
        ([(30, '30,the dog "ran"')], 32),
        ([(30, '30,the dog ran 5"')], 32),  # by one at the end of a line, which leaves a valid record
        ([(30, '30,the dog, ran "')], 32),
        ([(30, '30,", the dog')], 32),  # by one before a delimiter, which leaves a record with an extra field
        ([(30, '30,""'), (31, '31,a"')], 33),  # after a doubled quote
        ([(6, '6,one row 5"')], 8),  # by the very next row
        ([(7, '7,"two, rows"')], 9),
    ],
)
def test_a_stray_quote_is_refused_with_its_line(tmp_path, closed, last):
    message = refusal(tmp_path / "t.csv", table(ROWS, OPENED, *closed))
    assert f"in t.csv the quote opened in line 7 runs on to line {last} " in message


def test_a_stray_quote_is_refused_in_any_text_column(tmp_path):
    rows = [f"the cat sat on row {n % 3},{'good' if n % 2 else 'bad'},{n / 10}" for n in range(50)]
    changes = (5, '"the cat sat,bad,0.5'), (9, 'it measured 5",bad,0.9')
    assert "opened in line 7 runs on to line 11" in refusal(
        tmp_path / "t.csv", table(rows, *changes, header="text,label,score")
    )
    tabbed = [(n, row.replace(",", "\t")) for n, row in changes]
    assert "opened in line 7 runs on to line 11" in refusal(
        tmp_path / "t.tsv", table([row.replace(",", "\t") for row in rows], *tabbed, header="text\tlabel\tscore")
    )
    assert "opened in line 7 runs on to line 11" in refusal(
        tmp_path / "t.csv",
        table(
            [row.replace(",", ";") for row in rows], *[(n, r.replace(",", ";")) for n, r in changes], header="text;a;b"
        ),
        delimiter=";",
    )


def test_a_quote_around_complete_rows_is_refused(tmp_path):
    message = refusal(tmp_path / "t.csv", table(ROWS, (5, '"5,the cat sat'), (6, '6,on row 6"')))
    assert "opened in line 7 runs on to line 8" in message


def test_a_stray_quote_is_refused_if_all_columns_are_prose(tmp_path):
    rows = [f"a tale of {n},the cat sat on row {n % 3}" for n in range(50)]
    changes = (5, 'a tale of 5,"the cat sat'), (9, 'a tale of 9,it measured 5"')
    assert "opened in line 7 runs on to line 11" in refusal(tmp_path / "t.csv", table(rows, *changes))


def test_a_stray_quote_in_the_header_is_refused(tmp_path):
    assert "opened in line 1 runs on to line 51" in refusal(tmp_path / "t.csv", table(ROWS, header='id,"text'))
    content = table(ROWS, (20, '20,the dog 5"'), header='text,"note')
    assert "opened in line 1 runs on to line 21" in refusal(tmp_path / "t.csv", content)


def test_an_unclosed_field_is_refused_if_all_fields_are_quoted(tmp_path):
    rows = [f'"{n}","row {n}"' for n in range(9)]
    message = refusal(tmp_path / "t.csv", table(rows, (4, '"4","row 4'), header='"id","text"'))
    assert "opened in line 6 runs on to line 7" in message


def test_damage_within_one_line_is_one_dropped_row(tmp_path):
    content = table(ROWS[:4], (1, '1,"bad" quote'), (2, '2,fine "quote"'), (3, '3,"open'))
    assert outcomes(written(tmp_path / "t.csv", content)) == {
        "t.csv:1": "the cat sat on row 0",
        "t.csv:2": "invalid CSV: ',' expected after '\"'",
        "t.csv:3": 'fine "quote"',
        "t.csv:4": "invalid CSV: unexpected end of data",
    }


TEXTS = [
    "two\nlines",
    "Dear Sir,\n\nI write, as I said,\nto say that\nall, or nearly all, is well.\n\nYours, truly",
    "Hello, my friend\nYes, I agree\nNo, I do not",
    'she said: "no"\nand he: ""',
    "a list:\n- one\n- two\n\n- three, too",
    "def f(x, y):\n    return x, y\n",
    "\n",
    "\r\nany\rline end\n",
    "milk,\n",
]


@pytest.mark.parametrize("header", [["text"], ["id", "text"], ["text", "id"], ["author", "text"], ["a", "text", "b"]])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_multiline_text_is_read_unchanged(tmp_path, header, quoting):
    others = {"id": [str(n) for n in range(len(TEXTS))], "author": ["Jane Doe"] * 9, "a": ["x-1"] * 9, "b": [""] * 9}
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = csv.writer(file, quoting=quoting)
        rows.writerow(header)
        rows.writerows(zip(*(TEXTS if name == "text" else others[name] for name in header), strict=True))
    assert list(outcomes(str(tmp_path / "t.csv")).values()) == TEXTS


@settings(max_examples=50)
@given(st.lists(st.text('ab "\n\r', min_size=1), min_size=1, max_size=5))
def test_what_pythons_csv_writes_is_read_unchanged(tmp_path_factory, texts):
    file = io.StringIO(newline="")
    rows = csv.writer(file, quoting=csv.QUOTE_ALL)
    rows.writerows([("id", "text"), *enumerate(texts)])
    path = written(tmp_path_factory.mktemp("csv") / "t.csv", file.getvalue())
    assert [d.text for d in read(path)] == texts


def test_rows_with_another_number_of_fields_are_dropped(tmp_path):
    content = "id,text\n1\n2,b\n3,c,\n4,d,e,f\n"
    assert outcomes(written(tmp_path / "t.csv", content)) == {
        "t.csv:1": "invalid CSV: 1 fields where the header has 2",
        "t.csv:2": "b",
        "t.csv:3": "invalid CSV: 3 fields where the header has 2",
        "t.csv:4": "invalid CSV: 4 fields where the header has 2",
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_all_line_ends_are_supported(tmp_path, end):
    rows = end.join(["id,text", "1,one", f'2,"two{end}lines"', "", "3,three"])
    assert [d.text for d in read(written(tmp_path / "t.csv", rows))] == ["one", f"two{end}lines", "three"]
    lines = end.join(['{"text": "one"}', '{"text": "two"}'])
    assert [d.source for d in read(written(tmp_path / "t.jsonl", lines))] == ["t.jsonl:1", "t.jsonl:2"]
    text = written(tmp_path / "t.txt", end.join(["one", "and", "", "two"]))
    assert outcomes(text, unit="paragraph") == {"t.txt:1": f"one{end}and", "t.txt:4": "two"}
    assert outcomes(text, unit="line") == {"t.txt:1": "one", "t.txt:2": "and", "t.txt:3": "empty", "t.txt:4": "two"}


def test_nul_characters_are_text(tmp_path):
    assert read(written(tmp_path / "t.csv", "id,text\n1,a\0b\n"))[0].text == "a\0b"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_table_without_rows_has_no_documents(tmp_path, name):
    content = "id,text\n" if name == "t.csv" else "\n\n"
    assert read(written(tmp_path / name, content)) == []


def test_a_duplicate_text_column_is_refused(tmp_path):
    path = written(tmp_path / "t.csv", "text,id,text\na,1,b\n")
    with pytest.raises(Refusal, match=r"t\.csv has 2 named 'text'; rename them"):
        open_corpus(path)
    assert [d.text for d in read(path, text_column="id")] == ["1"]


# --- the delimiter


@pytest.mark.parametrize("delimiter", [";", "|", "\t", ",", "§"])
def test_the_delimiter_can_be_chosen(tmp_path, delimiter):
    content = f'id{delimiter}text\n1{delimiter}one, two; three\n2{delimiter}"a{delimiter}b"\n'
    if delimiter in ",;":
        content = content.replace("one, two; three", '"one, two; three"')
    path = written(tmp_path / "t.csv", content)
    assert [d.text for d in read(path, delimiter=delimiter)] == ["one, two; three", f"a{delimiter}b"]


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ";"), ("t.csv", "|"), ("t.csv", "\t"), ("t.tsv", ",")])
def test_another_delimiter_in_a_header_of_one_column_is_suggested(tmp_path, name, delimiter):
    message = refusal(tmp_path / name, f"id{delimiter}text\n1{delimiter}a\n")
    shown = r"\t" if delimiter == "\t" else delimiter
    assert f"use --delimiter '{shown}'" in message


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n", "\r", "\0", r"\t"])
def test_an_invalid_delimiter_is_refused(delimiter):
    with pytest.raises(
        Refusal, match=re.escape(f"delimiter must be one character other than a quote or line end; got {delimiter!r}")
    ):
        open_corpus("demo", delimiter=delimiter)


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "demo"])
def test_the_delimiter_applies_to_csv_and_tsv_only(tmp_path, name):
    corpus = name if name == "demo" else written(tmp_path / name, '{"text": "a"}')
    with pytest.raises(Refusal, match="delimiter applies to CSV and TSV only; this corpus is"):
        open_corpus(corpus, delimiter=";")
