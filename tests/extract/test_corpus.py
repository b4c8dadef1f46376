"""Every kind of corpus on a real disk: the source of each document, and the position of each error."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.corpus import Document, open_corpus, reason_kind
from attlas.extract.errors import Refusal
from tests.extract.corpora import read, written


def test_demo_is_the_python_reference_manual_in_alphabetical_order():
    documents = read("demo")
    assert len(documents) >= 70
    assert documents[0].source == "topics:assert"
    assert [d.source for d in documents] == sorted(d.source for d in documents)
    assert all(d.text and d.dropped_reason is None for d in documents)


def test_a_corpus_can_be_read_repeatedly():
    corpus = open_corpus("demo", limit=3)
    assert list(corpus) == list(corpus)


def test_limit_counts_dropped_documents(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "one"}\nnot json\n{"text": "three"}\n')
    assert [d.source for d in read(path, limit=2)] == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(Refusal, match=f"limit must be at least 1; got {limit}"):
        open_corpus("demo", limit=limit)


def test_an_unknown_corpus_is_refused_by_name():
    with pytest.raises(Refusal, match="there is no 'nowhere'"):
        open_corpus("nowhere")


@pytest.mark.parametrize("corpus", ["random-repeats", "needle"])
def test_a_generated_corpus_has_no_documents_before_there_is_a_tokenizer(corpus: str):
    assert list(open_corpus(corpus)) == []


# --- text


def test_a_text_file_is_one_unchanged_document(tmp_path):
    path = written(tmp_path / "notes.txt", "first\r\n\nzwei ü\n")
    assert read(path) == [Document("notes.txt", "first\r\n\nzwei ü\n")]
    assert open_corpus(path).files == (("notes.txt", len("first\r\n\nzwei ü\n".encode())),)


def test_sources_of_lines_have_their_number(tmp_path):
    path = written(tmp_path / "notes.txt", "one\r\n\nthree\u2028still\nfour")
    assert read(path, unit="line") == [
        Document("notes.txt:1", "one"),
        Document("notes.txt:2", "", "empty"),
        Document("notes.txt:3", "three\u2028still"),
        Document("notes.txt:4", "four"),
    ]


def test_sources_of_paragraphs_have_the_number_of_their_first_line(tmp_path):
    path = written(tmp_path / "notes.txt", "\n\none\nand on\n \n\ntwo\n")
    assert read(path, unit="paragraph") == [Document("notes.txt:3", "one\nand on"), Document("notes.txt:7", "two")]


@pytest.mark.parametrize("unit", ["document", "line", "paragraph"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, unit):
    path = written(tmp_path / "notes.txt", b"\xef\xbb\xbfone")
    assert [d.text for d in read(path, unit=unit)] == ["one"]


def test_nul_characters_are_text(tmp_path):
    assert read(written(tmp_path / "notes.txt", "a\0b"))[0].text == "a\0b"


def test_an_empty_file_is_a_dropped_document(tmp_path):
    written(tmp_path / "a.txt", "")
    written(tmp_path / "b.txt", "text")
    assert read(str(tmp_path)) == [Document("a.txt", "", "empty"), Document("b.txt", "text")]


def test_invalid_utf8_is_dropped_with_its_byte_offset_in_the_file(tmp_path):
    broken = b"0123456789" * 12 + b"\xff rest"
    path = written(tmp_path / "bad.txt", broken)
    assert read(path) == [Document("bad.txt", "", "not UTF-8 at byte 120")]
    path = written(tmp_path / "marked.txt", b"\xef\xbb\xbf" + broken)
    assert read(path) == [Document("marked.txt", "", "not UTF-8 at byte 123")]
    path = written(tmp_path / "lines.txt", b"good\nb\xe9d\ngood\n")
    assert read(path, unit="line")[1:] == [
        Document("lines.txt:2", "", "not UTF-8 at byte 6"),
        Document("lines.txt:3", "good"),
    ]
    path = written(tmp_path / "paragraphs.txt", b"good\n\nline\nb\xe9d\n\ngood\n")
    assert read(path, unit="paragraph")[1] == Document("paragraphs.txt:3", "", "not UTF-8 at byte 12")


def test_strict_refuses_what_would_otherwise_be_dropped(tmp_path):
    path = written(tmp_path / "bad.txt", b"abc\xff")
    with pytest.raises(Refusal, match=r"bad\.txt is not UTF-8 at byte 3"):
        read(path, strict=True)
    path = written(tmp_path / "bad.jsonl", '{"text": "a"}\n\n{"text": \n')
    with pytest.raises(Refusal, match=r"bad\.jsonl:3 is invalid JSON"):
        read(path, strict=True)
    assert [d.dropped_reason for d in read(written(tmp_path / "e.txt", ""), strict=True)] == ["empty"]


@pytest.mark.parametrize(
    ("extension", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_compressed_files_read_like_uncompressed_ones(tmp_path, extension, compress):
    lines = "".join(json.dumps({"text": f"line {n} ü"}) + "\n" for n in range(500))
    written(tmp_path / "a.jsonl", lines)
    written(tmp_path / f"b.jsonl{extension}", compress(lines.encode()))
    plain, packed = read(str(tmp_path / "a.jsonl")), read(str(tmp_path / f"b.jsonl{extension}"))
    assert [d.text for d in plain] == [d.text for d in packed]
    assert packed[16].source == f"b.jsonl{extension}:17"
    written(tmp_path / f"notes.txt{extension}", compress(b"text"))
    assert read(str(tmp_path / f"notes.txt{extension}")) == [Document(f"notes.txt{extension}", "text")]


def test_a_damaged_file_of_many_documents_ends_the_run(tmp_path):
    lines = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(5000))
    path = written(tmp_path / "cut.jsonl.gz", gzip.compress(lines.encode())[:-2000])
    with pytest.raises(Refusal, match=r"cut\.jsonl\.gz fails after cut\.jsonl\.gz:\d+: "):
        read(path)


def test_a_damaged_text_file_is_one_dropped_document(tmp_path):
    written(tmp_path / "a.txt.gz", gzip.compress(b"text")[:-6])
    written(tmp_path / "b.txt.gz", gzip.compress(b"text"))
    assert read(str(tmp_path)) == [Document("a.txt.gz", "", "unreadable: EOFError"), Document("b.txt.gz", "text")]


# --- folders and globs


def test_a_folder_is_read_recursively_in_the_order_of_names_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", ".git/x.txt", "a/.hidden.txt", "README"):
        written(tmp_path / "corpus" / name, name)
    corpus = open_corpus(str(tmp_path / "corpus"))
    assert corpus.name == "corpus"
    assert [d.source for d in corpus] == ["README", "a/b/c.txt", "a/z.md", "b.txt"]
    assert [name for name, _ in corpus.files] == ["README", "a/b/c.txt", "a/z.md", "b.txt"]


def test_sources_are_relative_to_the_start_of_the_glob(tmp_path, monkeypatch):
    for name in ("b.txt", "a/z.txt", "a/z.csv"):
        written(tmp_path / "corpus" / name, name)
    corpus = open_corpus(f"{tmp_path}/corpus/**/*.txt")
    assert corpus.name == "**/*.txt"
    assert [d.source for d in corpus] == ["a/z.txt", "b.txt"]
    monkeypatch.chdir(tmp_path)
    assert open_corpus("corpus/*.txt").name == "corpus/*.txt"


@pytest.mark.parametrize("name", ["{}/corpus", "{}/corpus/", "{}/corpus/a.txt", "{}/*/a.txt", "../corpus", "."])
def test_the_name_of_a_corpus_reveals_no_path_of_this_machine(tmp_path, monkeypatch, name):
    written(tmp_path / "corpus" / "a.txt", "text")
    monkeypatch.chdir(tmp_path / "corpus")
    corpus = open_corpus(name.format(tmp_path))
    assert corpus.name in ("corpus", "a.txt", "*/a.txt")
    assert str(tmp_path) not in repr((corpus, *corpus))


def test_mixed_kinds_are_refused_with_the_list(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        written(tmp_path / name, "{}")
    with pytest.raises(Refusal, match=r"JSON lines \(1\): c\.jsonl; text \(2\): a\.txt, b\.txt"):
        open_corpus(str(tmp_path))


def test_files_of_unknown_kind_are_refused(tmp_path):
    with pytest.raises(Refusal, match=r"of unknown kind \(1\): a\.bin"):
        open_corpus(written(tmp_path / "a.bin", "x"))


@pytest.mark.parametrize("name", ["", "*.txt"])
def test_a_corpus_without_files_is_refused(tmp_path, name):
    with pytest.raises(Refusal, match="has none"):
        open_corpus(f"{tmp_path}/{name}")


def test_unit_applies_to_text_files_only(tmp_path):
    with pytest.raises(Refusal, match="unit line applies to text files only; this corpus is CSV"):
        open_corpus(written(tmp_path / "a.csv", "text\na\n"), unit="line")


# --- JSON lines


def test_invalid_lines_are_dropped_with_reasons_among_valid_ones(tmp_path):
    content = (
        b'{"text": "one"}\n\n{"text": "secret\n{"text": null}\n{"text": 3}\n{"other": 1}\n["secret"]\n{"text": ""}\n'
        b'{"text": "\xff"}\n{"text": "\\ud800"}\n' + b"[" * 100_000 + b'\n{"n": ' + b"9" * 5000 + b'}\n{"text": "last"}'
    )
    documents = read(written(tmp_path / "a.jsonl", content))
    assert [(d.source, d.dropped_reason) for d in documents] == [
        ("a.jsonl:1", None),
        ("a.jsonl:3", "invalid JSON: Invalid control character at column 17"),
        ("a.jsonl:4", "not text (null)"),
        ("a.jsonl:5", "not text (int)"),
        ("a.jsonl:6", "not text (no column text)"),
        ("a.jsonl:7", "invalid JSON: list instead of an object"),
        ("a.jsonl:8", "empty"),
        ("a.jsonl:9", f"not UTF-8 at byte {content.index(0xFF)}"),
        ("a.jsonl:10", "not text (lone surrogate at character 0)"),
        ("a.jsonl:11", "invalid JSON: RecursionError"),
        ("a.jsonl:12", "invalid JSON: ValueError"),
        ("a.jsonl:13", None),
    ]
    assert [d.text for d in documents if d.text] == ["one", "last"]
    assert not any("secret" in (d.dropped_reason or "") for d in documents)


def test_reasons_are_counted_by_their_kind():
    assert reason_kind("not UTF-8 at byte 114") == "not UTF-8"
    assert reason_kind("not text (null)") == "not text"
    assert reason_kind("invalid JSON: Expecting value at column 3") == "invalid JSON"
    assert reason_kind("empty") == "empty"


def test_the_text_column_can_be_chosen(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"body": "b", "text": "t"}\n')
    assert read(path, text_column="body") == [Document("a.jsonl:1", "b")]


def test_a_json_array_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"a\.json begins with an array"):
        open_corpus(written(tmp_path / "a.json", '[{"text": "a"}]'))


def test_a_very_long_line_is_a_document(tmp_path):
    text = "word " * 1_000_000
    assert read(written(tmp_path / "a.jsonl", json.dumps({"text": text})))[0].text == text
    assert read(written(tmp_path / "a.csv", f"n,text\n1,{text}\n"))[0].text == text


# --- tables


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"id": 1, "body": "x"}\n'), ("a.csv", "id,body\n1,x\n"), ("a.tsv", "id\tbody\n")]
)
def test_a_missing_column_is_refused_with_the_existing_ones(tmp_path, name, content):
    with pytest.raises(Refusal, match=f"{name} has no 'text', only id, body; use --text-column"):
        open_corpus(written(tmp_path / name, content))


def test_csv_rows_are_numbered_without_the_header(tmp_path):
    content = (
        b'\xef\xbb\xbfn,text\r\n1,"two\nlines, ""quoted"""\r\n2,\r\n3,b\xe9d\r\n4,too,many\r\n5,"bad"quote\r\n6,NA\r\n'
    )
    assert read(written(tmp_path / "t.csv", content)) == [
        Document("t.csv:1", 'two\nlines, "quoted"'),
        Document("t.csv:2", "", "empty"),
        Document("t.csv:3", "", f"not UTF-8 at byte {content.index(0xE9)}"),
        Document("t.csv:4", "", "invalid CSV: 3 fields where the header has 2"),
        Document("t.csv:5", "", "invalid CSV: ',' expected after '\"'"),
        Document("t.csv:6", "NA"),
    ]


def test_tsv_fields_are_separated_by_tabs(tmp_path):
    assert read(written(tmp_path / "t.tsv", "n\ttext\n1\ta, b\n")) == [Document("t.tsv:1", "a, b")]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_rows_are_numbered_across_row_groups(tmp_path, kind):
    texts = ["row 1", None, "", *(f"row {n}" for n in range(4, 1001))]
    table = pa.table({"n": range(1000), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=300)
    documents = read(str(tmp_path / "t.parquet"))
    assert documents[:3] == [
        Document("t.parquet:1", "row 1"),
        Document("t.parquet:2", "", "not text (null)"),
        Document("t.parquet:3", "", "empty"),
    ]
    assert documents[-1] == Document("t.parquet:1000", "row 1000")


def test_an_invalid_parquet_row_does_not_affect_the_others(tmp_path):
    raw = pa.array([b"good", b"b\xffd", b"good"])
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
    assert [d.dropped_reason for d in read(str(tmp_path / "t.parquet"))] == [None, "not UTF-8 at byte 1", None]


def test_a_column_of_numbers_is_refused_before_reading(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(Refusal, match=r"'text' of t\.parquet holds int64"):
        open_corpus(str(tmp_path / "t.parquet"))


def test_invalid_parquet_is_refused_before_reading(tmp_path):
    with pytest.raises(Refusal, match=r"t\.parquet must be readable as Parquet"):
        open_corpus(written(tmp_path / "t.parquet", "hello"))


# --- the hub


def test_an_unreachable_hub_is_refused_with_advice():
    with pytest.raises(Refusal, match=r"hub:owner/name can't be reached .*or give local files"):
        open_corpus("hub:owner/name")


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c/d", "hub:/a"])
def test_an_invalid_hub_name_is_refused(name):
    with pytest.raises(Refusal, match="a hub corpus is hub:NAME"):
        open_corpus(name)


def test_rows_of_a_hub_dataset_are_documents(monkeypatch):
    # tests can't reach the hub; a real streaming dataset stands in for it
    import datasets

    calls = []

    def load_dataset(path, config, **options):
        calls.append((path, config, options))
        rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus("hub:owner/name/config:test")
    expected = [
        Document("hub:owner/name/config:test:1", "a"),
        Document("hub:owner/name/config:test:2", "", "not text (null)"),
    ]
    assert list(corpus) == expected
    assert list(corpus) == expected
    assert calls == [("owner/name", "config", {"split": "test", "streaming": True})]
    with pytest.raises(Refusal, match="has no 'body', only text, n"):
        open_corpus("hub:owner/name", text_column="body")
