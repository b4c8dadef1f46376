"""A share of a run, measured by this process alone, without Prefect; and what completes the dataset when all shares are measured."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attlas.extract.errors import Refusal
from attlas.flows.config import Run, read_run
from attlas.flows.interrupts import stopped_by_signals
from attlas.flows.measuring import measure_here, using_display, work_in_all
from attlas.flows.places import Place, place_named
from attlas.flows.progress import Display, count_of

if TYPE_CHECKING:
    from attlas.extract.share import Share


def measure_share(run: Run, share: "Share", *, show: Display) -> str:
    """Measure a share of the shards of a run; returns what is done and what is to do. A failed process is started again as it was."""
    from attlas.extract.run import measure_shard
    from attlas.extract.share import open_share

    with using_display(show), stopped_by_signals(run.out, show):
        worker = open_share(run.options(), share, progress=show.stage)
        if worker is None:
            return f"{run.out} already contains this run, complete"
        shards = share.of_shards(worker.plan.to_measure)
        missing = worker.store.unmeasured(shards)
        done = sorted(set(shards) - set(missing))
        show.start_measuring(total=work_in_all(worker, shards), before=work_in_all(worker, done))
        measure_here(partial(measure_shard, worker), worker, missing)
    left = worker.store.unmeasured(worker.plan.to_measure)
    todo = f"{count_of(len(left), 'shard')} of the run to go" if left else f"all of the run: attlas finish {run.out}"
    return f"share {share}: {count_of(len(shards), 'shard')} measured, {todo}"


def finish_run(dataset_or_run_file: Place, *, show: Display) -> Place:
    """Complete the dataset of a place or of a run file, if all its shards are measured; returns its place."""
    from attlas.extract.share import finish_shares

    named = place_named(dataset_or_run_file)
    run = read_run(named, {}) if isinstance(named, Path) and named.is_file() else None
    out = named if run is None else run.out
    if isinstance(out, Path) and not out.is_dir():
        raise Refusal(
            f"what is finished is the output folder of a run, or a run file; there is none at {out}; check the path"
        )
    card = None if run is None else run.options().card
    with using_display(show):
        finish_shares(out, progress=show.stage, card=card)
    return out
