"""Terminal output: complete numbers, names on one line, correct plurals."""

import io
import re
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from attlas.analysis.columns import Column, FittedTable
from attlas.analysis.naming import corpus_title, model_title, short_name
from attlas.analysis.report import report, write_report
from attlas.analysis.report.numbers import plural
from attlas.analysis.result import write_result
from attlas.extract.printable import printable
from tests.analysis.synthetic import write_dataset

HOSTILE = "a\x1b[31m\r\nattlas: whole\x9b\u202egnp.\u2066\u2028\x07\u200f"
UNSEEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def render_summary(root: Path, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(report(root).terminal(), crop=False)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def numbers_in(text: str) -> list[str]:
    return sorted(re.findall(r"±?[\d.,\u202f]*\d(?:e−\d+)?", text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 中 אב", "plain é 中 אב"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u2066x\u2069\u200e\u061c", r"\u2066x\u2069\u200e\u061c"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("\ufeff\U000e0041", r"\ufeff\U000e0041"),
        ("👩\u200d💻 نمی\u200cخواهم", "👩\u200d💻 نمی\u200cخواهم"),
    ],
)
def test_control_characters_are_shown_as_their_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert printable("abcdefghij", limit=5) == "ab…ij"
    assert printable("abcde", limit=5) == "abcde"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_number_of_the_summary_is_cut(folder: Path, width: int) -> None:
    whole, narrow = render_summary(folder, 1000), render_summary(folder, width)
    assert "…" not in narrow
    left_out = re.findall(r"no room for (.*): widen", " ".join(narrow.split()))
    if width >= 80:
        assert left_out == []
    if not left_out:
        assert numbers_in(narrow) == numbers_in(whole)
    assert set(numbers_in(narrow)) <= set(numbers_in(whole))
    assert {"sharpest", "previous", "same-token", "L1H3"} & set(whole.split()) <= set(narrow.split())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_summary_keeps_to_the_terminal_where_it_can(folder: Path, width: int) -> None:
    assert max(len(line.rstrip()) for line in render_summary(folder, width).splitlines()) <= width


def test_columns_are_left_out_from_the_right_and_named() -> None:
    table = FittedTable(
        [
            Column("a", ["1"]),
            *(Column(n, ["1.234 ±0.005"], right=True, breaks="at spaces", optional=True) for n in "bc"),
        ]
    )
    console = Console(width=10, file=io.StringIO())
    console.print(table, crop=False)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "1.234" in text and "±0.005" in text
    assert "no room for c:" in " ".join(text.split())


@pytest.mark.parametrize("width", ["40", "80", "200"])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_query_table_never_cuts_a_number_or_a_name(
    monkeypatch: pytest.MonkeyPatch, width: str, stream: type[io.StringIO]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "dumb")
    columns = {f"a_rather_long_name_{i}": pa.array([0.000123456, 123456789.0], pa.float64()) for i in range(12)}
    output = stream()
    write_result(pa.table({**columns, "path": ["x" * 300, "y"]}), "table", output)
    text = output.getvalue()
    header = text.splitlines()[0].split()
    assert header == [*columns, "path"]
    assert text.count("0.000123456") == text.count("1.23457e+08") == 12
    assert text.count("x") >= 300
    assert "2 rows" in text


def test_names_in_a_query_table_keep_to_their_line() -> None:
    output = io.StringIO()
    write_result(pa.table({HOSTILE: [HOSTILE], "nested": [[HOSTILE]]}), "table", output)
    assert not UNSEEN.search(output.getvalue())
    assert len(output.getvalue().splitlines()) == 4  # names, rule, row, count


def test_programs_get_names_as_they_are() -> None:
    for form in ("csv", "json"):
        output = io.StringIO()
        write_result(pa.table({"name": [HOSTILE]}), form, output)
        assert "\u202egnp." in output.getvalue()


def test_names_on_the_page_are_shown_and_isolated(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, model_name=HOSTILE, corpus_name="אב")
    page = re.sub(r"<script>.*?</script>", "", write_report(root).read_text("utf-8"), flags=re.DOTALL)
    assert not UNSEEN.search(page)
    assert r"<h1><bdi>a\x1b[31m\r\nattlas" in page
    assert "<bdi>אב</bdi>" in page
    assert not UNSEEN.search(render_summary(root, 80))


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ({"name": "demo", "title": "demo (all-MiniLM-L6-v2)", "architecture": "BertModel"}, "demo (all-MiniLM-L6-v2)"),
        ({"name": "demo", "architecture": "BertModel"}, "demo (BertModel)"),
        ({"name": "bert-base-uncased", "architecture": "BertModel"}, "bert-base-uncased"),
        ({"name": "/home/someone/secret/my-model"}, "my-model"),
        ({"name": "C:\\Users\\someone\\my-model"}, "my-model"),
        ({"name": "0a1b2c3d4e5f60718293", "architecture": "GPT2Model"}, "0a1b2c3d4e5f60718293 (GPT2Model)"),
        ({"name": None, "architecture": "GPT2Model"}, "GPT2Model"),
        ({}, "a model"),
        (None, "a model"),
    ],
)
def test_a_model_is_called_what_it_is(model: dict[str, str] | None, title: str) -> None:
    assert model_title({"model": model}) == title


def test_names_in_headings_are_short_and_tell_nothing_of_the_machine() -> None:
    assert short_name("owner/name") == "owner/name"
    assert short_name("../../home/someone/texts") == "texts"
    assert len(short_name("x" * 500)) == 60
    assert corpus_title({"corpus": {"name": "demo"}}) == "demo (Python's reference manual)"
    assert corpus_title({}) == "a corpus"


def test_one_is_no_plural(tmp_path: Path) -> None:
    assert (plural(1, "row"), plural(0, "row"), plural(2, "row")) == ("1 row", "0 rows", "2 rows")
    root = write_dataset(tmp_path / "d", documents=1, layers=1, heads=1)
    assert "1 head, 1 document, " in render_summary(root, 200)
    page = write_report(root).read_text("utf-8")
    for one in ("layer", "head", "document"):
        assert f"<b>1</b><span>{one}</span>" in page
