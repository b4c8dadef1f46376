"""The flow of a run: plan the corpus, measure each shard, write the manifest, write the report."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import as_completed

from attlas.extract.errors import CaptureError, Damaged, Refusal, first_line
from attlas.flows.analyze import report
from attlas.flows.config import Run
from attlas.flows.interrupts import Stopped, measuring_shards, stopped_by_signals
from attlas.flows.measuring import advance, measure_here, show_measuring, using_display, work_in, work_in_all
from attlas.flows.places import Place
from attlas.flows.progress import Display, Work, count_of, display
from attlas.flows.runners import Runner, is_in_this_process, share_machine, task_runner
from attlas.flows.server import forget_logs_and_events, is_lost_connection, prefect_connected, temporary_server

if TYPE_CHECKING:
    from attlas.extract.instrument import Instrument
    from attlas.extract.plan import Plan
    from attlas.extract.run import PlannedRun, Worker


_worker_lock = threading.Lock()
# models that this process has loaded, by the run they are for
instruments: dict[Run, "Instrument"] = {}


@flow(name="attlas", flow_run_name="measure {run.name}", task_runner=task_runner())
def measure(run: Run) -> Path | str:
    """Measure a corpus with a model and write the report. Shards that an earlier run has finished are not repeated."""
    write_dataset(run)
    page = report(run.out)
    get_run_logger().info("dataset %s, report %s", run.out, page)
    return page


def growth_notes(plan: "Plan | None") -> Iterator[str]:
    """What a run adds to a dataset whose corpus has changed; nothing for a new dataset, or if there is nothing to measure."""
    if plan is None or plan.generation.number == 1:
        return
    growth = plan.generation
    documents = f"{growth.added} new, {growth.changed} changed and {growth.removed} removed documents"
    yield (
        f"the corpus has changed: generation {growth.number}, with {documents}; "
        f"{len(plan.to_measure)} of {count_of(plan.shards, 'shard')} to measure"
    )


def write_dataset(run: Run) -> None:
    """Plan a run, measure its remaining shards and write its manifest, within a flow."""
    planned = plan_run(run)
    if planned.plan is None:
        return
    plan, remaining = planned.plan, planned.remaining
    get_run_logger().info("%d of %d shards to measure, %d documents", len(remaining), plan.shards, plan.documents)
    worker, done = planned.open_worker(), sorted(set(plan.to_measure) - set(remaining))
    is_all = len(plan.to_measure) == plan.shards
    total = Work(plan.shards, plan.documents, plan.tokens) if is_all else work_in_all(worker, plan.to_measure)
    display.get().start_measuring(total=total, before=work_in_all(worker, done))
    measure_shards(run, worker, remaining)
    write_manifest(run)


def measure_shards(run: Run, worker: "Worker", shards: list[int]) -> None:
    """Measure shards, and stop at the first one that fails after all retries. worker: of this process, which knows their work."""
    context = FlowRunContext.get()
    is_shown = context is not None and is_in_this_process(context.task_runner)
    with measuring_shards():  # raises Stopped if some were not begun
        for future in as_completed(list(measure_shard.map(unmapped(run), shards))):
            shard = future.result()
            if shard is not None and not is_shown:
                advance(work_in(worker, shard))


def is_worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a failure may be temporary, such as a full disk or a lost worker, unlike errors of the input or the model."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, Refusal | CaptureError | Damaged)


_RETRIED: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [1, 10],
    "retry_condition_fn": is_worth_retrying,
    "cache_policy": NO_CACHE,
}


@task(name="shard", task_run_name="shard {shard}", **_RETRIED)
def measure_shard(run: Run, shard: int) -> int | None:
    """Measure one shard in this process; None if the run has been asked to stop."""
    from attlas.extract.run import measure_shard

    worker = open_worker(run)
    with suppress(Stopped):
        show_measuring(partial(measure_shard, worker), worker, shard)
        return shard


@task(name="manifest", task_run_name="manifest", **_RETRIED)
def write_manifest(run: Run) -> Place:
    """Write the manifest, which completes the dataset."""
    from attlas.extract.run import finish

    display.get().stage("finish", 0, None)
    finish(run.out, card=run.options().card)
    return run.out


def write_card(run: Run) -> None:
    """Write the card of a finished dataset again, if the run file says what is on it."""
    from attlas.extract.run import finish

    if run.card is not None:
        finish(run.out, card=run.options().card)


@lru_cache(maxsize=1)
def plan_run(run: Run) -> "PlannedRun":
    """Check and plan a run, as its driver, once per process."""
    from attlas.extract.run import plan_run

    planned = plan_run(run.options(), instrument=instruments.get(run), progress=display.get().stage)
    instruments[run] = planned.instrument
    return planned


def open_worker(run: Run) -> "Worker":
    """A worker for a planned run, once per process."""
    with _worker_lock:
        return _open_worker(run)


@lru_cache(maxsize=1)
def _open_worker(run: Run) -> "Worker":
    from attlas.extract.run import open_worker

    options = share_machine(run.options())
    return open_worker(options, instrument=instruments.get(run), progress=display.get().stage)


def measure_locally(run: Run, *, show: Display, runner: Runner | None = None) -> Path | str:
    """Run the flow in this process, loading the model and planning while Prefect's server starts. runner: of the shards."""
    with using_display(show), stopped_by_signals(run.out, show), temporary_server() as server:
        if server:
            show.stage("server", 0, None)
        try:
            planned = plan_run(run)
            from attlas.extract.unmeasured import notes_on_statistics

            notes = notes_on_statistics(run.statistics, planned.instrument)
            for note in (*planned.instrument.encoder.settings.notes, *notes, *growth_notes(planned.plan)):
                show.note(note)
            if planned.is_complete:
                again = "report is" if run.card is None else "report and its card are"
                show.note(f"{run.out} already contains this run, complete; only its {again} written again")
                write_card(run)
                return report.fn(run.out)
            with prefect_connected(server):
                if server:
                    show.stage("server", 1, 1)
                try:
                    return (measure if runner is None else measure.with_options(task_runner=runner))(run)
                except Exception as error:
                    if not is_lost_connection(error):
                        raise
                    show.note(f"the Prefect server does not answer any more ({first_line(error)}); going on without it")
                    return _without_server(run)
        finally:
            release(run)


def _without_server(run: Run) -> Path | str:
    """Measure what is left of a run in this process, and complete the dataset and its report, without Prefect."""
    from attlas.extract.run import measure_shard

    forget_logs_and_events()
    _release_plan(run)
    planned = plan_run(run)
    if planned.plan is not None:
        worker = planned.open_worker()
        measure_here(partial(measure_shard, worker), worker, planned.remaining)
        write_manifest.fn(run)
    return report.fn(run.out)


def release(run: Run) -> None:
    """Release the model of a run, and the lock on its folder if this thread holds it."""
    _release_plan(run)
    instruments.clear()


def _release_plan(run: Run) -> None:
    """Release all but the model."""
    from attlas.extract.store import Store

    plan_run.cache_clear()
    _open_worker.cache_clear()
    Store.at(run.out).unlock()
