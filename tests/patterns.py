"""Attention patterns with known statistics, and their closed forms from the catalogue.

The letters are the catalogue's: U uniform, C causal uniform, I each token itself, P the previous token (row 0
itself), F the first token. Only C has a mask; the others see every key.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Pattern = tuple[NDArray[np.float64], NDArray[np.bool_]]
ClosedForm = Callable[[int], float]


def uniform(n: int) -> Pattern:
    return np.full((n, n), 1 / n), np.ones((n, n), dtype=bool)


def causal_uniform(n: int) -> Pattern:
    visible = np.tril(np.ones((n, n), dtype=bool))
    return visible / visible.sum(axis=1, keepdims=True), visible


def identity(n: int) -> Pattern:
    return np.eye(n), np.ones((n, n), dtype=bool)


def previous(n: int) -> Pattern:
    return np.eye(n)[np.maximum(np.arange(n) - 1, 0)], np.ones((n, n), dtype=bool)


def first(n: int) -> Pattern:
    return np.eye(n)[np.zeros(n, dtype=int)], np.ones((n, n), dtype=bool)


PATTERNS: dict[str, Callable[[int], Pattern]] = {
    "U": uniform,
    "C": causal_uniform,
    "I": identity,
    "P": previous,
    "F": first,
}

# null for a sequence of one token, which has neither uncertainty nor distance
UNDEFINED_FOR_ONE_TOKEN = frozenset({"entropy_normalized", "distance_vs_uniform"})


def harmonic(n: int) -> float:
    """h = 1 + 1/2 + … + 1/n."""
    return math.fsum(1 / m for m in range(1, n + 1))


def _zero(n: int) -> float:
    return 0.0


def _one(n: int) -> float:
    return 1.0


def _share(n: int) -> float:
    return 1 / n


def _rest(n: int) -> float:
    return (n - 1) / n


def _harmonic_share(n: int) -> float:
    return harmonic(n) / n


def _neighbour(n: int) -> float:
    return (n - 1) / n**2


def _side(n: int) -> float:
    return (n - 1) / (2 * n)


def _two_rows(n: int) -> float:
    # rows 0 and 1 both attend to token 0; with one token there is only row 0, and 2/n becomes 1
    return min(2, n) / n


def _second_row(n: int) -> float:
    # row 1 attends to token 0, its previous one; with one token there is no row 1, and 1/n becomes 0
    return 0.0 if n == 1 else 1 / n


def _previous_received_entropy(n: int) -> float:
    # p̄ is 2/n on token 0, 1/n on tokens 1 … n − 2 and 0 on the last.
    return 0.0 if n == 1 else math.log(n) - 2 / n * math.log(2)


def _previous_rank(n: int) -> float:
    # σ² is 2 once, for rows 0 and 1 that both attend to token 0, 1 for n − 2 rows and 0 once: exp(ln n − 2/n · ln 2)
    return 1.0 if n == 1 else n * 4 ** (-1 / n)


def _uniform_spread(n: int) -> float:
    return math.sqrt((n**2 - 1) / 12)


def _causal_spread(n: int) -> float:
    return math.fsum(_uniform_spread(m) for m in range(1, n + 1)) / n


CLOSED_FORMS: dict[str, dict[str, ClosedForm]] = {
    "entropy_nats": {"U": math.log, "C": lambda n: math.lgamma(n + 1) / n, "I": _zero, "P": _zero, "F": _zero},
    "entropy_std_nats": {"U": _zero, "I": _zero, "P": _zero, "F": _zero},
    "entropy_normalized": {"U": _one, "C": _one, "I": _zero, "P": _zero, "F": _zero},
    "attended_keys": {"U": float, "C": lambda n: (n + 1) / 2, "I": _one, "P": _one, "F": _one},
    "collision_probability": {"U": _share, "C": _harmonic_share, "I": _one, "P": _one, "F": _one},
    "max_weight": {"U": _share, "C": _harmonic_share, "I": _one, "P": _one, "F": _one},
    "distance_tokens": {
        "U": lambda n: (n**2 - 1) / (3 * n),
        "C": lambda n: (n - 1) / 4,
        "I": _zero,
        "P": _rest,
        "F": lambda n: (n - 1) / 2,
    },
    "offset_tokens": {
        "U": _zero,
        "C": lambda n: -(n - 1) / 4,
        "I": _zero,
        "P": lambda n: -(n - 1) / n,
        "F": lambda n: -(n - 1) / 2,
    },
    "offset_std_tokens": {"U": _uniform_spread, "C": _causal_spread, "I": _zero, "P": _zero, "F": _zero},
    "distance_vs_uniform": {
        "U": _one,
        "C": _one,
        "I": _zero,
        "P": lambda n: 3 / (n + 1),
        "F": lambda n: 3 * n / (2 * (n + 1)),
    },
    "mass_self": {"U": _share, "C": _harmonic_share, "I": _one, "P": _share, "F": _share},
    "mass_previous": {"U": _neighbour, "C": lambda n: (harmonic(n) - 1) / n, "I": _zero, "P": _rest, "F": _second_row},
    "mass_next": {"U": _neighbour, "C": _zero, "I": _zero, "P": _zero, "F": _zero},
    "mass_backward": {"U": _side, "C": lambda n: 1 - _harmonic_share(n), "I": _zero, "P": _rest, "F": _rest},
    "mass_forward": {"U": _side, "C": _zero, "I": _zero, "P": _zero, "F": _zero},
    "mass_first": {"U": _share, "C": _harmonic_share, "I": _share, "P": _two_rows, "F": _one},
    "received_entropy_nats": {"U": math.log, "I": math.log, "F": _zero},
    "mutual_information_nats": {"U": _zero, "I": math.log, "P": _previous_received_entropy, "F": _zero},
    "received_max": {"U": _share, "C": _harmonic_share, "I": _share, "P": _two_rows, "F": _one},
    "sink_keys": {
        "U": lambda n: n if n < 4 else 0,
        "I": lambda n: n if n < 4 else 0,
        "P": lambda n: 0 if n > 6 else 2 if n == 3 else 1,
        "F": _one,
    },
    "mean_log_self": {
        "U": lambda n: -math.log(n),
        "C": lambda n: -math.lgamma(n + 1) / n,
        "I": _zero,
        "P": _zero,  # of row 0 alone
        "F": _zero,
    },
    "pattern_effective_rank": {"U": _one, "I": float, "P": _previous_rank, "F": _one},
    "received_max_key": {"C": _zero, "P": _zero, "F": _zero},
}


def closed_form(column: str, letter: str, n: int) -> float | None:
    """The value of a column for a pattern of n tokens; None if it is null."""
    if n == 1 and column in UNDEFINED_FOR_ONE_TOKEN:
        return None
    return CLOSED_FORMS[column][letter](n)
