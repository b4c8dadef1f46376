"""`python -m tests.flows.killing SIGNALS EVENT PART N ARGUMENTS`: run attlas and signal it at a chosen moment.

The signals, separated by commas, are sent just before the N-th audit EVENT of Python (`sys.addaudithook`: "os.rename", "open", …)
on a path that contains PART.
"""

import os
import signal
import sys
import time
from itertools import count
from typing import Any


def main(signals: list[signal.Signals], event: str, part: str, number: int) -> None:
    matches = count(1)

    def send(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event:
            paths = [os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)]
            if any(part in path for path in paths) and next(matches) == number:
                for each in signals:
                    os.kill(os.getpid(), each)
                    time.sleep(0.2)  # for the main thread to handle it

    sys.addaudithook(send)
    from attlas.flows.cli import main

    main()


if __name__ == "__main__":
    _, names, event, part, number, *arguments = sys.argv
    sys.argv = ["attlas", *arguments]
    main([signal.Signals[name] for name in names.split(",")], event, part, int(number))
