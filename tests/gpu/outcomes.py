"""A pytest plugin that writes the outcome of every test as a line of JSON, at once, to the file in ATTLAS_GPU_OUTCOMES.

With xdist only the process that the workers report to writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or not (report.when == "call" or report.outcome != "passed"):
        return
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    _write({"name": report.nodeid, "outcome": outcome, "seconds": report.duration, **_reason(report)})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and report.failed:
        _write({"name": report.nodeid, "outcome": "error", "seconds": 0.0, **_reason(report)})


def _reason(report: Any) -> dict[str, str]:
    """The last line of what went wrong, which names the error, and all of it."""
    if report.passed:
        return {}
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return {"message": str(report.longrepr[-1])}
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext
    message = crash.message if crash is not None else (text.strip().splitlines() or [""])[-1]
    return {"message": " ".join(message.split())[:600], "text": text[-6000:]}


def _write(outcome: dict[str, Any]) -> None:
    file = os.environ.get("ATTLAS_GPU_OUTCOMES")
    if file:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(outcome) + "\n")


def read_outcomes(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
