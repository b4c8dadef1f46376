"""`python -m tests.flows.killing SIGNALS EVENT PART N ARGUMENTS`: run attlas and signal it at a chosen moment.

The signals, separated by commas, are sent just before the N-th audit EVENT of Python (`sys.addaudithook`: "os.rename", "open", …)
on a path that contains PART. This event, and the next such event of any thread, wait until the main thread has handled each signal: a
fixed time is too short on a busy machine, and two equal signals before it has looked are one.
"""

import os
import signal
import sys
import threading
from itertools import count
from typing import Any


def main(signals: list[signal.Signals], event: str, part: str, number: int) -> None:
    matches, handled, others_wait = count(1), threading.Event(), threading.RLock()
    # Python handles the signals that have come by number; this is the last, so the one before it has been handled too
    signal.signal(signal.SIGRTMAX, lambda *_: handled.set())

    def send_all() -> None:
        for each in signals:
            handled.clear()
            # to the main thread, which may sleep on when another receives a signal
            for sent in (each, signal.SIGRTMAX):
                signal.pthread_kill(threading.main_thread().ident or 0, sent)
            if not handled.wait(120):
                os._exit(3)

    def send(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event:
            paths = [os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)]
            if any(part in path for path in paths):
                with others_wait:
                    if next(matches) == number:
                        send_all()

    sys.addaudithook(send)
    from attlas.flows.cli import main

    main()


if __name__ == "__main__":
    _, names, event, part, number, *arguments = sys.argv
    sys.argv = ["attlas", *arguments]
    main([signal.Signals[name] for name in names.split(",")], event, part, int(number))
