"""Standard output and error that print anything, whatever they are connected to."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator


def make_streams_safe() -> None:
    """Let no character, and no stream that the caller has closed, end a command."""
    _fill_closed_descriptors()
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fill_closed_descriptors() -> None:
    """Let no file that is opened later be 1 or 2, where libraries print to; a closed output is one that can't be written."""
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


def end_with_reader() -> None:
    """End without a word where the reader of the output goes away, as `head` does and every Unix filter then ends."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def outlive_reader() -> None:
    """Go on where the reader of the output goes away: what the command leaves is on disk, and it uses sockets."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def flush_output() -> OSError | None:
    """Write what is buffered for standard output; gives the error where that fails, and drops it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # else Python tries again at exit, and complains
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        return error
    return None


@contextlib.contextmanager
def reported_if_unwritten() -> Iterator[None]:
    """Say where standard output can't be written, and go on: what the command was for is done."""
    error: OSError | None = None
    try:
        yield
    except OSError as raised:
        error = raised
    error = flush_output() or error
    if error is not None and not isinstance(error, BrokenPipeError):
        say(f"standard output can't be written ({error.strerror}); all else is done")


def say(text: str) -> None:
    """A line on standard error, if it still goes anywhere."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
