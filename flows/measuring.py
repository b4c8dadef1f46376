"""The progress of measuring, shown on the display of the run. Without Prefect, which a share of a run does not need."""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from attlas.flows.interrupts import measuring_shards, refuse_when_stopping
from attlas.flows.progress import Display, Work, display

if TYPE_CHECKING:
    from attlas.extract.run import Worker

T = TypeVar("T")

_display_lock = threading.Lock()


@contextmanager
def using_display(show: Display) -> Iterator[None]:
    """Show the run and the warnings of libraries on this display."""
    token = display.set(show)
    before = warnings.showwarning
    try:
        with show:
            warnings.showwarning = lambda message, *_where: show.note(f"warning: {message}")
            yield
    finally:
        warnings.showwarning = before
        display.reset(token)


def show_measuring(measure: Callable[..., T], worker: "Worker", shard: int) -> T:
    """Call a function that measures a shard, and show its progress. Raises Stopped if the run has been asked to stop."""
    refuse_when_stopping()
    with shown_work() as show:
        result = measure(shard, progress=lambda tokens, documents: show(Work(0, documents, tokens)))
    # the rest: documents without a sequence, or the whole shard if another process has measured it
    advance(work_in(worker, shard) - show.done)
    return result


def measure_here(measure: Callable[..., T], worker: "Worker", shards: Iterable[int]) -> list[T]:
    """Call a function for each shard in this process, and show the progress; returns its results. Raises Stopped if some were not begun."""
    from attlas.extract.run import two_at_a_time

    with measuring_shards():
        return two_at_a_time(partial(show_measuring, measure, worker), shards)


def work_in(worker: "Worker", shard: int) -> Work:
    """The work of measuring a shard."""
    sequences, documents = worker.rows_of(shard)
    return Work(1, documents.num_rows, sum(sequences["tokens"].to_pylist()))


def work_in_all(worker: "Worker", shards: Iterable[int]) -> Work:
    """The work of measuring these shards."""
    return sum((work_in(worker, shard) for shard in shards), Work())


@contextmanager
def shown_work() -> Iterator["ShownWork"]:
    """Show the work of each batch, and subtract it again if the shard fails, because a retry counts it anew."""
    work = ShownWork()
    try:
        yield work
    except BaseException as error:
        advance(Work() - work.done)
        display.get().failed(error)
        raise


class ShownWork:
    """Shows work and keeps the sum."""

    def __init__(self) -> None:
        self.done = Work()

    def __call__(self, work: Work) -> None:
        self.done += work
        advance(work)


def advance(work: Work) -> None:
    """Show more work as done; the lock is needed because displays keep counts."""
    with _display_lock:
        display.get().advance(work)
