"""Ctrl-C once: no further shard is begun, and those that are being measured are finished. Twice, or SIGTERM: the run ends now.

Nothing is lost either way, because parts and records appear whole or not at all; a second Ctrl-C loses at most the work on the shards
that were being measured. A run that measures nothing yet ends at the first.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from attlas.flows.environment import remove_temporary_folder
from attlas.flows.progress import Display

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_finishing = threading.Event()  # asked to finish the shards that are being measured
_begun = threading.Event()  # shards are being measured


class Stopped(Exception):
    """A run that was asked to stop and has finished what it had begun."""


def exit_code_of(signal_number: int) -> int:
    """The exit code of a process that a signal has ended, as shells have it."""
    return 128 + signal_number


@contextmanager
def stopped_by_signals(out: object, show: Display) -> Iterator[None]:
    """Stop as the module says. Raises Stopped when what had begun is finished. out: where finished shards are kept, for messages."""

    def stop(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and _begun.is_set() and not _finishing.is_set():
            _finishing.set()
            _pass_on(signal.SIGINT)
            show.note("stopping when the shards that are being measured are finished; Ctrl-C again stops now")
            return
        show.note(_kept(out))
        show.close()
        remove_temporary_folder()
        _pass_on(signal.SIGKILL)
        # the temporary server exits when this process does
        os._exit(exit_code_of(number))

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    except Stopped as stopped:
        raise Stopped(_kept(out)) from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _finishing.clear()
        _begun.clear()


@contextmanager
def measuring_shards() -> Iterator[None]:
    """While shards are being measured, in this process or in others that it has started. Raises Stopped if it was asked to stop.

    A shard that fails meanwhile is told as always.
    """
    _begun.set()
    try:
        yield
    finally:
        _begun.clear()
    if _finishing.is_set():
        raise Stopped


def refuse_when_stopping() -> None:
    """Raise Stopped where a shard would begin after Ctrl-C. In a process that a run has started, Ctrl-C is this alone."""
    if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: _finishing.set())
    if _finishing.is_set():
        raise Stopped


def _kept(out: object) -> str:
    return f"stopped; finished shards are kept in {out}; the same command continues from there"


def _pass_on(number: signal.Signals) -> None:
    """Send a signal to the processes that this one has started to measure shards."""
    for process in multiprocessing.active_children():
        with suppress(OSError):
            if process.pid is not None:
                os.kill(process.pid, number)
