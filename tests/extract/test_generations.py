"""Datasets that grow with their corpus: generations, what is reused, what is gone, and kills on the way."""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from attlas.analysis.compare import compare
from attlas.analysis.comparison_output import save_comparison
from attlas.analysis.dataset import Dataset
from attlas.analysis.history import collect_garbage
from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract.errors import Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, plan_run
from attlas.extract.store import LocalFolder, Store, generations, sha256_of
from attlas.flows.push import refuse_earlier_generation
from tests.extract.runs import complete_run, contents

TEXTS = {
    "a.txt": "The cat sat on the mat and looked at the moon for a long time.",
    "b.txt": "A short one.",
    "c.txt": "Nothing is lost that is written down: every token of the corpus has its own place. " * 3,
    "d.txt": "Numbers are believed when they are shown.",
}


@pytest.fixture
def options(model: Path, tmp_path: Path) -> RunOptions:
    return four_texts(model, tmp_path)


def four_texts(model: Path, folder: Path) -> RunOptions:
    """A run of four texts in shards of three sequences, of which one text crosses the border of two."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for name, text in TEXTS.items():
        (corpus / name).write_text(text)
    return RunOptions(
        model=str(model),
        corpus=str(corpus),
        out=folder / "out",
        max_length=12,
        shard_sequences=3,
        engine="reference",
    )


def change(options: RunOptions, **texts: str | None) -> None:
    """Write texts of the corpus, or remove them."""
    for name, text in texts.items():
        file = Path(options.corpus) / f"{name}.txt"
        if text is None:
            file.unlink()
        else:
            file.write_text(text)


def rows(location, table: str) -> pl.DataFrame:
    return Dataset.open(location).scan(table).collect()


def by_source(location, table: str) -> pl.DataFrame:
    """The rows of a table by the source of their document and their window, without ids and shards."""
    sequences, documents = rows(location, "sequences"), rows(location, "documents")
    of = sequences.join(documents.select("document_id", "source"), on="document_id").select(
        "sequence_id", "source", "window"
    )
    frame = rows(location, table).join(of, on="sequence_id").drop("sequence_id", "document_id", strict=False)
    keys = [n for n in ("source", "window", "stack", "layer", "head", "site") if n in frame.columns]
    return frame.select(sorted(frame.columns)).sort(keys)


def assert_same_answers(grown: Path, fresh: Path) -> None:
    """What was measured of each document is what a run of the whole corpus measures, but for the padding of its batches."""
    for table in ("heads", "residual", "layers"):
        assert_frame_equal(
            by_source(grown, table), by_source(fresh, table), check_exact=False, rel_tol=1e-4, abs_tol=1e-5
        )
    assert not verify(grown)
    old, new = (Dataset.open(d).manifest["corpus"] for d in (grown, fresh))
    for name in ("sequences", "tokens", "content_tokens", "digest", "files"):
        assert old[name] == new[name], name


def fresh_run(options: RunOptions) -> Path:
    out = Path(options.out).with_name("fresh")
    complete_run(replace(options, out=out))
    return out


def paths(location) -> set[str]:
    """The keys of the parts of a generation."""
    dataset = Dataset.open(location)
    return {part.path for table in dataset.tables for part in dataset.parts(table)}


def parts_on_disk(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".parquet")}


def test_new_documents_go_to_new_shards_and_nothing_else_is_touched(options: RunOptions) -> None:
    out = Path(options.out)
    complete_run(options)
    first, before = contents(out), rows(out, "heads")
    change(options, e="A new text arrives in the night.", aa="And another one, before the others in order.")
    planned = plan_run(options)
    assert planned.plan is not None
    assert planned.plan.to_measure == [planned.plan.shards - 1]
    complete_run(options)

    grown = contents(out)
    for name, content in first.items():
        if name.endswith(".parquet"):
            assert grown[name] == content, name
    assert grown["manifests/000001.json"] == first["manifest.json"]
    assert grown["manifests/000002.json"] == grown["manifest.json"]
    facts = Dataset.open(out).manifest["generation"]
    assert facts == {
        "number": 2,
        "next_sequence": rows(out, "sequences").height,
        "measured_shards": 1,
        "added": 2,
        "changed": 0,
        "removed": 0,
    }
    assert_same_answers(out, fresh_run(options))
    # ids mean what they meant
    ids = set(before["sequence_id"].unique())
    assert_frame_equal(rows(out, "heads").filter(pl.col("sequence_id").is_in(ids)), before)


def test_documents_that_are_gone_or_changed_keep_their_ids_and_nothing_else(options: RunOptions) -> None:
    out = Path(options.out)
    complete_run(options)
    before, first = rows(out, "documents"), contents(out)
    change(options, b=None, c=TEXTS["c.txt"] + "And a word more.")
    complete_run(options)

    documents = rows(out, "documents").sort("document_id")
    assert documents["source"].to_list() == ["a.txt", "b.txt", "c.txt", "d.txt", "c.txt"]
    assert documents["dropped_reason"].to_list() == [None, "removed", "changed", None, None]
    gone = documents.filter(pl.col("dropped_reason").is_not_null())
    assert gone.select("characters", "content_tokens", "sequences").row(0) == (0, 0, 0)
    assert set(rows(out, "sequences")["document_id"]) == {0, 3, 4}
    manifest = Dataset.open(out).manifest
    assert manifest["corpus"]["dropped"] == {"changed": 1, "removed": 1}
    assert (manifest["generation"]["changed"], manifest["generation"]["removed"]) == (1, 1)
    assert manifest["generation"]["added"] == 0
    assert_same_answers(out, fresh_run(options))
    # the earlier generation is still whole
    assert_frame_equal(rows(f"{out}@1", "documents"), before)
    assert not verify(f"{out}@1")
    after = contents(out)
    assert all(after[name] == content for name, content in first.items() if name.endswith(".parquet"))


def test_ids_of_what_is_gone_are_never_given_again(options: RunOptions) -> None:
    out = Path(options.out)
    complete_run(options)
    last = rows(out, "sequences")["sequence_id"].max()
    change(options, d=None)
    complete_run(options)
    change(options, d=TEXTS["d.txt"])
    complete_run(options)
    documents = rows(out, "documents").sort("document_id")
    assert documents["document_id"].to_list() == [0, 1, 2, 3, 4]
    assert documents.filter(source="d.txt")["dropped_reason"].to_list() == ["removed", None]
    again = rows(out, "sequences").filter(document_id=4)["sequence_id"]
    assert again.min() > last
    assert generations(LocalFolder(out)) == [1, 2, 3]
    assert_same_answers(out, fresh_run(options))


def test_with_a_key_documents_are_known_by_what_they_say(options: RunOptions, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a secret of sixteen bytes or more")
    options = replace(options, digest_key=key)
    complete_run(options)
    change(options, a=None, z=TEXTS["a.txt"], b="A shorn one.")  # renamed; and changed, with the same length
    (Path(options.corpus) / "n.txt").write_text("")
    complete_run(options)
    documents = rows(options.out, "documents").sort("document_id")
    assert documents["source"].to_list() == ["a.txt", "b.txt", "c.txt", "d.txt", "b.txt", "n.txt"]
    assert documents["dropped_reason"].to_list() == [None, "changed", None, None, None, "empty"]
    assert not verify(options.out)


def test_without_a_key_a_text_of_the_same_place_and_length_is_the_same(options: RunOptions) -> None:
    complete_run(options)
    change(options, b="A shorn one.", e="new")
    complete_run(options)
    assert Dataset.open(options.out).manifest["generation"]["changed"] == 0


def test_a_corpus_that_has_lost_everything_is_refused_and_the_dataset_stays(options: RunOptions) -> None:
    complete_run(options)
    before = parts_on_disk(Path(options.out))
    change(options, a=None, b=None, c=None, d="")
    with pytest.raises(Refusal, match="at least one document with tokens"):
        complete_run(options)
    assert parts_on_disk(Path(options.out)) == before
    assert not verify(options.out)


class Killed(BaseException):
    pass


WRITES = ("put", "put_if_absent", "writing", "delete", "clear")


def die_at(monkeypatch: pytest.MonkeyPatch, number: int, *, is_done: bool) -> list[str]:
    """Make the write with this number raise, before it or after it; returns a list with the name of each write so far."""
    seen: list[str] = []

    def dying(name: str, method):
        def call(self, *arguments):
            seen.append(f"{name} {arguments[0]}")
            is_now = len(seen) == number + 1
            if is_now and name == "writing":
                return half_written(method(self, *arguments))
            if is_now and not is_done:
                raise Killed
            result = method(self, *arguments)
            if is_now:
                raise Killed
            return result

        return call

    for name in WRITES:
        monkeypatch.setattr(LocalFolder, name, dying(name, getattr(LocalFolder, name)))
    return seen


@contextmanager
def half_written(writing):
    with writing as file:
        file.write(b"half")
        raise Killed
        yield file


@pytest.fixture(scope="module")
def grown(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run whose corpus has lost a text and has a new one, its loaded model, its folder before, the files after, and all writes."""
    folder = tmp_path_factory.mktemp("grown")
    options = four_texts(model, folder)
    planned = complete_run(options)
    before = Path(options.out).rename(folder / "before")
    change(options, b=None, e="A new text arrives in the night.")
    restore(before, options)
    with pytest.MonkeyPatch.context() as patch:
        writes = die_at(patch, -1, is_done=False)
        complete_run(options, instrument=planned.instrument)
    return options, planned.instrument, before, contents(Path(options.out)), writes


def restore(before: Path, options: RunOptions) -> None:
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(before, options.out)


@pytest.mark.sample(6)
@pytest.mark.parametrize("place", range(24))
@pytest.mark.parametrize("is_done", [False, True])
def test_a_generation_that_was_killed_anywhere_ends_as_one_that_was_not(
    grown, place: int, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run dies before or after one of its writes; the same command completes it with the same bytes."""
    options, instrument, before, expected, writes = grown
    number = place * len(writes) // 24
    restore(before, options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, number, is_done=is_done)
        complete_run(options, instrument=instrument)
    Store.at(options.out).unlock()
    dataset = Dataset.open(options.out)  # a reader always finds a whole generation
    for part in (part for table in dataset.tables for part in dataset.parts(table)):
        assert sha256_of(dataset.storage, part.path) == part.sha256, part
    complete_run(options, instrument=instrument)
    assert contents(Path(options.out)) == expected, writes[number]


def test_a_generation_is_planned_again_when_the_corpus_changes_before_it_is_finished(options: RunOptions) -> None:
    out = Path(options.out)
    complete_run(options)
    change(options, e="A new text arrives in the night.", f="and one that will not stay " * 4)
    planned = plan_run(options)
    worker = planned.open_worker()
    for shard in planned.remaining:
        measure_shard(worker, shard)
    Store.at(out).unlock()
    change(options, f=None, g="this one instead")
    complete_run(options)
    documents = rows(out, "documents").sort("document_id")
    assert documents["source"].to_list() == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "g.txt"]
    assert_same_answers(out, fresh_run(options))
    assert set(parts_on_disk(out)) == paths(out) | paths(f"{out}@1")


def test_a_corpus_that_is_as_it_was_again_leaves_nothing_of_the_attempt(options: RunOptions) -> None:
    complete_run(options)
    before = contents(Path(options.out))
    change(options, e="A new text arrives in the night.")
    planned = plan_run(options)
    measure_shard(planned.open_worker(), planned.remaining[0])
    Store.at(options.out).unlock()
    change(options, e=None)
    complete_run(options)
    after = contents(Path(options.out))
    assert after.pop("manifests/000001.json") == after["manifest.json"]
    assert after == before


def test_an_old_generation_is_read_whole_after_ten_more_and_gc_removes_it(options: RunOptions) -> None:
    out = Path(options.out)
    complete_run(options)
    first, frames = contents(out), {t: rows(out, t) for t in Dataset.open(out).tables}
    for number in range(10):
        change(options, **{f"n{number}": f"The text of night {number} has its own words, and is read once."})
        if number % 3 == 2:
            change(options, **{f"n{number - 1}": None})
        complete_run(options)
    assert generations(LocalFolder(out)) == list(range(1, 12))
    for table, frame in frames.items():
        assert_frame_equal(rows(f"{out}@1", table), frame)
    assert not verify(f"{out}@1") and not verify(out)
    assert_same_answers(out, fresh_run(options))

    named = {g: paths(f"{out}@{g}") for g in (9, 10, 11)}
    (out / "notes.txt").write_text("mine")
    gone, parts = collect_garbage(out, keep=3)
    assert gone == list(range(1, 9))
    assert set(parts_on_disk(out)) == named[9] | named[10] | named[11]
    assert parts and (out / "notes.txt").exists()
    assert generations(LocalFolder(out)) == [9, 10, 11]
    with pytest.raises(Refusal, match="has no 1; it has 9, 10, 11"):
        Dataset.open(f"{out}@1")
    assert not verify(out) and not verify(f"{out}@9")
    assert first["manifest.json"]


def test_pages_of_an_earlier_generation_lie_in_the_dataset_beside_those_of_the_newest(options: RunOptions) -> None:
    out = Path(options.out)
    complete_run(options)
    change(options, e="A new text arrives in the night.")
    complete_run(options)
    assert write_report(out) == out / "report.html"
    assert write_report(f"{out}@1") == out / "report-000001.html"
    assert save_comparison(compare(out, f"{out}@1"), f"{out}@1") == out / "comparison.html"
    assert not verify(out)
    with pytest.raises(
        Refusal, match="the newest generation of a dataset is pushed, 2; got 1; give the folder without @1"
    ):
        refuse_earlier_generation(Dataset.open(f"{out}@1"))
    refuse_earlier_generation(Dataset.open(out))


def test_load_dataset_reads_the_current_generation_alone(options: RunOptions, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    complete_run(options)
    change(options, b=None, e="A new text arrives in the night.")
    complete_run(options)
    change(options, f="And another one, that has not been measured yet.")
    planned = plan_run(options)
    measure_shard(planned.open_worker(), planned.remaining[0])
    for table in ("documents", "sequences", "heads"):
        loaded = datasets.load_dataset(str(options.out), table, split="train", cache_dir=str(tmp_path / "cache"))
        assert sorted(loaded[0]) == sorted(rows(options.out, table).columns)
        assert len(loaded) == rows(options.out, table).height


def test_a_dataset_that_begins_to_grow_is_still_read_without_what_is_new(options: RunOptions, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    complete_run(options)
    heads = rows(options.out, "heads").height
    change(options, e="A new text arrives in the night.")
    planned = plan_run(options)
    measure_shard(planned.open_worker(), planned.remaining[0])
    loaded = datasets.load_dataset(str(options.out), "heads", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == rows(options.out, "heads").height == heads
    assert not verify(options.out)


def test_another_corpus_or_setting_is_another_dataset(options: RunOptions, tmp_path: Path) -> None:
    complete_run(options)
    change(options, e="A new text arrives in the night.")
    with pytest.raises(
        Refusal, match=r"holds a different run, says its manifest\.json \(max_length: there 12, asked 10"
    ):
        complete_run(replace(options, max_length=10))
    other = Path(options.corpus).rename(tmp_path / "other")
    with pytest.raises(Refusal, match=r"holds a different run.*corpus name: there 'corpus', asked 'other'"):
        complete_run(replace(options, corpus=str(other)))


def test_shares_of_a_generation_make_it_in_any_order(options: RunOptions) -> None:
    from attlas.extract.run import measure_shards
    from attlas.extract.share import Share, finish_shares, open_share

    complete_run(options)
    for text in range(9):
        change(options, **{f"n{text}": f"The text of night {text} has its own words, and is read once."})
    for number in (3, 1, 2):
        worker = open_share(options, Share(number, 3), progress=lambda *_: None)
        assert worker is not None
        measure_shards(worker, Share(number, 3).of_shards(worker.plan.to_measure))
    finish_shares(options.out, progress=lambda *_: None)
    finish(options.out)
    assert_same_answers(Path(options.out), fresh_run(options))
