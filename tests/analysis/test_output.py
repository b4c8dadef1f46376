"""Results are written completely, or the command fails and leaves nothing behind."""

import io
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.analysis.output import OutputError, answer_file, write_whole
from attlas.analysis.query import query
from attlas.analysis.result import FORMATS, Format, write_result
from attlas.extract.store import Refusal

RESULT = pa.table({"a": list(range(70_000)), "b": ["é"] * 70_000})
LIMIT = 4096
ATTLAS = [sys.executable, "-m", "attlas.flows.cli"]


def write_to(path: Path, form: Format = "csv", rows: pa.Table = RESULT) -> None:
    with answer_file(path) as file:
        write_result(rows, form, file)


class SlowStream(io.RawIOBase):
    """A stream that takes a few bytes at a time, like a pipe, and eventually nothing more."""

    def __init__(self, most: int) -> None:
        self.taken, self.most = bytearray(), most

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(memoryview(data))[: min(1000, self.most - len(self.taken))]  # type: ignore[arg-type]
        self.taken += piece
        return len(piece)


def test_what_a_stream_takes_in_pieces_arrives_whole() -> None:
    stream = SlowStream(10**9)
    write_result(RESULT, "csv", cast(IO[bytes], stream))
    assert pl.read_csv(bytes(stream.taken)).height == RESULT.num_rows


@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_that_stops_taking_is_an_error(form: Format) -> None:
    with pytest.raises(OutputError, match="did not take all of it"):
        write_result(RESULT, form, cast(IO[bytes], SlowStream(200)))


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_an_error(form: Format) -> None:
    with Path("/dev/full").open("w") as full, pytest.raises(OutputError, match="No space left"):
        write_result(RESULT, form, full)
    with pytest.raises(OutputError, match="/dev/full did not take all of it"):
        write_to(Path("/dev/full"), form)
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_every_format_reads_back_from_a_file(tmp_path: Path, form: Format) -> None:
    read: dict[str, Callable[[Path], pl.DataFrame]] = {
        "csv": pl.read_csv,
        "json": pl.read_json,
        "parquet": pl.read_parquet,
    }
    write_to(tmp_path / "x", form)
    assert read[form](tmp_path / "x").equals(pl.DataFrame(RESULT))
    write_to(tmp_path / "none", form, RESULT.slice(0, 0))
    assert read[form](tmp_path / "none").height == 0


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


@pytest.mark.sample(1)
@pytest.mark.parametrize("before", [None, "what was there"])
def test_a_file_that_cannot_be_finished_leaves_what_was_there(folder: Path, tmp_path: Path, before: str | None) -> None:
    target = tmp_path / "answer.csv"
    if before:
        target.write_text(before)
    result = subprocess.run(
        [*ATTLAS, "query", folder, "SELECT * FROM heads", "--format", "csv", "--output", target],
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )
    assert result.returncode == 1
    assert f"{target} did not take all of it (File too large)" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == (["answer.csv"] if before else [])
    assert before is None or target.read_text() == before


def test_a_reader_that_leaves_ends_the_command_quietly(folder: Path) -> None:
    with subprocess.Popen(
        [*ATTLAS, "query", folder, "SELECT h.* FROM heads h, range(200)", "--format", "csv"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (1, -signal.SIGPIPE)


def test_an_answer_replaces_a_file_and_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "answer.csv"
    target.write_text("old")
    target.chmod(0o640)
    write_to(target)
    assert target.stat().st_mode & 0o777 == 0o640
    assert pl.read_csv(target).height == RESULT.num_rows
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    write_to(tmp_path / "ours")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_to(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert pl.read_csv(tmp_path / "real").height == RESULT.num_rows


def test_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_to(pipe)
    reader.join()
    assert pl.read_csv(got[0]).height == RESULT.num_rows
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_open_file_is_written_where_it_stands(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        log.write("before\n")
        log.flush()
        write_to(Path(f"/dev/fd/{log.fileno()}"), rows=pa.table({"a": [1]}))
    assert (tmp_path / "log").read_text() == "before\na\n1\n"


def test_a_query_that_is_refused_leaves_the_file_as_it_was(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "answer.csv"
    target.write_text("old")
    with pytest.raises(Refusal), answer_file(target):
        query(folder, "SELECT nothing FROM heads")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("path", ["missing/answer.csv", ".", "file/answer.csv", "x" * 300, "n\0ul"])
def test_a_place_that_takes_no_file_is_refused_before_anything_is_asked(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="--output is a file that can be written"), answer_file(tmp_path / path):
        pytest.fail("nothing is asked")


def test_text_goes_to_a_stream_without_bytes() -> None:
    stream = io.StringIO()
    write_whole([b"\xc3\xa9", b"x"], stream)
    assert stream.getvalue() == "éx"


TYPES = (
    "'a'::BLOB", "INTERVAL 1 DAY", "MAP {'a': 1}", "'101'::BIT", "union_value(num := 2)", "[INTERVAL 1 DAY]", "['a'::BLOB]",
    "[[1, 2], [3]]", "[{'a': 1}]", "{'a': [1, 2]}", "[MAP {'a': 1}]", "'-infinity'::TIMESTAMP", "DATE '9999-01-01' + 3000000",
    "uuid()", "170141183460469231731687303715884105727::HUGEINT", "1.5::DECIMAL(38,10)", "TIME '12:00'", "NULL",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_every_type_of_the_query_language_is_written(folder: Path, form: Format) -> None:
    for expression in TYPES:
        rows = query(folder, f"SELECT {expression} AS x, 1 AS y")
        stream = io.BytesIO()
        write_result(rows, form, stream)
        assert stream.getvalue(), expression
        if form == "parquet":
            assert pq.read_table(io.BytesIO(stream.getvalue())).num_rows == 1
