"""Repair of a finished dataset, by this process alone, without Prefect."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from attlas.flows.config import Run
from attlas.flows.interrupts import stopped_by_signals
from attlas.flows.measuring import measure_here, using_display, work_in_all
from attlas.flows.progress import Display, Work, count_of

if TYPE_CHECKING:
    from attlas.extract.run import Worker


def repair_dataset(run: Run, *, show: Display) -> str:
    """Measure the damaged parts of the dataset of a run again; returns what was done, for people."""
    from attlas.extract.errors import shortlist
    from attlas.extract.repair import repair

    def measure(worker: "Worker", shards: Sequence[int], of_shard: Callable[..., list[str]]) -> Iterable[list[str]]:
        show.start_measuring(total=work_in_all(worker, shards), before=Work())
        return measure_here(of_shard, worker, shards)

    with using_display(show), stopped_by_signals(run.out, show):
        done = repair(run.options(), progress=show.stage, measure=measure)
    if not done.keys:
        return f"{run.out}: nothing is damaged, {count_of(done.parts, 'part')} as the manifest states"
    parts = f"{count_of(len(done.keys), 'part')} put back byte for byte: {shortlist(done.keys)}"
    return f"{run.out}: {count_of(len(done.shards), 'shard')} measured again, {parts}"
