"""`python -m tests.flows.killing SIGNAL EVENT PART N ARGUMENTS`: attlas, signalled at a chosen moment.

The moment is the N-th time that Python reports an EVENT (of `sys.addaudithook`: "os.rename", "open", …) about a path with
PART in it, just before it happens.
"""

import os
import signal
import sys
from itertools import count
from typing import Any


def main(chosen: signal.Signals, event: str, part: str, number: int) -> None:
    happened = count(1)

    def send(name: str, facts: tuple[Any, ...]) -> None:
        if name == event:
            paths = [os.fspath(fact) for fact in facts if isinstance(fact, str | os.PathLike)]
            if any(part in path for path in paths) and next(happened) == number:
                os.kill(os.getpid(), chosen)

    sys.addaudithook(send)
    from flows.cli import main

    main()


if __name__ == "__main__":
    _, name, event, part, number, *arguments = sys.argv
    sys.argv = ["attlas", *arguments]
    main(signal.Signals[name], event, part, int(number))
