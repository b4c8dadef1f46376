"""Results as JUnit XML, which continuous-integration servers show: a test for each place, of a suite for each column."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from attlas.extract.printable import printable


@dataclass(frozen=True)
class Case:
    """A test: its suite, its name, and what came out."""

    suite: str
    name: str
    outcome: Literal["passed", "failed", "skipped"]
    message: str = ""


def junit_xml(name: str, cases: Iterable[Case]) -> bytes:
    """The cases as one XML document."""
    suites: dict[str, list[Case]] = {}
    for case in cases:
        suites.setdefault(case.suite, []).append(case)
    root = ElementTree.Element("testsuites", name=name)
    for suite, of_suite in suites.items():
        element = ElementTree.SubElement(root, "testsuite", {"name": printable(suite), **_counts(of_suite)})
        for case in of_suite:
            test = ElementTree.SubElement(element, "testcase", classname=printable(suite), name=printable(case.name))
            if case.outcome != "passed":
                tag = "failure" if case.outcome == "failed" else "skipped"
                ElementTree.SubElement(test, tag, message=printable(case.message))
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _counts(cases: list[Case]) -> dict[str, str]:
    outcomes = [case.outcome for case in cases]
    return {
        "tests": str(len(cases)),
        "failures": str(outcomes.count("failed")),
        "skipped": str(outcomes.count("skipped")),
    }
