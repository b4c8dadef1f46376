"""Corpora made to do harm: no file is read without end, none takes more memory than a document may have, none runs or shows anything."""

import gzip
import lzma
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attlas.extract.corpus import open_corpus
from attlas.extract.errors import Refusal
from attlas.extract.model.images import Unreadable, read_image_file

LIMIT = 1 << 26


def reasons(corpus: Path, **options) -> list[str | None]:
    return [document.dropped_reason for document in open_corpus(str(corpus), **options)]


def refusal_of(corpus: Path, **options) -> str:
    with pytest.raises(Refusal) as refused:
        reasons(corpus, **options)
    return str(refused.value)


def write_bomb(path: Path, *, start: bytes = b"", mebibytes: int = 65, unit: bytes = b"a") -> Path:
    """A small file that unpacks to more than a document may have, after these bytes."""
    compress = gzip.compress if path.suffix == ".gz" else lzma.compress
    path.write_bytes(compress(start + unit * (mebibytes << 20)))
    assert path.stat().st_size < 1 << 20
    return path


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz"])
def test_a_text_that_unpacks_beyond_the_limit_is_dropped_and_counted(tmp_path: Path, name: str) -> None:
    assert reasons(write_bomb(tmp_path / name)) == ["too large: more than 67,108,864 bytes"]


def test_a_sparse_file_of_a_terabyte_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    os.truncate(tmp_path / "a.txt", 1 << 40)
    assert reasons(tmp_path) == ["too large: more than 67,108,864 bytes"]


@pytest.mark.parametrize(
    ("name", "start", "options"),
    [
        ("a.jsonl.gz", b'{"text": "x"}\n', {}),
        ("a.csv.gz", b"text\nx\n", {}),
        ("a.txt.gz", b"x\n", {"unit": "line"}),
        ("a.txt.gz", b"x\n\n", {"unit": "paragraph"}),
    ],
)
def test_a_line_without_end_is_refused_with_its_file_and_number(tmp_path: Path, name, start, options) -> None:
    message = refusal_of(write_bomb(tmp_path / name, start=start), **options)
    assert f"{name}, line {1 + len(start.splitlines())}, has more" in message
    assert "--max-document-bytes" in message


def test_a_line_without_end_takes_no_more_memory_than_a_line_may_have(tmp_path: Path) -> None:
    """A sparse file of a terabyte, in a process that may have 2 GB."""
    (tmp_path / "a.jsonl").touch()
    os.truncate(tmp_path / "a.jsonl", 1 << 40)
    code = f"from attlas.extract.corpus import open_corpus; list(open_corpus({str(tmp_path)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "a line has at most 67,108,864 bytes; a.jsonl, line 1, has more" in run.stderr


def test_a_paragraph_and_a_quoted_field_of_many_lines_have_the_same_limit(tmp_path: Path) -> None:
    text = "one\n\n" + "two\n" * 100 + "\nthree\n"
    (tmp_path / "a.txt").write_text(text)
    dropped = [None, "too large: more than 99 bytes", None]
    assert reasons(tmp_path / "a.txt", unit="paragraph", max_document_bytes=99) == dropped
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n')
    assert "one that begins in line 2 has more" in refusal_of(tmp_path / "a.csv", max_document_bytes=99)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_limit_is_of_bytes_and_exact(tmp_path: Path, end: str) -> None:
    for text, fits in (("é" * 50, True), ("é" * 50 + "x", False)):
        (tmp_path / "a.txt").write_bytes(f"{text}{end}short{end}".encode())
        if fits:
            assert reasons(tmp_path, unit="line", max_document_bytes=100) == [None, None]
        else:
            assert "a.txt, line 1, has more" in refusal_of(tmp_path, unit="line", max_document_bytes=100)
        (tmp_path / "a.txt").write_text(text)
        assert reasons(tmp_path, max_document_bytes=100) == [None if fits else "too large: more than 100 bytes"]


def test_a_parquet_file_that_is_tiny_for_what_it_unpacks_to_is_refused(tmp_path: Path) -> None:
    texts = pa.table({"text": ["a" * (LIMIT + 1)] * 2})
    pq.write_table(texts, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert "a.parquet says" in refusal_of(tmp_path)


def test_texts_that_a_dictionary_repeats_are_dropped_one_by_one(tmp_path: Path) -> None:
    """Unpacked to 4 MB by its own account, these are 12 GB of rows."""
    text = os.urandom(1 << 15).hex() + "a" * (1 << 22)
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), [text])
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", compression="zstd")
    found = open_corpus(str(tmp_path), max_document_bytes=1 << 20, limit=300)
    assert {document.dropped_reason for document in found} == {"too large: more than 1,048,576 bytes"}


def test_a_large_image_file_and_one_of_many_pixels_are_not_decoded(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(Unreadable, match="too large: more than 536,870,912 bytes"):
        read_image_file(file)
    from attlas.extract.model.images import decode_image

    Image.new("1", (20_000, 20_000)).save(file)
    with pytest.raises(Unreadable, match="too large: more than 89,478,485 pixels"):
        decode_image(read_image_file(file))


@pytest.mark.parametrize(("name", "content"), [("a.txt", "x"), ("a.jsonl", '{"text": "x"}'), ("a.txt.gz", None)])
def test_a_pipe_that_takes_a_file_s_place_is_not_waited_for(tmp_path: Path, name: str, content: str | None) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(b"x") if content is None else content.encode())
    corpus = open_corpus(str(tmp_path))
    file.unlink()
    os.mkfifo(file)
    try:
        assert [document.dropped_reason for document in corpus] == ["unreadable: OSError"]
    except Refusal as refusal:
        assert "it is not a regular file" in str(refusal)


def test_a_link_to_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    assert "a.txt is a device" in refusal_of(tmp_path)


def test_a_link_out_of_the_folder_is_followed_and_shows_no_path(tmp_path: Path) -> None:
    """Links are how the hub's cache and data versioning store files, so a corpus may consist of them."""
    (tmp_path / "outside").write_text("text of another place")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").symlink_to(tmp_path / "outside")
    (document,) = open_corpus(str(folder))
    assert (document.source, document.text) == ("a.txt", "text of another place")


@pytest.mark.parametrize(
    "line",
    [
        "{" + ",".join(f'"k{i % 50_000}": 1' for i in range(100_000)) + "}",
        "{" + ",".join(f'"k{i}": 1' for i in range(100_000)) + ', "k1": 2}',
        "[" * 1_000_000,
        '{"text": ' + "9" * 1_000_000 + "}",
    ],
    ids=["many keys twice", "one of many keys twice", "nested", "digits"],
)
def test_json_that_is_slow_to_parse_badly_takes_seconds(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    start = time.monotonic()
    assert len(reasons(tmp_path)) == 2
    assert time.monotonic() - start < 60


def test_the_limit_is_an_option_of_a_run_and_part_of_its_identity_only_if_it_is_given(tmp_path: Path) -> None:
    from attlas.extract.identity import _max_document_bytes
    from attlas.extract.options import RunOptions

    options = {"model": "demo", "corpus": "demo", "out": tmp_path}
    assert _max_document_bytes(RunOptions(**options)) == {}
    assert _max_document_bytes(RunOptions(**options, max_document_bytes=7)) == {"max_document_bytes": 7}
    with pytest.raises(Refusal, match="max_document_bytes must be at least 1; got 0"):
        open_corpus("demo", max_document_bytes=0)
