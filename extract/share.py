"""A share of the shards of a run, measured by a plain process: a job of any batch system, on any machine that sees the output.

Every process is given the same run and its share, k of n: the shards k − 1, k − 1 + n, k − 1 + 2n, … counted from 0. The first process that
finds no plan makes it, and the others wait for it. Nobody holds the lock while shards are measured, because every shard is written
whole, and the same, whoever measures it. `finish` completes the dataset when all shards are measured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attlas.extract.card import Card
from attlas.extract.errors import Busy, Damaged, Refusal
from attlas.extract.instrument import Instrument, open_instrument
from attlas.extract.options import Progress, RunOptions, check_options
from attlas.extract.plan import load_plan
from attlas.extract.run import Worker, finish, open_worker, plan_run, sound_records
from attlas.extract.store import Location, Store

_PAUSE_S = 0.5  # between looks for the plan of another process


@dataclass(frozen=True)
class Share:
    """The k-th of n shares, k from 1."""

    number: int
    of: int

    @classmethod
    def named(cls, text: str) -> Share:
        """The share of a text such as 3/8. Raises Refusal."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise Refusal(f"a share of the shards is K/N with K from 1 to N; got {text!r}; of 8 jobs the third has 3/8")
        return cls(int(found[1]), int(found[2]))

    def of_shards(self, shards: Sequence[int]) -> Sequence[int]:
        """Its own of all shards that are to be measured."""
        return shards[self.number - 1 :: self.of]

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def open_share(options: RunOptions, share: Share, *, progress: Progress) -> Worker | None:
    """A worker for this share of a run, which is planned first if nobody has planned it; None if the dataset is finished.

    Waits for a plan that another process is making. What a killed process has left of the share is deleted unless it is intact.
    Raises Refusal.
    """
    instrument: Instrument | None = None
    is_damaged = False
    while True:
        store = Store.at(options.out)
        if not is_damaged and _is_planned(store):
            try:
                worker = open_worker(options, instrument=instrument, progress=progress)
                _check_share(worker, share, progress)
                return worker
            except Damaged:  # what was planned: it is planned again
                is_damaged = True
        try:
            if instrument is None:
                corpus = check_options(options)
                instrument = open_instrument(options, images=corpus.folder, progress=progress)
                continue  # another process may have made a plan since
            planned = plan_run(options, instrument=instrument, progress=progress)
        except Busy:
            progress("wait", 0, None)
            time.sleep(_PAUSE_S)
            is_damaged = False
            continue
        if planned.lock is not None:
            planned.lock.release()
        return None if planned.is_complete else planned.open_worker()


def finish_shares(out: Location, *, progress: Progress, card: Card | None = None) -> Location:
    """Check every part that was written, and complete the dataset, as `finish` does. Returns `out`.

    Raises Unfinished if shards are missing or damaged, and Refusal if there is no run, or another process writes to it.
    """
    store = Store.at(out)
    if store.is_finished:
        return finish(out, card=card)
    if not _is_planned(store):
        raise Refusal(
            f"what is finished is a planned run; {store.storage.place()} holds none; start it with attlas run --shards"
        )
    lock = store.lock()
    try:
        return finish(out, card=card, checking=progress)
    finally:
        lock.release()


def use_share_of_machine(options: RunOptions, number: int, of: int) -> RunOptions:
    """In one of several processes of a machine, by its number from 0: use a share of the cores, and the options with one of its GPUs."""
    torch.set_num_threads(max(1, torch.get_num_threads() // of))
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        return replace(options, device=f"cuda:{number % torch.cuda.device_count()}")
    return options


def _is_planned(store: Store) -> bool:
    """Whether the store holds a planned run that is not finished."""
    return not store.is_finished and store.has_draft and load_plan(store.storage) is not None


def _check_share(worker: Worker, share: Share, progress: Progress) -> None:
    """Delete records of a share whose parts are not as they were written. Raises Damaged if its plan is not."""
    shards = share.of_shards(worker.plan.to_measure)
    for shard in shards:
        worker.rows_of(shard)
    checking = progress if worker.store.has_records else lambda *_: None
    sound_records(worker.store, worker.plan, worker.means, shards, checking)
