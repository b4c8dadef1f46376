"""Corpora made of token ids: `random-repeats` and `needle`."""

import hmac
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract.corpus import open_corpus
from attlas.extract.corpus.generated import IN_ANSWER, IN_NEEDLE, RandomStream, generation_of
from attlas.extract.errors import Refusal
from attlas.extract.model.id_documents import encoder_within_text, id_documents, longest_sequence, ordinary_ids
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, open_worker, plan_run, run
from attlas.extract.store import open_dataset
from tests.extract.checkpoints import model_of, save
from tests.extract.checkpoints import tokenizer_of as words_tokenizer
from tests.extract.runs import complete_run, contents

GPT2 = ["<|endoftext|>", "!", "a", "b", "c", "Ġa", "Ġthe", "Ġcat", "1", "Ġ"]
T5 = ["<pad>", "</s>", "<unk>", "▁", "▁the", "▁cat", "s", "1", "2", "."]


def byte_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE({token: n for n, token in enumerate(GPT2)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.Unigram([(token, -1.0) for token in T5], unk_id=2))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **roles)


def options(model: Path, out: Path, corpus: str = "random-repeats", **changes) -> RunOptions:
    return RunOptions(**{"model": str(model), "corpus": corpus, "out": out, "engine": "reference"} | changes)


def repeats(out: Path, model: Path, **changes) -> RunOptions:
    return options(model, out, **{"blocks": 5, "length": 12, "shard_sequences": 2, "tokens": "ids"} | changes)


def shuffled(seed: int, document: int, vocabulary: list[int], length: int) -> list[int]:
    """The first steps of a Fisher–Yates shuffle of the whole vocabulary, by PCG64's raw numbers modulo what is left."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, document]))
    pool = list(vocabulary)
    for place in range(length):
        left = len(pool) - place
        raw = int(bits.random_raw())
        assert raw < 2**64 - 2**64 % left, "no number of these tests has to be drawn again"
        other = place + raw % left
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:length]


# --- random-repeats


@pytest.mark.parametrize(
    ("make", "left_out"), [(byte_level, {0, len(GPT2)}), (unigram, {0, 1, 2}), (words_tokenizer, {0, 1, 2, 3})]
)
def test_ids_are_a_shuffle_of_the_ordinary_tokens_twice(make, left_out: set[int]) -> None:
    tokenizer = make()
    vocabulary = sorted(set(range(len(tokenizer))) - left_out)
    assert ordinary_ids(tokenizer).tolist() == vocabulary
    generation = generation_of("random-repeats", seed=3, blocks=4, length=6)
    for number, document in enumerate(id_documents(generation, tokenizer)):
        assert document.source == f"random-repeats:{number + 1}"
        assert document.ids.tolist() == 2 * shuffled(3, number, vocabulary, 6)


def test_bert_s_ids_are_neither_special_nor_unused_and_the_same_for_ever(demo) -> None:
    vocabulary = demo.tokenizer.get_vocab()
    kept = {number for token, number in vocabulary.items() if not (token.startswith("[") and token.endswith("]"))}
    assert set(ordinary_ids(demo.tokenizer).tolist()) == kept and len(kept) == 29_523
    first = next(iter(id_documents(generation_of("random-repeats", length=4), demo.tokenizer)))
    assert first.ids.tolist() == 2 * shuffled(0, 0, sorted(kept), 4) == 2 * FIRST


# what seed 0 gives with BERT's uncased vocabulary
FIRST = [8036, 1821, 7890, 17975]


def test_a_token_comes_again_only_when_all_have_come() -> None:
    generation = generation_of("random-repeats", blocks=1, length=20)
    (document,) = id_documents(generation, byte_level())
    for first in (0, 9):
        assert sorted(document.ids[first : first + 9].tolist()) == list(range(1, 10))


def test_all_numbers_below_a_limit_are_equally_likely() -> None:
    stream = RandomStream(0, 0)
    counts = np.bincount([stream.below(7) for _ in range(7_000)], minlength=7)
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 22.5  # χ² with 6 degrees of freedom, 0.999
    assert sorted(RandomStream(0, 1).sample(5, 5)) == list(range(5))


def test_more_documents_begin_with_the_same_ones(demo) -> None:
    few, many = (
        [d.ids.tolist() for d in id_documents(generation_of("random-repeats", blocks=n, length=8), demo.tokenizer)]
        for n in (3, 6)
    )
    assert many[:3] == few and len({tuple(ids) for ids in many}) == 6


def test_a_run_has_a_document_of_each_block_with_special_tokens_around_both_copies(model: Path, tmp_path: Path) -> None:
    planned = complete_run(repeats(tmp_path / "out", model, seed=7))
    out = tmp_path / "out"
    documents, sequences = (pl.read_parquet(out / name / "*.parquet") for name in ("documents", "sequences"))
    assert documents["source"].to_list() == [f"random-repeats:{n}" for n in range(1, 6)]
    assert documents.select("characters", "digest", "dropped_reason").null_count().row(0) == (5, 5, 5)
    assert documents.select("content_tokens", "sequences").unique().rows() == [(24, 1)]
    assert sequences.select("tokens", "special_tokens", "window").unique().rows() == [(26, 2, 0)]
    for ids in sequences["token_ids"].to_list():
        assert (ids[0], ids[-1]) == (101, 102) and ids[1:13] == ids[13:25] and len(set(ids[1:13])) == 12
    recipe = {name: planned.identity.recipe[name] for name in ("seed", "blocks", "length", "max_length")}
    assert recipe == {"seed": 7, "blocks": 5, "length": 12, "max_length": 26}
    assert "a block of 12 random tokens, twice; 5 blocks by seed 7" in (out / "README.md").read_text()
    assert verify(out) == []
    page = Path(str(write_report(out))).read_text()
    assert "random-repeats" in page and "mass_induction can reach 46\u202f%" in page


def test_a_killed_run_resumes_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    whole, killed = repeats(tmp_path / "whole", model), repeats(tmp_path / "killed", model)
    complete_run(whole)
    planned = plan_run(killed)
    measure_shard(planned.open_worker(), 1)
    del planned  # its lock with it, as when the process dies
    again = plan_run(killed)
    assert again.remaining == [0, 2]
    worker = open_worker(killed)
    for shard in again.remaining:
        measure_shard(worker, shard)
    finish(killed.out)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


KILLED = """
import os, pathlib, signal, sys
import attlas

def kill_at_a_record_beside_another(event, arguments):
    # records are written side by side: that the first is being renamed does not say that it is there
    if event == "os.rename" and "/records/" in str(arguments[1]):
        if any(pathlib.Path(arguments[1]).parent.glob("*.json")):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_at_a_record_beside_another)
attlas.run(**{options})
"""


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["random-repeats", "needle"])
def test_a_process_killed_between_shards_is_resumed_to_the_same_bytes(model: Path, tmp_path: Path, corpus: str) -> None:
    asked = {"model": str(model), "corpus": corpus, "blocks": 4, "length": 40, "shard_sequences": 1, "tokens": "ids"}
    if corpus == "needle":
        asked |= {"statistics": "all", "depths": "50"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(options={**asked, "out": str(tmp_path / "killed")})],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 1 <= len(list((tmp_path / "killed" / "_work" / "records").glob("*.json"))) < 4
    for name in ("killed", "whole"):
        run(**asked, out=tmp_path / name)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert verify(tmp_path / "killed") == []


def test_another_seed_is_another_run(model: Path, tmp_path: Path) -> None:
    complete_run(repeats(tmp_path / "out", model))
    for name, value in (("seed", 1), ("blocks", 6), ("length", 11)):
        with pytest.raises(Refusal, match=f"{name}: there .*, asked {value}"):
            plan_run(repeats(tmp_path / "out", model, **{name: value}))
    digests = set()
    for seed in (0, 0, 1):
        out = tmp_path / f"{seed}-{len(digests)}"
        complete_run(repeats(out, model, seed=seed))
        digests.add(open_dataset(out)[1]["corpus"]["digest"])
    assert len(digests) == 2


def test_a_limit_takes_the_first_documents(model: Path, tmp_path: Path) -> None:
    complete_run(repeats(tmp_path / "all", model))
    complete_run(repeats(tmp_path / "two", model, limit=2))
    whole, two = (pl.read_parquet(tmp_path / name / "sequences" / "*.parquet") for name in ("all", "two"))
    assert two.equals(whole.head(2))


@pytest.mark.parametrize(
    ("corpus", "changes", "message"),
    [
        (
            "random-repeats",
            {"length": 300},
            r"must fit the model; .* 602 tokens, this model 512 .*--length 255 or less",
        ),
        ("needle", {"length": 600}, r"must fit the model; .*, this model 512 positions; use --length \d+ or less"),
        ("needle", {"length": 5}, r"a haystack must hold its needle of \d+ tokens; length is 5"),
        ("needle", {"depths": "0,50,101"}, "whole percentages from 0 to 100; got '0,50,101'"),
        ("needle", {"depths": "0,x"}, "whole percentages from 0 to 100; got '0,x'"),
        ("needle", {"depths": (5, 5)}, "different whole percentages"),
        ("random-repeats", {"depths": "0"}, "--depths can be asked of the corpus needle; this one is random-repeats"),
        ("random-repeats", {"blocks": 0}, "blocks must be at least 1; got 0"),
        ("random-repeats", {"seed": -1}, "seed must be at least 0; got -1"),
        ("random-repeats", {"stride": 2}, "--stride can't be asked of it; use --length"),
        ("needle", {"max_length": 64}, "--max-length can't be asked of it; use --length"),
        ("needle", {"text_column": "body"}, "text_column can't be asked of needle, which is made of token ids"),
        ("random-repeats", {"unit": "line", "encoding": "cp1252"}, "unit, encoding can't be asked of random-repeats"),
        ("demo", {"seed": 3, "blocks": 2}, "--seed, --blocks can be asked of the corpora random-repeats and needle"),
        (
            "random-repeats",
            {"statistics": "retrieval_score"},
            "measured on the corpus needle alone; this one is random",
        ),
    ],
)
def test_options_that_do_not_apply_are_refused_and_nothing_is_written(
    model: Path, tmp_path: Path, corpus: str, changes: dict, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        plan_run(options(model, tmp_path / "out", corpus, **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_generated_corpus_s_name_is_read_by_its_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needle").mkdir()
    (tmp_path / "needle" / "a.txt").write_text("a text")
    assert [document.text for document in open_corpus("./needle")] == ["a text"]
    assert open_corpus("needle").generation == generation_of("needle")


# --- needle


@pytest.mark.parametrize("seed", [0, 1])
def test_a_needle_lies_at_its_depth_and_its_answer_is_asked_for_at_the_end(demo, seed: int) -> None:
    generation = generation_of("needle", seed=seed, blocks=3, length=120, depths="0,40,100")
    documents = list(id_documents(generation, demo.tokenizer))
    assert [d.source for d in documents[:4]] == ["needle:1:0%", "needle:2:40%", "needle:3:100%", "needle:4:0%"]
    answers = set()
    for document, depth in zip(documents, (0, 40, 100) * 3, strict=True):
        places, answer = np.flatnonzero(document.marks == IN_NEEDLE), np.flatnonzero(document.marks == IN_ANSWER)
        needle = demo.tokenizer.decode(document.ids[places])
        said = demo.tokenizer.decode(document.ids[answer])
        assert needle.startswith("the secret number of the ") and needle.endswith(f" is {said}.")
        text = demo.tokenizer.decode(document.ids)
        assert text.endswith(f"? {needle[:-1]}") and text.count(said) == 2
        assert answer[-1] == len(document.ids) - 1 and np.ptp(places) == len(places) - 1
        share = places[0] / (120 - len(places))
        assert abs(share - depth / 100) < 0.08, "at the end of the nearest sentence"
        answers.add(said)
    assert len(answers) == 9


def test_a_haystack_has_exactly_its_length_in_tokens(demo) -> None:
    for document in id_documents(generation_of("needle", blocks=2, length=77), demo.tokenizer):
        places = np.flatnonzero(document.marks == IN_NEEDLE)
        question = demo.tokenizer.decode(document.ids[77:])
        assert places[-1] < 77 and question.startswith("what is the secret number of the ")


def test_the_longest_document_is_known_before_they_are_made(demo) -> None:
    generation = generation_of("needle", seed=5, blocks=6, length=50)
    documents = list(id_documents(generation, demo.tokenizer))
    assert longest_sequence(generation, demo.tokenizer, limit=None) == 2 + max(len(d.ids) for d in documents)


def test_a_digest_key_keys_the_ids_of_a_document(model: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    complete_run(repeats(tmp_path / "out", model, blocks=1, digest_key=key))
    (digest,) = pl.read_parquet(tmp_path / "out" / "documents" / "*.parquet")["digest"]
    (ids,) = pl.read_parquet(tmp_path / "out" / "sequences" / "*.parquet")["token_ids"]
    content = b"".join(number.to_bytes(4, "little") for number in ids[1:-1])
    assert digest == hmac.new(key.read_bytes(), content, "sha256").hexdigest()


def test_answers_are_the_same_ids_in_the_needle_and_behind_the_question(demo) -> None:
    for tokenizer in (demo.tokenizer, letters(spaced=True), letters(spaced=False)):
        for document in id_documents(generation_of("needle", blocks=1, length=400), tokenizer):
            answer = document.ids[document.marks == IN_ANSWER].tolist()
            needle = document.ids[document.marks == IN_NEEDLE].tolist()
            assert " ".join(map(str, answer)) in " ".join(map(str, needle))


def letters(*, spaced: bool) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary of letters, or a unigram one."""
    characters = sorted(set("abcdefghijklmnopqrstuvwxyzTWS0123456789.?"))
    if not spaced:
        raw = Tokenizer(models.Unigram([(c, -1.0) for c in ["<unk>", "▁", *characters]], unk_id=0))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    raw = Tokenizer(models.BPE({c: n for n, c in enumerate(["Ġ", *characters])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_a_word_within_text_has_the_space_that_its_tokenizer_wants() -> None:
    assert encoder_within_text(letters(spaced=True))("ab") == letters(spaced=True)(" ab")["input_ids"]
    assert encoder_within_text(letters(spaced=True))(".") == letters(spaced=True)(".")["input_ids"]
    assert encoder_within_text(letters(spaced=False))("ab") == letters(spaced=False)("ab")["input_ids"]


def test_a_vocabulary_without_the_needle_s_words_is_refused(tmp_path: Path) -> None:
    folder = save(model_of("bert"), tmp_path / "words")
    with pytest.raises(Refusal, match="must consist of known tokens; this tokenizer has none for a part of"):
        plan_run(options(folder, tmp_path / "out", "needle"))
    assert not (tmp_path / "out").exists()


def test_a_needle_run_verifies_and_a_worker_needs_no_corpus(model: Path, tmp_path: Path) -> None:
    asked = options(
        model, tmp_path / "out", "needle", blocks=1, length=60, depths=(0, 100), statistics="all", shard_sequences=1
    )
    planned = plan_run(asked)
    worker = open_worker(replace(asked))
    for shard in planned.remaining:
        measure_shard(worker, shard)
    finish(asked.out)
    assert verify(tmp_path / "out") == []
    assert planned.identity.recipe["depths"] == [0, 100]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a haystack of 60 tokens with a needle at 0, 100 %" in card
    heads = pl.read_parquet(tmp_path / "out" / "heads" / "*.parquet")
    assert heads["retrieval_score"].null_count() == heads["retrieval_copy_score"].null_count() == 0
    write_report(tmp_path / "out")
