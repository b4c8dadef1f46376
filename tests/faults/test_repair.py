"""A damaged part of a finished dataset is named by verify; repair measures its shard again, and nothing else."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from attlas.extract import repair as module
from attlas.extract.errors import AnotherRun, Damaged, Refusal
from attlas.extract.instrument import Instrument
from attlas.extract.options import RunOptions
from attlas.extract.redact import redact
from attlas.extract.repair import Repaired, Worker, repair
from attlas.extract.run import measure_shard, plan_run, two_at_a_time
from attlas.extract.store import MANIFEST, WORK, shard_of
from tests.conftest import Ended
from tests.extract.runs import complete_run, contents
from tests.faults.damage import BYTE_DAMAGES

Dataset = tuple[RunOptions, Instrument]
TEXTS = {
    "a": "A first text, of several windows. " * 6,
    "b": "Another one. " * 5,
    "c": "And a third one, the last. " * 3,
}
flip = BYTE_DAMAGES["bit flipped in the middle"]


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset with every statistic, in several shards."""
    folder = tmp_path_factory.mktemp("repair")
    (folder / "corpus").mkdir()
    for name, text in TEXTS.items():
        (folder / "corpus" / f"{name}.txt").write_text(text)
    options = RunOptions(
        model=str(model),
        corpus=str(folder / "corpus"),
        out=folder / "out",
        max_length=12,
        shard_sequences=3,
        engine="reference",
        statistics="all",
        tokens="text",
    )
    return options, complete_run(options).instrument


@pytest.fixture
def copied(measured: Dataset, tmp_path: Path) -> Dataset:
    """A copy of the dataset, and of its corpus."""
    options, instrument = measured
    shutil.copytree(options.corpus, tmp_path / "corpus")
    shutil.copytree(options.out, tmp_path / "out")
    return replace(options, corpus=str(tmp_path / "corpus"), out=tmp_path / "out"), instrument


def repaired(copied: Dataset) -> tuple[Repaired, list[int]]:
    """Repair a dataset; returns also the shards that were measured."""
    options, instrument = copied
    measured: list[int] = []

    def measure(_worker: Worker, shards: Sequence[int], of_shard) -> list[list[str]]:
        measured.extend(shards)
        return two_at_a_time(of_shard, shards)

    return repair(options, instrument=instrument, measure=measure), measured


def last_parts(out: Path) -> dict[str, str]:
    """The last part of each table."""
    tables = json.loads((out / MANIFEST).read_text())["tables"]
    return {table: facts["parts"][-1]["path"] for table, facts in tables.items()}


def assert_repaired(copied: Dataset, damaged: Sequence[str], whole: dict[str, bytes]) -> list[int]:
    """Verify names the damaged parts, and only those; repair makes every byte what it was. Returns the shards measured again."""
    out = Path(copied[0].out)
    assert {finding.part for finding in verify(out)} >= set(damaged)
    assert {finding.part for finding in verify(out)} <= {*damaged, MANIFEST}
    done, measured = repaired(copied)
    assert sorted(done.keys) == sorted(damaged)
    assert contents(out) == whole
    assert verify(out) == []
    return measured


@pytest.mark.parametrize("table", ["documents", "sequences", "heads", "summaries", "weights", "totals"])
def test_a_damaged_part_is_made_again_and_no_other_shard_is_measured(copied: Dataset, table: str) -> None:
    """Tables of the plan, measured, derived from others, of the model's parameters, and made of all shards."""
    out = Path(copied[0].out)
    whole, part = contents(out), last_parts(out)[table]
    flip(out / part)
    assert assert_repaired(copied, [part], whole) == ([] if table == "totals" else [shard_of(part)])


def test_a_part_of_every_table_at_once(copied: Dataset) -> None:
    out = Path(copied[0].out)
    whole, parts = contents(out), list(last_parts(out).values())
    for part in parts:
        flip(out / part)
    assert_repaired(copied, parts, whole)


@pytest.mark.parametrize("what", [name for name in BYTE_DAMAGES if name != "a directory"])
def test_whatever_is_damaged_in_a_part_it_is_made_again(copied: Dataset, what: str) -> None:
    out = Path(copied[0].out)
    whole = contents(out)
    BYTE_DAMAGES[what](out / "heads/shard-00001.parquet")
    done, measured = repaired(copied)
    assert (done.keys, measured) == (["heads/shard-00001.parquet"], [1])
    assert contents(out) == whole
    assert not (out / "heads/shard-00001.parquet").is_symlink()


def test_several_parts_of_several_shards(copied: Dataset) -> None:
    out = Path(copied[0].out)
    whole = contents(out)
    damaged = ["documents/shard-00000.parquet", "heads/shard-00000.parquet", "sequences/shard-00002.parquet"]
    for part in damaged:
        (out / part).unlink()
    shutil.rmtree(out / "residual")
    done, measured = repaired(copied)
    assert measured == done.shards == list(range(len(list((out / "heads").iterdir()))))
    assert contents(out) == whole


def test_a_folder_in_the_place_of_a_part_is_left_alone(copied: Dataset) -> None:
    out = Path(copied[0].out)
    BYTE_DAMAGES["a directory"](out / "heads/shard-00001.parquet")
    with pytest.raises(Refusal, match=r"a file is to be written at .*shard-00001\.parquet, where a folder lies"):
        repaired(copied)
    assert (out / "heads/shard-00001.parquet/inside").read_text() == "x"


def test_where_nothing_is_damaged_no_model_is_loaded(copied: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    options, _ = copied
    monkeypatch.setattr(module, "open_instrument", lambda *_, **__: pytest.fail("it loads the model"))
    before = contents(Path(options.out))
    done = repair(options)
    assert (done.shards, done.keys, done.parts) == ([], [], sum(name.endswith(".parquet") for name in before))
    assert contents(Path(options.out)) == before


def test_killed_between_two_shards_it_goes_on_with_the_other(copied: Dataset) -> None:
    options, instrument = copied
    out = Path(options.out)
    whole = contents(out)
    damaged = ["heads/shard-00000.parquet", "heads/shard-00001.parquet"]
    for part in damaged:
        flip(out / part)

    def killed(_worker: Worker, shards: Sequence[int], of_shard) -> list[list[str]]:
        of_shard(shards[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(options, instrument=instrument, measure=killed)
    assert (out / WORK).exists()
    done, measured = repaired(copied)
    assert (done.keys, measured) == (damaged[1:], [1])
    assert contents(out) == whole


def test_a_corpus_that_is_not_as_it_was_is_refused(copied: Dataset) -> None:
    options, _ = copied
    flip(Path(options.out) / "heads/shard-00001.parquet")
    file = Path(options.corpus) / "b.txt"
    file.write_text(file.read_text().swapcase())  # of the same size
    with pytest.raises(Refusal, match=r"the corpus as it was; .* has other documents now"):
        repaired(copied)
    file.write_text("Something else.")
    with pytest.raises(Refusal):
        repaired(copied)
    file.write_text(TEXTS["b"])
    assert repaired(copied)[1] == [1]


def test_other_options_are_refused(copied: Dataset) -> None:
    options, instrument = copied
    flip(Path(options.out) / "heads/shard-00001.parquet")
    with pytest.raises(AnotherRun, match="sample: there 8, asked 3"):
        repaired((replace(options, sample=3), instrument))


def test_a_part_that_does_not_become_what_it_was_stays_damaged(copied: Dataset) -> None:
    """The manifest of another machine, or one that somebody has edited."""
    out = Path(copied[0].out)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["tables"]["heads"]["parts"][1]["sha256"] = "0" * 64
    manifest["software"]["torch"] = "1.0"
    (out / MANIFEST).write_text(json.dumps(manifest))
    before = contents(out)["heads/shard-00001.parquet"]
    with pytest.raises(Damaged, match=r"heads/shard-00001\.parquet, measured again, .* \(torch 1\.0 then, .* now\)"):
        repaired(copied)
    assert contents(out)["heads/shard-00001.parquet"] == before


def test_an_unfinished_run_is_not_repaired_but_continued(copied: Dataset, tmp_path: Path) -> None:
    options, instrument = copied
    with pytest.raises(
        Refusal, match=r"what is repaired is a finished dataset; .* holds none; attlas run finishes one"
    ):
        repair(replace(options, out=tmp_path / "nothing"))
    begun = replace(options, out=tmp_path / "begun")
    planned = plan_run(begun, instrument=instrument)
    measure_shard(planned.open_worker(), 0)
    with pytest.raises(Refusal, match="holds an unfinished run"):
        repair(begun)


def test_a_redacted_dataset_is_repaired_in_its_lower_mode(copied: Dataset) -> None:
    options, instrument = copied
    out = Path(options.out)
    redact(out, tokens="none")
    whole = contents(out)
    lower = replace(options, tokens="none")
    for table, part in last_parts(out).items():
        if table != "totals":
            flip(out / part)
    repaired((lower, replace(instrument, classes=None)))
    assert contents(out) == whole


@pytest.fixture
def grown(copied: Dataset) -> Dataset:
    """The dataset after a document was added, one removed and one changed."""
    options, instrument = copied
    corpus = Path(options.corpus)
    (corpus / "b.txt").unlink()
    (corpus / "c.txt").write_text("The third one is another one now. " * 4)
    (corpus / "d.txt").write_text("A new one. " * 8)
    complete_run(options, instrument=instrument)
    return copied


def test_a_dataset_that_has_grown_is_repaired_in_all_its_shards(grown: Dataset) -> None:
    out = Path(grown[0].out)
    whole = contents(out)
    tables = json.loads((out / MANIFEST).read_text())["tables"]
    parts = [
        p["path"] for name, facts in tables.items() for p in facts["parts"] if name not in ("documents", "sequences")
    ]
    assert {Path(part).name.count("-") for part in parts} == {1, 2}  # of both generations
    for part in parts:
        flip(out / part)
    repaired(grown)
    assert contents(out) == whole


def test_what_only_a_grown_dataset_knows_is_said_to_be_lost(grown: Dataset) -> None:
    out = Path(grown[0].out)
    part = last_parts(out)["documents"]
    flip(out / part)
    with pytest.raises(Refusal, match=rf"known only from the shard once a dataset has grown; {part} of .* is damaged"):
        repaired(grown)


def test_the_command_repairs(attlas: Callable[..., Ended], copied: Dataset) -> None:
    options, _ = copied
    whole = contents(Path(options.out))
    flip(Path(options.out) / "heads/shard-00001.parquet")
    flags = ["--model", options.model, "--corpus", options.corpus, "--out", str(options.out), "--max-length", "12"]
    flags += ["--shard-sequences", "3", "--engine", "reference", "--statistics", "all", "--tokens", "text"]
    code, out, err = attlas("repair", *flags)
    assert code == 0, err
    assert "1 shard measured again, 1 part put back byte for byte: heads/shard-00001.parquet" in out
    assert contents(Path(options.out)) == whole
    assert "nothing is damaged" in attlas("repair", *flags)[1]
