"""Random numbers of a model's own code, made reproducible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_rng() -> Iterator[None]:
    """Seed torch's random number generators with 0, and restore the caller's state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
