"""Processes that tests start: the ports they get, and waiting for what they do."""

import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(is_so: Callable[[], T], *, seconds: float = 240, pause_s: float = 0.05) -> T:
    """Ask until the answer is true, and return it. An OSError counts as no; it is raised if it is the last answer. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := is_so():
                return answer
            failure = TimeoutError(f"it took longer than {seconds:g} s")
        except OSError as error:
            failure = error
        if time.monotonic() > deadline:
            raise failure
        time.sleep(pause_s)
