"""Corpora in an object store give the documents, names and dataset of the same files in a folder."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.corpus import open_corpus
from attlas.extract.corpus.stored import UnreadableStore
from attlas.extract.errors import Refusal
from attlas.extract.store import LocalFolder, open_storage
from tests.conftest import Ended
from tests.extract.runs import complete_run
from tests.object_store.conftest import contents
from tests.object_store.proxy import Proxy
from tests.object_store.test_runs import options

LINES = [json.dumps({"text": f"document {n} of the file"}) for n in range(5)]
JSONL = "\n".join(LINES).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/er/d.jsonl", ".e.jsonl", ".hidden/f.jsonl"):
        (folder / name).write_bytes(JSONL.replace(b"file", name.encode()))
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (folder / "h.jsonl.bz2").write_bytes(bz2.compress(JSONL))
    (folder / "i.jsonl.xz").write_bytes(lzma.compress(JSONL))
    with pa.output_stream(str(folder / "j.jsonl.lz4"), compression="lz4") as stream:
        stream.write(JSONL)
    return folder


def uploaded(folder: Path, url: str) -> str:
    """The URL of a copy of a folder, under its name."""
    storage = open_storage(f"{url}/{folder.name}")
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return f"{url}/{folder.name}"


PATTERNS = ["", "/a.jsonl", "/*.jsonl", "/**/*.jsonl", "/*/*.jsonl", "/deep/**", "/.*.jsonl", "/[ab].jsonl", "/*.gz"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_documents_and_names_are_those_of_the_folder(url: str, folder: Path, pattern: str) -> None:
    there, here = open_corpus(uploaded(folder, url) + pattern), open_corpus(f"{folder}{pattern}")
    assert (there.name, there.files) == (here.name, here.files)
    assert list(there) == list(here) != []


@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.parquet"])
def test_every_kind_of_text_file_is_read_there(url: str, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [f"row {n} of the table" for n in range(2000)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": rows, "other": [text * 50 for text in rows]}), folder / name)
    else:
        (folder / name).write_text("\n".join(["text", *rows]))
    there, here = open_corpus(uploaded(folder, url)), open_corpus(str(folder))
    assert list(there) == list(here) and len(list(here)) in (1, 2000)


def test_a_column_of_a_parquet_file_is_read_alone(proxy: Proxy, url: str, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    rng_text = [f"row {n}" for n in range(2000)]
    pq.write_table(
        pa.table({"text": rng_text, "other": [f"{n * 7919 % 10007}" * 1000 for n in range(2000)]}),
        folder / "t.parquet",
        compression="none",
        use_dictionary=False,
    )
    corpus = open_corpus(uploaded(folder, url))
    proxy.requests.clear()
    assert len(list(corpus)) == 2000
    assert proxy.bytes_sent < (folder / "t.parquet").stat().st_size / 2


def test_a_run_there_gives_the_bytes_of_a_run_of_the_folder(
    url: str, model: Path, folder: Path, tmp_path: Path
) -> None:
    for corpus, out in ((str(folder), tmp_path / "out"), (uploaded(folder, url), f"{url}/out")):
        complete_run(replace(options(model, folder, out), corpus=corpus, shard_sequences=20))
    assert contents(open_storage(f"{url}/out")) == contents(LocalFolder(tmp_path / "out"))


def test_a_file_that_the_store_no_longer_gives_ends_the_run_and_drops_no_document(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "t.txt").write_text("a text")
    corpus = open_corpus(uploaded(folder, url))
    open_storage(f"{url}/texts").delete("t.txt")
    with pytest.raises(UnreadableStore, match=r"there is no s3://.*/texts/t\.txt"):
        list(corpus)


@pytest.mark.parametrize("text", ["a note", "a longer text", "short"])
def test_a_file_that_is_written_again_while_the_corpus_is_read_is_named(url: str, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "t.txt").write_text("a text")
    corpus = open_corpus(uploaded(folder, url))
    open_storage(f"{url}/texts").put("t.txt", text.encode())
    said = (
        r"a corpus stays as it is while it is read; s3://.*/texts/t\.txt has been written again meanwhile; run it again"
    )
    with pytest.raises(Refusal, match=said):
        list(corpus)


def test_a_range_that_an_object_no_longer_has_is_an_error_in_words(url: str) -> None:
    storage = open_storage(url)
    storage.put("a", b"0123456789")
    assert storage.get_range("a", 2, 8) == b"23456789"
    with pytest.raises(OSError, match=r"s3://.*/a "):
        storage.get_range("a", 2, 9)
    with pytest.raises(OSError, match=r"s3://.*/a "):
        storage.get_range("a", 20, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "there is nothing at s3://"),
        ("*.csv", "has none; check the name"),
        ("pictures", "images are read from a local folder; s3://.*/pictures is a URL"),
        ("mixed", "the files of a corpus must be of one supported kind"),
    ],
)
def test_what_is_no_corpus_is_refused(url: str, name: str, message: str) -> None:
    for key in ("pictures/a.png", "mixed/a.txt", "mixed/b.csv"):
        open_storage(url).put(key, b"x")
    with pytest.raises(Refusal, match=message):
        open_corpus(f"{url}/{name}")


@pytest.mark.parametrize(
    ("corpus", "out", "message"),
    [
        ("texts", "texts/out", "the output must stay out of the corpus"),
        ("**/*.parquet", "out", "the output must stay out of the corpus"),
        ("out/texts", "out", "a corpus must stay out of the dataset"),
    ],
)
def test_a_corpus_and_an_output_in_each_other_are_refused(
    attlas: Callable[..., Ended], url: str, corpus: str, out: str, message: str
) -> None:
    code, _, err = attlas("run", "--model", "demo", "--corpus", f"{url}/{corpus}", "--out", f"{url}/{out}")
    assert (code, message in err) == (2, True), err
