"""Encodings other than UTF-8: set by a byte order mark, chosen by the user, or refused."""

import codecs

import pytest

from attlas.extract.corpus import Document, open_corpus
from attlas.extract.errors import Refusal
from tests.extract.corpora import outcomes, read, written

TEXT = "naïve café\nüber, alles 5\r\nthird 猫 𝒳"
CONTENTS = {
    "a.txt": TEXT,
    "a.csv": 'id,text\n1,"naïve café\nüber"\r\n2,猫 𝒳\n',
    "a.jsonl": '{"text": "naïve café\\nüber"}\n{"text": "猫 𝒳"}\n',
}
ROWS = ["naïve café\nüber", "猫 𝒳"]
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def expected(name: str) -> list[str]:
    return [TEXT] if name == "a.txt" else ROWS


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("requested", ["auto", "cp1252", "utf-16"])
def test_a_byte_order_mark_takes_precedence(tmp_path, name, encoding, requested):
    path = written(tmp_path / name, MARKS[encoding] + CONTENTS[name].encode(encoding))
    assert [d.text for d in read(path, encoding=requested)] == expected(name)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-16-be", "utf-16", "utf-32", "gb18030", "utf-7"])
def test_the_encoding_can_be_chosen(tmp_path, name, encoding):
    path = written(tmp_path / name, CONTENTS[name].encode(encoding))
    assert [d.text for d in read(path, encoding=encoding)] == expected(name)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "iso-8859-15", "cp037"])
def test_a_single_byte_encoding_can_be_chosen(tmp_path, encoding):
    content = 'id,text\n1,"naïve café\nüber"\n2,b\n'
    path = written(tmp_path / "a.csv", content.encode(encoding))
    assert [d.text for d in read(path, encoding=encoding)] == ["naïve café\nüber", "b"]


def test_lines_and_paragraphs_are_split_in_any_encoding(tmp_path):
    path = written(tmp_path / "a.txt", "one\nüber\n\ntwo\n".encode("utf-16"))
    assert outcomes(path, unit="line") == {"a.txt:1": "one", "a.txt:2": "über", "a.txt:3": "empty", "a.txt:4": "two"}
    assert outcomes(path, unit="paragraph") == {"a.txt:1": "one\nüber", "a.txt:4": "two"}


def test_bytes_invalid_in_the_chosen_encoding_are_dropped_with_their_offset(tmp_path):
    rows = b"id,text\n1,caf\xe9\n2,\x81\n3,c\n"  # 81 is undefined in cp1252
    assert outcomes(written(tmp_path / "a.csv", rows), encoding="cp1252") == {
        "a.csv:1": "café",
        "a.csv:2": "not cp1252 at byte 17",
        "a.csv:3": "c",
    }
    path = written(tmp_path / "a.txt", b"caf\xe9 \x81")
    assert read(path, encoding="cp1252") == [Document("a.txt", "", "not cp1252 at byte 5")]
    path = written(tmp_path / "b.txt", codecs.BOM_UTF16_LE + "abc".encode("utf-16-le") + b"\0")
    assert read(path) == [Document("b.txt", "", "not UTF-16-LE at byte 8")]


def test_half_a_surrogate_pair_is_one_dropped_row(tmp_path):
    rows = "id,text\n1,a\n2,\ud800\n3,c\n".encode("utf-16", "surrogatepass")
    assert outcomes(written(tmp_path / "a.csv", rows)) == {
        "a.csv:1": "a",
        "a.csv:2": "not text (lone surrogate at character 0)",
        "a.csv:3": "c",
    }


def test_utf16_with_a_missing_byte_is_refused(tmp_path):
    rows = CONTENTS["a.csv"].encode("utf-16")
    with pytest.raises(Refusal, match=r"a\.csv fails after a\.csv"):
        read(written(tmp_path / "a.csv", rows[:61] + rows[62:]))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_not_read_as_utf8(tmp_path, encoding):
    for name, content in {"a.csv": "id,text\n1,one\n", "a.jsonl": '{"text": "one"}\n'}.items():
        with pytest.raises(
            Refusal, match=f"{name} looks like UTF-16, with a NUL in every second byte.*use --encoding {encoding}"
        ):
            open_corpus(written(tmp_path / name, content.encode(encoding)))
    path = written(tmp_path / "a.txt", "one".encode(encoding))
    assert read(path) == [Document("a.txt", "", f"not UTF-8: {encoding} without a byte order mark")]
    assert read(path, encoding=encoding) == [Document("a.txt", "one")]


@pytest.mark.parametrize(("name", "content"), [("a.csv", b"id,caf\xe9\n1,b\n"), ("a.jsonl", b'{"caf\xe9": "a"}\n')])
def test_an_invalid_first_line_suggests_setting_the_encoding(tmp_path, name, content):
    with pytest.raises(Refusal, match=f"{name}.* is not UTF-8 at byte .*--encoding"):
        open_corpus(written(tmp_path / name, content))


@pytest.mark.parametrize("encoding", ["", "utf-9", "hex", "rot13", "base64", "undefined", "a\0b"])
def test_an_invalid_encoding_is_refused(encoding):
    with pytest.raises(
        Refusal, match=r"encoding must be auto or a text encoding of Python; got .*use one such as utf-8"
    ):
        open_corpus("demo", encoding=encoding)


@pytest.mark.parametrize("name", ["demo", "a.png", "a.parquet"])
def test_the_encoding_does_not_apply_to_formats_that_define_it(tmp_path, name):
    corpus = name if name == "demo" else written(tmp_path / name, "x")
    with pytest.raises(Refusal, match="encoding applies to text, JSON lines, CSV and TSV only; this corpus is"):
        open_corpus(corpus, encoding="latin-1")
