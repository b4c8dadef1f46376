"""The text column of JSON lines and Parquet: nested, of every text type, in damaged files."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.corpus import Document, open_corpus
from attlas.extract.errors import Refusal
from tests.extract.corpora import outcomes, read, written

# --- JSON lines


def test_a_dotted_path_selects_a_nested_key(tmp_path):
    lines = [
        {"meta": {"text": "one", "n": 1}},
        {"meta": {"text": None}},
        {"meta": None},
        {"meta": "flat"},
        {"other": 1},
        {"meta": {"text": {"en": "two"}}},
    ]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert outcomes(path, text_column="meta.text") == {
        "a.jsonl:1": "one",
        "a.jsonl:2": "not text (null)",
        "a.jsonl:3": "not text (null)",
        "a.jsonl:4": "not text (no column meta.text)",
        "a.jsonl:5": "not text (no column meta.text)",
        "a.jsonl:6": "not text (dict)",
    }
    assert outcomes(path, text_column="meta.text.en")["a.jsonl:6"] == "two"


def test_a_key_with_the_dotted_name_takes_precedence(tmp_path):
    lines = [
        {"meta.text": "own", "meta": {"text": "inner"}},
        {"meta": {"text": "inner"}},
        {"a.b": {"c.d": "deep"}},
    ]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert [d.text for d in read(path, text_column="meta.text")] == ["own", "inner", ""]
    assert [d.text for d in read(path, text_column="a.b.c.d")] == ["", "", "deep"]


def test_a_missing_key_is_refused_with_the_existing_ones(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"id": 1, "meta": {"body": "x", "more": {"n": 1}}}\n')
    for column in ("text", "meta.text", "meta"):
        with pytest.raises(Refusal, match=f"has no '{column}', only id, meta.body, meta.more.n; use --text-column"):
            open_corpus(path, text_column=column)


def test_each_object_on_a_line_is_a_document(tmp_path):
    content = (
        '{"text": "one"}{"text": "two"} {"text": 3}\n{"text": "four"}\n{"text": "a"}, {"text": "b"}\n{"text": "a"} 1\n'
    )
    assert outcomes(written(tmp_path / "a.jsonl", content)) == {
        "a.jsonl:1.1": "one",
        "a.jsonl:1.2": "two",
        "a.jsonl:1.3": "not text (int)",
        "a.jsonl:2": "four",
        "a.jsonl:3": "invalid JSON: Extra data at column 14",
        "a.jsonl:4": "invalid JSON: Extra data at column 15",
    }


def test_a_record_broken_over_two_lines_and_a_truncated_last_line_are_dropped(tmp_path):
    content = '{"text": "one"}\n{"text": "two",\n"n": 1}\n{"text": "three"}\n{"text": "fo'
    documents = outcomes(written(tmp_path / "a.jsonl", content))
    assert [s for s, t in documents.items() if t.startswith("invalid JSON")] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:5"]
    assert len(documents) == 5


def test_a_duplicate_text_key_is_dropped(tmp_path):
    content = '{"text": "a", "text": "b"}\n{"n": 1, "n": 2, "text": "c"}\n{"m": {"text": "d"}, "m": {}, "text": "e"}\n'
    assert outcomes(written(tmp_path / "a.jsonl", content)) == {
        "a.jsonl:1": "invalid JSON: key text more than once",
        "a.jsonl:2": "c",
        "a.jsonl:3": "e",
    }


def test_objects_over_several_lines_are_refused(tmp_path):
    with pytest.raises(Refusal, match=r"the first lines of a\.json have none; convert it \(jq -c \."):
        open_corpus(written(tmp_path / "a.json", json.dumps({"text": "a", "n": 1}, indent=2)))


# --- Parquet

TEXTS = ["one", None, "", "ü" * 40, "five"]
EXPECTED = ["one", "not text (null)", "empty", "ü" * 40, "five"]
TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
    pa.dictionary(pa.int32(), pa.binary()),
    pa.json_(),
]


def column_of(kind: pa.DataType) -> pa.Array:
    texts = pa.array(TEXTS)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, texts)
    return texts.cast(kind.value_type).dictionary_encode() if isinstance(kind, pa.DictionaryType) else texts.cast(kind)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("with_schema", [True, False])
def test_every_text_type_is_read_at_the_top_level_and_in_structs(tmp_path, kind, with_schema):
    column = column_of(kind)
    inner = pa.StructArray.from_arrays([column, pa.array(range(5))], names=["text", "n"])
    outer = pa.StructArray.from_arrays([inner], names=["in"])
    pq.write_table(pa.table({"text": column, "meta": outer}), tmp_path / "t.parquet", store_schema=with_schema)
    for name in ("text", "meta.in.text"):
        assert list(outcomes(str(tmp_path / "t.parquet"), text_column=name).values()) == EXPECTED


def test_a_null_struct_has_no_text(tmp_path):
    meta = pa.array([{"text": "one"}, None, {"text": None}])
    pq.write_table(pa.table({"meta": meta}), tmp_path / "t.parquet")
    assert list(outcomes(str(tmp_path / "t.parquet"), text_column="meta.text").values()) == [
        "one",
        *["not text (null)"] * 2,
    ]


def test_a_column_with_the_dotted_name_takes_precedence(tmp_path):
    table = pa.table({"meta": [{"text": "inner", "a.b": "dotted"}], "meta.text": ["own"]})
    pq.write_table(table, tmp_path / "t.parquet")
    for name, text in (("meta.text", "own"), ("meta.a.b", "dotted")):
        assert read(str(tmp_path / "t.parquet"), text_column=name) == [Document("t.parquet:1", text)]


def test_every_row_of_a_null_column_is_dropped(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "t.parquet")
    assert set(outcomes(str(tmp_path / "t.parquet")).values()) == {"not text (null)"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["a", "b"]], "holds list<element: string>; join each list into one text first, or use --text-column"),
        ([{"en": "a", "de": "b"}], "use a field of it, such as --text-column text.en"),
        ([1.5], "holds double; use --text-column"),
        ([True], "holds bool; use --text-column"),
    ],
)
def test_a_column_without_text_is_refused_with_advice(tmp_path, values, message):
    pq.write_table(pa.table({"text": values}), tmp_path / "t.parquet")
    with pytest.raises(Refusal, match=message):
        open_corpus(str(tmp_path / "t.parquet"))


def test_a_missing_or_duplicate_column_is_refused(tmp_path):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"id": [1], "meta": [{"body": "x"}]}), path)
    with pytest.raises(Refusal, match=r"has no 'text', only id, meta, meta\.body; use --text-column"):
        open_corpus(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(Refusal, match="has 2 named 'text'"):
        open_corpus(path)


def test_damaged_parquet_is_refused_by_name(tmp_path):
    path = tmp_path / "t.parquet"
    texts = [f"row {n} of many" for n in range(2000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=500, write_page_checksum=True)
    whole, rng = path.read_bytes(), random.Random(0)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    damaged = [whole[:n] for n in (0, 3, 100, len(whole) - footer, len(whole) - 5)]
    damaged += [whole[:-footer] + bytes(footer), whole[:-8] + b"\xff\xff\xff\x7fPAR1", gzip.compress(whole)]
    for n in range(100):
        place = rng.randrange(*((len(whole) - footer, len(whole)) if n % 2 else (4, len(whole) - footer)))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            documents = read(str(path))
        except Refusal as error:
            assert "t.parquet" in str(error)
            refused += 1
        else:  # the flipped bit is in statistics or names that are not read
            assert [d.text for d in documents] == texts
    assert refused >= 8 + 40  # every flipped bit in a page, and most of the others
