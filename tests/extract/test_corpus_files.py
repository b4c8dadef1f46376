"""Folders with links, invalid names, special files and unreadable files: nothing is skipped silently."""

import bz2
import gzip
import lzma
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from backports import zstd

from attlas.extract.corpus import Document, open_corpus, readable_name, real_name
from attlas.extract.errors import Refusal
from tests.extract.corpora import outcomes, read, written

LINK = "link to a folder that is read already"
INVALID_UTF8 = os.fsdecode(b"caf\xe9")  # Latin-1, as unpacked from an old archive


@pytest.fixture(params=["", "**", "**/*.txt"])
def everything(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The folder `corpus`, by its path and by equivalent globs."""
    (tmp_path / "corpus").mkdir()
    return f"{tmp_path}/corpus/{request.param}"


# --- links


def test_a_linked_folder_is_read_like_any_other(tmp_path, everything):
    written(tmp_path / "elsewhere" / "deep" / "b.txt", "b")
    written(tmp_path / "corpus" / "a.txt", "a")
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "c.txt").symlink_to(tmp_path / "corpus" / "a.txt")
    assert outcomes(everything) == {"a.txt": "a", "c.txt": "a", "more/deep/b.txt": "b"}


def test_a_corpus_may_be_a_link(tmp_path):
    written(tmp_path / "real" / "a.txt", "a")
    (tmp_path / "corpus").symlink_to(tmp_path / "real")
    assert outcomes(str(tmp_path / "corpus")) == outcomes(f"{tmp_path}/corpus/*.txt") == {"a.txt": "a"}


@pytest.mark.parametrize("target", [".", "..", "../../corpus/inside"])
def test_a_circular_link_ends_and_is_counted(tmp_path, everything, target):
    written(tmp_path / "corpus" / "inside" / "a.txt", "a")
    (tmp_path / "corpus" / "inside" / "loop").symlink_to(target)
    documents = outcomes(everything)
    assert {"inside/a.txt": "a"}.items() <= documents.items()
    assert [reason for source, reason in documents.items() if source != "inside/a.txt"] == [LINK]


def test_folders_that_link_to_each_other_are_read_once(tmp_path, everything):
    names = [f"f{n}" for n in range(12)]  # with more than a billion paths through their links
    for name in names:
        written(tmp_path / "corpus" / name / "a.txt", name)
        for other in set(names) - {name}:
            (tmp_path / "corpus" / name / other).symlink_to(f"../{other}")
    documents = outcomes(everything)
    assert {s: t for s, t in documents.items() if t != LINK} == {f"{name}/a.txt": name for name in names}
    assert len(documents) == 12 + 12 * 11


def test_a_strict_run_refuses_a_circular_link(tmp_path):
    written(tmp_path / "a.txt", "a")
    (tmp_path / "loop").symlink_to(".")
    with pytest.raises(Refusal, match="loop is link to a folder that is read already"):
        read(str(tmp_path), strict=True)


@pytest.mark.parametrize("name", ["gone.txt", "more", "self.txt"])
def test_a_broken_link_is_refused_by_name(tmp_path, everything, name):
    written(tmp_path / "corpus" / "a.txt", "a")
    (tmp_path / "corpus" / name).symlink_to("self.txt" if name == "self.txt" else "/nowhere/at/all")
    with pytest.raises(Refusal, match=f"{name} is a broken link .*remove it, or select files with a glob"):
        open_corpus(everything)


def test_a_broken_link_that_a_glob_does_not_match_is_ignored(tmp_path):
    written(tmp_path / "a.txt", "a")
    (tmp_path / "b.png").symlink_to("/nowhere/at/all")
    assert outcomes(f"{tmp_path}/**/*.txt") == {"a.txt": "a"}
    with pytest.raises(Refusal, match="is a broken link"):
        open_corpus(str(tmp_path / "b.png"))


# --- special and unreadable files


def test_a_fifo_or_socket_is_refused_and_never_opened(tmp_path, everything):
    written(tmp_path / "corpus" / "a.txt", "a")
    os.mkfifo(tmp_path / "corpus" / "b.txt")
    with pytest.raises(Refusal, match=r"b\.txt is a FIFO"):
        open_corpus(everything)
    with pytest.raises(Refusal, match=r"b\.txt is a FIFO; write its content to a file"):
        open_corpus(f"{tmp_path}/corpus/b.txt")
    (tmp_path / "corpus" / "b.txt").unlink()
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "corpus")  # the path of a socket is limited to about a hundred bytes
        server.bind("s.txt")
        with pytest.raises(Refusal, match=r"s\.txt is a socket"):
            open_corpus(everything)


@pytest.fixture
def unprivileged_folder() -> Iterator[Path]:
    """A folder of an unprivileged user, as whom the test continues."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
            for path in Path(folder).rglob("*"):
                path.chmod(0o777)


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/b.txt"])
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_without_read_permission_is_refused(unprivileged_folder, pattern, mode):
    written(unprivileged_folder / "a.txt", "a")
    written(unprivileged_folder / "shut" / "b.txt", "b")
    (unprivileged_folder / "shut").chmod(mode)
    with pytest.raises(Refusal, match=r"shut.*Permission denied"):
        read(f"{unprivileged_folder}/{pattern}")
    (unprivileged_folder / "shut").chmod(0o755)


def test_a_file_without_read_permission_is_dropped_if_it_is_one_document_and_refused_otherwise(unprivileged_folder):
    for name in ("a.txt", "b.txt"):
        written(unprivileged_folder / name, "text")
    (unprivileged_folder / "a.txt").chmod(0)
    assert outcomes(f"{unprivileged_folder}/*.txt") == {"a.txt": "unreadable: PermissionError", "b.txt": "text"}
    written(unprivileged_folder / "c.jsonl", '{"text": "a"}\n')
    (unprivileged_folder / "c.jsonl").chmod(0)
    with pytest.raises(Refusal, match=r"c\.jsonl must be readable as JSON lines; .*Permission denied"):
        open_corpus(f"{unprivileged_folder}/c.jsonl")


@pytest.mark.parametrize(("name", "content"), [("b.jsonl", '{"text": "a"}\n'), ("b.csv", "text\na\n")])
def test_a_table_that_disappears_during_a_run_is_refused_by_name(tmp_path, name, content):
    for file in ("a", "b"):
        written(tmp_path / f"{file}{Path(name).suffix}", content)
    documents = iter(open_corpus(str(tmp_path)))
    next(documents)
    (tmp_path / name).unlink()
    with pytest.raises(Refusal, match=f"{name} fails after {name}: .*No such file"):
        next(documents)


def test_a_text_file_that_disappears_during_a_run_is_dropped(tmp_path):
    corpus = open_corpus(written(tmp_path / "a.txt", "a"))
    (tmp_path / "a.txt").unlink()
    assert list(corpus) == [Document("a.txt", "", "unreadable: FileNotFoundError")]


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + "/*.txt", "a\0b", "a\0/*.txt", "~nobody-of-this-name/a.txt", ""]
)
def test_an_impossible_file_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="a corpus "):
        open_corpus(name)


# --- names


def test_invalid_bytes_in_names_are_escaped(tmp_path, everything):
    written(tmp_path / "corpus" / INVALID_UTF8 / f"{INVALID_UTF8}.txt", "a")
    written(tmp_path / "corpus" / "line\nend\x1b[1m.txt", "b")
    expected = {"line\nend\x1b[1m.txt": "b", r"caf\xe9/caf\xe9.txt": "a"}
    assert outcomes(everything) == expected
    assert {name for name, _ in open_corpus(everything).files} == set(expected)


@pytest.mark.parametrize("name", [f"{INVALID_UTF8}.txt", "caf?.txt", f"{INVALID_UTF8[:-1]}[{INVALID_UTF8[-1]}].txt"])
def test_the_name_of_a_corpus_may_be_invalid_utf8(tmp_path, name):
    written(tmp_path / f"{INVALID_UTF8}.txt", "a")
    corpus = open_corpus(f"{tmp_path}/{name}")
    assert list(corpus) == [Document(r"caf\xe9.txt", "a")]
    corpus.name.encode()


def test_invalid_names_are_escaped_in_error_messages(tmp_path):
    written(tmp_path / f"{INVALID_UTF8}.csv", "id\n1\n")
    with pytest.raises(Refusal) as refused:
        open_corpus(str(tmp_path))
    assert r"caf\xe9.csv has no 'text'" in str(refused.value)


@pytest.mark.parametrize(
    ("raw", "readable"),
    [
        (b"plain.txt", "plain.txt"),
        ("ü".encode(), "ü"),
        (b"a\\b", "a\\b"),
        (b"\xff", r"\xff"),
        (rb"\xff", r"\\xff"),
        (rb"\\xff", r"\\\\xff"),
        (b"\\\xff", r"\\\xff"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),  # half of a surrogate pair
    ],
)
def test_readable_names_are_unique_and_reversible(raw, readable):
    assert readable_name(os.fsdecode(raw)) == readable
    assert os.fsencode(real_name(readable)) == raw


# --- compressed files


def skippable_frame(content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50, len(content)) + content


def long_window(content: bytes) -> bytes:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 31}
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(content) + compressor.flush()


def lz4(content: bytes) -> bytes:
    return pa.compress(content, "lz4", asbytes=True)


MEMBERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress, ".lz4": lz4}


@pytest.mark.parametrize("extension", MEMBERS)
def test_consecutive_members_are_concatenated(tmp_path, extension):
    one, two = (MEMBERS[extension](b'{"text": "%s"}\n' % name) for name in (b"one", b"two"))
    assert outcomes(written(tmp_path / f"a.jsonl{extension}", one + two)) == {
        f"a.jsonl{extension}:1": "one",
        f"a.jsonl{extension}:2": "two",
    }


@pytest.mark.parametrize("extension", [".gz", ".bz2", ".xz", ".zst"])
def test_zeros_after_a_member_are_padding(tmp_path, extension):
    path = written(tmp_path / f"a.txt{extension}", MEMBERS[extension](b"one") + bytes(512))
    assert [d.text for d in read(path)] == ["one"]


def test_skippable_zstd_frames_are_skipped(tmp_path):
    note = skippable_frame(b"a note")
    content = note + zstd.compress(b"one ") + note + zstd.compress(b"two") + note
    assert [d.text for d in read(written(tmp_path / "a.txt.zst", content))] == ["one two"]


def test_zstd_frames_may_have_the_longest_window(tmp_path):
    with pytest.raises(zstd.ZstdError, match="requires too much memory"):
        zstd.decompress(long_window(b"text"))
    assert [d.text for d in read(written(tmp_path / "a.txt.zst", long_window(b"text")))] == ["text"]


@pytest.mark.parametrize("damage", ["garbage", "cut", "second cut", "nothing"])
@pytest.mark.parametrize("extension", MEMBERS)
def test_an_incomplete_member_is_damage(tmp_path, extension, damage):
    complete = MEMBERS[extension](b'{"text": "one"}\n' * 100)
    content = {
        "garbage": complete + b"garbage",
        "cut": complete[:-3],
        "second cut": complete + complete[:-3],
        "nothing": b"",
    }[damage]
    with pytest.raises(Refusal, match=r"a\.jsonl.*repair it or leave it out"):
        read(written(tmp_path / f"a.jsonl{extension}", content))
    assert read(written(tmp_path / f"a.txt{extension}", content))[0].dropped_reason in {
        f"unreadable: {kind}" for kind in ("EOFError", "OSError", "BadGzipFile", "LZMAError", "DamagedStream")
    }
