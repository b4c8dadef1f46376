"""Run each task in its own process, forked after the imports, so that one that hangs or dies only loses its own result."""

import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")
WORKERS, PATIENCE = 2, 90  # processes; seconds per task
_MEMORY_LIMIT = 8 << 30  # bytes per process


def map_in_processes(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | None]]:
    """Yield (item, result) as tasks finish; the result is None if the process died or took too long."""
    context, waiting = get_context("fork"), list(reversed(list(items)))
    running: dict[Connection, Item] = {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            item = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            context.Process(target=_send_result, args=(work, item, sender), daemon=True).start()
            sender.close()
            running[receiver] = item
        for receiver in cast(list[Connection], wait(list(running))):
            item = running.pop(receiver)
            try:
                yield item, receiver.recv()
            except EOFError:
                yield item, None
            receiver.close()


def run_in_process(work: Callable[[], object]) -> None:
    """Run `work` in its own process without a time limit, because threads that it starts would not survive a later fork."""
    process = get_context("fork").Process(target=work)
    process.start()
    process.join()


def _send_result(work: Callable[[Any], Any], item: Any, sender: Connection) -> None:
    signal.alarm(PATIENCE)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    sender.send(work(item))
