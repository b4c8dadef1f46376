"""Each piece of work in a process of its own, forked after the imports: one that hangs or dies costs its own result."""

import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")
WORKERS, PATIENCE = 2, 90  # seconds of a piece
_MEMORY = 8 << 30  # bytes of a process


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | None]]:
    """What the work gives for every item, in the order in which it is done; None of one that died or took too long."""
    context, waiting = get_context("fork"), list(reversed(list(items)))
    running: dict[Connection, Item] = {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            item = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            context.Process(target=_sent, args=(work, item, sender), daemon=True).start()
            sender.close()
            running[receiver] = item
        for receiver in cast(list[Connection], wait(list(running))):
            item = running.pop(receiver)
            try:
                yield item, receiver.recv()
            except EOFError:
                yield item, None
            receiver.close()


def in_a_process(work: Callable[[], object]) -> None:
    """Do it in a process of its own, however long it takes: threads that it starts would not survive a fork."""
    process = get_context("fork").Process(target=work)
    process.start()
    process.join()


def _sent(work: Callable[[Any], Any], item: Any, sender: Connection) -> None:
    signal.alarm(PATIENCE)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sender.send(work(item))
