"""Fixtures of the GPU tests; in a rehearsal kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import machine

if machine.IS_REHEARSAL:
    from tests.extract.test_triton import interpreted  # noqa: F401 - an autouse fixture


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    reason = machine.why_no_gpu()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _released_memory():
    """Tests in other processes need the GPU's memory too."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
