"""Make standard output and error robust against any character, closed streams and closed pipes."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator


def make_streams_safe() -> None:
    """Keep unencodable characters and closed streams from ending a command."""
    _fill_closed_descriptors()
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fill_closed_descriptors() -> None:
    """Reopen closed descriptors on the null device, so that no file opened later becomes standard output or error."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def _stream(number: int) -> io.TextIOWrapper:
    return open(number, "w", encoding="utf-8", closefd=False)


def exit_on_closed_pipe() -> None:
    """Exit silently when the reader of a pipe goes away, as Unix filters do before `head`."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def ignore_closed_pipe() -> None:
    """Continue when the reader of a pipe goes away: the command's results are on disk."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def flush_output() -> OSError | None:
    """Flush standard output; returns the error if that fails, and discards the output."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # otherwise Python tries again at exit and prints the error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        return error
    return None


@contextlib.contextmanager
def report_write_errors() -> Iterator[None]:
    """Report errors of standard output on standard error and continue, because the command's work is done."""
    error: OSError | None = None
    try:
        yield
    except OSError as raised:
        error = raised
    error = flush_output() or error
    if error is not None and not isinstance(error, BrokenPipeError):
        print_message(f"standard output can't be written ({error.strerror}); everything else is done")


def print_message(text: str) -> None:
    """Print a line to standard error, ignoring errors."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
