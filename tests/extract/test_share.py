"""Shares of a run: each process measures its own, and the dataset is the one of a single process."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from attlas.extract.errors import Refusal, Unfinished
from attlas.extract.options import RunOptions
from attlas.extract.run import Worker, measure_shards
from attlas.extract.share import Share, finish_shares, open_share
from attlas.extract.store import Store
from attlas.extract.store.layout import part_key, spool_key
from tests.extract.runs import complete_run, contents, small_run


@pytest.fixture
def options(model: Path, tmp_path: Path) -> RunOptions:
    return small_run(
        model, tmp_path, "Whoever measures a shard writes the same bytes, and nobody waits for the others. " * 4
    )


def opened(options: RunOptions, share: Share, stages: list[str] | None = None) -> Worker:
    def note(stage: str, _done: int, _total: int | None) -> None:
        if stages is not None:
            stages.append(stage)

    worker = open_share(options, share, progress=note)
    assert worker is not None, "the dataset is not finished"
    return worker


def measure(options: RunOptions, share: Share) -> Worker:
    worker = opened(options, share)
    measure_shards(worker, share.of_shards(worker.plan.to_measure))
    return worker


def finish(options: RunOptions) -> None:
    finish_shares(options.out, progress=lambda *_: None)


@pytest.fixture
def alone(options: RunOptions, tmp_path: Path) -> dict[str, bytes]:
    """The dataset of one process."""
    complete_run(replace(options, out=tmp_path / "alone"))
    return contents(tmp_path / "alone")


def test_shares_have_every_shard_once() -> None:
    for shards in range(12):
        for of in range(1, 6):
            found = [shard for k in range(1, of + 1) for shard in Share(k, of).of_shards(range(shards))]
            assert sorted(found) == list(range(shards))


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "-1/2", "1/0", "a/b", "1/2/3", "１/２", "1.0/2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match=r"a share of the shards is K/N with K from 1 to N; got .*3/8"):
        Share.named(text)


def test_shares_in_any_order_make_the_dataset_of_one_process(
    options: RunOptions, alone: dict[str, bytes], tmp_path: Path
) -> None:
    for text in ("3/3", "1/3", "2/3"):
        measure(options, Share.named(text))
    finish(options)
    assert contents(tmp_path / "out") == alone
    assert open_share(options, Share(1, 3), progress=lambda *_: None) is None
    finish(options)
    assert contents(tmp_path / "out") == alone


def test_missing_shares_are_named_and_nothing_is_lost(options: RunOptions, tmp_path: Path) -> None:
    shards = measure(options, Share(2, 3)).plan.shards
    assert shards == 4
    before = contents(tmp_path / "out")
    with pytest.raises(Unfinished, match=r"missing or damaged of 4: 0, 2–3; run it again"):
        finish(options)
    assert contents(tmp_path / "out") == before
    assert Store.at(options.out).manifest is None


def test_a_damaged_part_is_named_and_measured_again(
    options: RunOptions, alone: dict[str, bytes], tmp_path: Path
) -> None:
    for k in (1, 2):
        measure(options, Share(k, 2))
    part = tmp_path / "out" / part_key("heads", 1)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(Unfinished, match="missing or damaged of 4: 1; "):
        finish(options)
    measure(options, Share(2, 2))
    finish(options)
    assert contents(tmp_path / "out") == alone


@pytest.mark.parametrize("key", [spool_key(0), "_work/plan.json", "_work/manifest.json"])
def test_a_damaged_plan_is_made_again(options: RunOptions, alone: dict[str, bytes], tmp_path: Path, key: str) -> None:
    measure(options, Share(2, 2))
    (tmp_path / "out" / key).write_bytes(b"damaged")
    measure(options, Share(1, 2))
    finish(options)
    assert contents(tmp_path / "out") == alone


def test_a_share_waits_for_the_plan_of_another_process(options: RunOptions) -> None:
    lock = Store.at(options.out).lock()
    stages: list[str] = []
    found: list[Worker] = []
    thread = threading.Thread(target=lambda: found.append(opened(options, Share(1, 2), stages)))
    thread.start()
    while "wait" not in stages:
        assert thread.is_alive()
    lock.release()
    thread.join(60)
    assert found[0].plan.shards == 4
    # and the lock is free again
    Store.at(options.out).lock().release()


def test_more_shares_than_shards_leave_some_without_work(options: RunOptions, tmp_path: Path) -> None:
    worker = measure(options, Share(9, 9))
    assert list(Share(9, 9).of_shards(worker.plan.to_measure)) == []
    assert not Store.at(options.out).has_records


def test_nothing_to_finish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"what is finished is a planned run; .* holds none; start it with attlas run"):
        finish_shares(tmp_path / "nothing", progress=lambda *_: None)
    assert not (tmp_path / "nothing").exists()


def test_another_model_is_refused(options: RunOptions) -> None:
    opened(options, Share(1, 2))
    with pytest.raises(Refusal, match=r"a worker measures as planned; .*weights_digest"):
        open_share(replace(options, model="demo"), Share(2, 2), progress=lambda *_: None)
