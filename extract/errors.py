"""Exception types that callers can tell apart, and pieces of their messages."""

from collections.abc import Iterator, Sequence


class Refusal(ValueError):
    """Input that is rejected before any work. The message states the rule, what was given, and what to do."""


class Busy(Refusal):
    """Another process or thread writes the output now."""


class AnotherRun(Refusal):
    """The output holds a different run."""


class Unfinished(RuntimeError):
    """A run of which some shards are not measured yet."""


class CaptureError(RuntimeError):
    """A model that attlas cannot observe correctly: a missing attention pattern, a violated residual identity."""


class ResidualWarning(UserWarning):
    """The residual stream of a model or of one of its stacks could not be read exactly and is left out."""


class Damaged(ValueError):
    """A file that exists but is not what was written. The message names the file and the reason."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all errors it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortlist(names: Sequence[str]) -> str:
    """The first three names and the number of the others, for messages."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
