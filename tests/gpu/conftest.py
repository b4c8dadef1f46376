"""Fixtures of the GPU tests; in a rehearsal kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import time

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


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Release memory, which tests in other processes need too.

    After an illegal access every later call of a process fails: a worker of xdist ends, and another one takes its place.
    """
    if machine.IS_REHEARSAL or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            time.sleep(1)  # the report is on its way
            os._exit(1)
