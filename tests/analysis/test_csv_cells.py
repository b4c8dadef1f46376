import csv
import io
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from attlas.analysis.csv_cells import without_formulas
from attlas.analysis.frames_output import write_frames
from attlas.analysis.result import write_result

FORMULAS = ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1"]
TEXTS = ["a=b", "-1.5", "+3", "-2e-7", ".5", "topics:yield", "'quoted", "", "−1"]


def test_a_name_that_a_spreadsheet_would_run_is_written_as_text(tmp_path: Path) -> None:
    """In the answers of queries and in exports, which share their CSV with comparisons, findings and trends."""
    frame = pl.DataFrame({"source": [*FORMULAS, *TEXTS, None], "value": -1.5})
    stream = io.StringIO()
    write_result(frame.to_arrow(), "csv", stream)
    write_frames(iter([frame]), tmp_path / "a.csv")
    for text in (stream.getvalue(), (tmp_path / "a.csv").read_bytes().decode()):
        rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
        assert [source for source, _ in rows] == [*(f"'{formula}" for formula in FORMULAS), *TEXTS, ""]
        assert {value for _, value in rows} == {"-1.5"}


def test_parquet_and_json_keep_names_as_they_are() -> None:
    stream = io.StringIO()
    write_result(pa.table({"source": ["=1+1"]}), "json", stream)
    assert stream.getvalue() == '[{"source":"=1+1"}]\n'


@pytest.mark.parametrize("frame", [pl.DataFrame(), pl.DataFrame({"a": [1]}), pl.DataFrame({"a": [["=x"]]})])
def test_frames_without_text_stay_as_they_are(frame: pl.DataFrame) -> None:
    assert without_formulas(frame).equals(frame)
