"""The pipeline: plan the corpus, measure each shard, write the manifest, write the report."""

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from extract.errors import CaptureError, Damaged, Refusal
from flows.analyze import report
from flows.config import Run
from flows.environment import remove_temporary_folder
from flows.progress import Display, Work, display
from flows.server import prefect_through, starting_server
from flows.streams import say

if TYPE_CHECKING:
    from extract.pipeline import Job


# one shard is in the model, which is in memory once, while the one before it is written; a third would only use memory
two_at_a_time = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=2))
_showing = threading.Lock()


@flow(name="attlas", task_runner=two_at_a_time)
def measure(run: Run) -> Path | str:
    """Measure a corpus with a model and report on it; what an earlier run finished is not done again."""
    log = get_run_logger()
    job = prepared(run)
    log.info("%d of %d shards to measure, %d documents", len(job.remaining), job.shards, job.documents)
    if not job.complete:
        measure_shards(run, job)
        finished(run)
    page = report(run.out)
    log.info("dataset %s, report %s", run.out, page)
    return page


def measure_shards(run: Run, job: "Job") -> None:
    """Measure what remains; at the first shard that fails for good, stop: what is done stays done."""
    remaining = job.remaining
    done = sorted(set(range(job.shards)) - set(remaining))
    before = sum((work_in(job, shard) for shard in done), Work())
    display.get().measuring(total=Work(job.shards, job.documents, job.tokens), before=before)
    for future in as_completed(list(measured.map(unmapped(run), remaining))):
        future.result()


def worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """What the input, the model or a damaged spool is to blame for fails again; a full disk or a lost worker may not."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, Refusal | CaptureError | Damaged)


@task(
    name="shard",
    task_run_name="shard {shard}",
    retries=2,
    retry_delay_seconds=[1, 10],
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
)
def measured(run: Run, shard: int) -> int:
    """Measure one shard, in whichever process this is."""
    from extract.pipeline import measure_shard

    job = prepared(run)
    with work_shown() as shown:
        measure_shard(job, shard, progress=lambda tokens, documents: shown(Work(0, documents, tokens)))
    # what no batch has told: documents without a sequence, or all of them where another process measured the shard
    advance(work_in(job, shard) - shown.done)
    return shard


@task(name="manifest", retries=2, retry_delay_seconds=[1, 10], retry_condition_fn=worth_retrying, cache_policy=NO_CACHE)
def finished(run: Run) -> Path:
    """Write the manifest: from now on there is a dataset."""
    from extract.pipeline import finish

    display.get().stage("finish", 0, None)
    finish(prepared(run))
    return run.out


@lru_cache(maxsize=1)
def prepared(run: Run) -> "Job":
    """The run's job: checked, planned, its model loaded once in this process."""
    from extract.pipeline import prepare

    return prepare(run.options(), progress=display.get().stage)


def work_in(job: "Job", shard: int) -> Work:
    return Work(1, job.documents_in(shard), job.tokens_in(shard))


@contextmanager
def work_shown() -> Iterator["WorkShown"]:
    """Show the work of each batch; take it back where the shard fails, since its next attempt counts it anew."""
    shown = WorkShown()
    try:
        yield shown
    except BaseException:
        advance(Work() - shown.done)
        raise


class WorkShown:
    """Shows work, and remembers how much."""

    def __init__(self) -> None:
        self.done = Work()

    def __call__(self, work: Work) -> None:
        self.done += work
        advance(work)


def advance(work: Work) -> None:
    """Show that so much more is done; displays count, and not for several threads at once."""
    with _showing:
        display.get().advance(work)


def measure_here(run: Run, *, show: Display) -> Path | str:
    """Run the flow in this process; the model loads and the plan is made while Prefect's server starts."""
    with showing(show), resumable(run, show), starting_server() as server:
        if server:
            show.stage("server", 0, None)
        try:
            job = prepared(run)
            for note in job.encoder.settings.notes:
                show.note(note)
            if job.complete:
                show.note(f"{run.out} holds this run already, complete; only its report is written again")
                return report.fn(run.out)
            with prefect_through(server):
                if server:
                    show.stage("server", 1, 1)
                return measure(run)
        finally:
            forget(run)


def forget(run: Run) -> None:
    """Let go of a run's model, and of the lock on its folder if this thread took it."""
    from extract.store import Store

    prepared.cache_clear()
    Store.at(run.out).unlock()


@contextmanager
def showing(show: Display) -> Iterator[None]:
    """Let this display show the run, and what libraries warn of meanwhile."""
    token = display.set(show)
    before = warnings.showwarning
    try:
        with show:
            warnings.showwarning = lambda message, *_where: show.note(f"warning: {message}")
            yield
    finally:
        warnings.showwarning = before
        display.reset(token)


@contextmanager
def resumable(run: Run, show: Display) -> Iterator[None]:
    """Make Ctrl-C end the run at once: parts and records are atomic, so there is nothing to wait for."""

    def stop(_signal: int, _frame: Any) -> None:
        show.close()
        say(f"\nstopped; what is measured is kept in {run.out}; the same command goes on from there")
        remove_temporary_folder()
        # the temporary server ends by itself when this process does
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
