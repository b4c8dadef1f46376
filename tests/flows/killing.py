"""`python -m tests.flows.killing SIGNAL EVENT PART N ARGUMENTS`: run attlas and signal it at a chosen moment.

The signal is sent just before the N-th audit EVENT of Python (`sys.addaudithook`: "os.rename", "open", …) on a path that
contains PART.
"""

import os
import signal
import sys
from itertools import count
from typing import Any


def main(signal_to_send: signal.Signals, event: str, part: str, number: int) -> None:
    matches = count(1)

    def send(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event:
            paths = [os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)]
            if any(part in path for path in paths) and next(matches) == number:
                os.kill(os.getpid(), signal_to_send)

    sys.addaudithook(send)
    from attlas.flows.cli import main

    main()


if __name__ == "__main__":
    _, name, event, part, number, *arguments = sys.argv
    sys.argv = ["attlas", *arguments]
    main(signal.Signals[name], event, part, int(number))
