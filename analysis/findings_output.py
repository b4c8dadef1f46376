"""Findings of `verify` as lines for people, as JSON, or as JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal

from attlas.analysis.dataset import Dataset
from attlas.analysis.integrity import Finding
from attlas.analysis.junit import Case, junit_xml
from attlas.analysis.output import write_whole
from attlas.extract.printable import printable
from attlas.extract.store import MANIFEST

Format = Literal["text", "json", "junit"]
FORMATS: tuple[Format, ...] = ("text", "json", "junit")
_OF_ALL = "dataset"  # the suite of findings that are of no table


def write_findings(dataset: Dataset, findings: Sequence[Finding], form: Format, stream: IO[Any]) -> None:
    """Write the findings of a dataset. Raises OutputError if the stream does not take everything."""
    if form == "junit":
        chunk = junit_xml("attlas verify", _cases(dataset, findings)) + b"\n"
    elif form == "json":
        chunk = _json(dataset, findings)
    else:
        chunk = _text(dataset, findings).encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")
    write_whole([chunk], stream)


def _text(dataset: Dataset, findings: Sequence[Finding]) -> str:
    if findings:
        return "".join(f"{printable(finding)}\n" for finding in findings)
    return f"{printable(dataset.storage.place())} is valid: all parts match the manifest, all invariants hold\n"


def _json(dataset: Dataset, findings: Sequence[Finding]) -> bytes:
    """`dataset`, `valid`, the number of `parts` that were checked, and the `findings`, each with `part`, `check` and `message`."""
    parts = sum(len(dataset.parts(table)) for table in dataset.tables)
    found = [{"part": f.part, "check": f.check, "message": f.message} for f in findings]
    result = {"dataset": dataset.storage.place(), "valid": not findings, "parts": parts, "findings": found}
    return json.dumps(result, indent=2).encode() + b"\n"


def _cases(dataset: Dataset, findings: Sequence[Finding]) -> Iterator[Case]:
    """A suite for each table: a failed case for each check that a part failed, a passed one for each part without findings."""
    messages: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        messages.setdefault((finding.part, finding.check), []).append(finding.message)
    with_findings = {part for part, _ in messages}
    for table in dataset.tables:
        parts = [part.path for part in dataset.parts(table)]
        yield from (Case(table, part, "passed") for part in parts if part not in with_findings)
    for (part, check), of_check in messages.items():
        yield Case(_suite(dataset, part), f"{part}: {check}", "failed", "; ".join(of_check))
    if MANIFEST not in with_findings:
        yield Case(_OF_ALL, MANIFEST, "passed")


def _suite(dataset: Dataset, part: str) -> str:
    """The table that a part is of: its folder."""
    folder = part.partition("/")[0]
    return folder if folder in dataset.tables else _OF_ALL
