"""What the package refuses, as types that callers can tell apart."""


class Refusal(ValueError):
    """An input that is refused before any work; the message states the rule, what came, and what to do."""


class CaptureError(RuntimeError):
    """A model that does not show what was asked of it: a missed pattern, a broken residual identity."""


class ResidualWarning(UserWarning):
    """The residual stream of a model, or of one of its stacks, could not be read exactly and is left out."""


def first_line(error: BaseException) -> str:
    """What an error says first; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Damaged(ValueError):
    """A file that is there and is not what was written; the message names it and says why."""
