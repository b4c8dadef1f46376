"""Random numbers of a model's own code, made reproducible."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def fixed_rng() -> Iterator[None]:
    """Seed torch's random number generators with 0, and restore the caller's state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def rng_preserved(device: torch.device) -> Iterator[None]:
    """Restore the states of all random number generators that a model on this device may use."""
    states = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device.index or 0]
    try:
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
