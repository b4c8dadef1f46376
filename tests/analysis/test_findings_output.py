"""Findings of `verify` as text, JSON and JUnit XML, and the facts of `info` as JSON."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.findings_output import FORMATS, write_findings
from attlas.analysis.info import facts_as_json
from attlas.analysis.verify import findings_in
from tests.analysis.synthetic import write_dataset

HEADS = "heads/shard-00000.parquet"


@pytest.fixture
def damaged(tmp_path: Path) -> Dataset:
    """One part has a flipped byte, and one file is in no manifest."""
    root = write_dataset(tmp_path / "d", documents=4, layers=1, heads=3)
    raw = bytearray((root / HEADS).read_bytes())
    raw[100] ^= 1
    (root / HEADS).write_bytes(raw)
    (root / "left\x1b.tmp").write_bytes(b"")
    return Dataset.open(root)


def written(dataset: Dataset, form) -> str:
    stream = io.BytesIO()
    write_findings(dataset, findings_in(dataset), form, stream)
    return stream.getvalue().decode()


def suites_of(xml: str) -> dict[str, ElementTree.Element]:
    return {suite.attrib["name"]: suite for suite in ElementTree.fromstring(xml)}


def test_an_intact_dataset_has_a_passed_case_for_each_part(folder: Path) -> None:
    dataset = Dataset.open(folder)
    suites = suites_of(written(dataset, "junit"))
    assert suites.keys() == {*dataset.tables, "dataset"}
    for table in dataset.tables:
        names = [case.attrib["name"] for case in suites[table]]
        assert names == [part.path for part in dataset.parts(table)]
        assert (suites[table].attrib["failures"], list(suites[table].iter("failure"))) == ("0", [])


def test_a_finding_is_a_failed_case_in_the_suite_of_its_table(damaged: Dataset) -> None:
    suites = suites_of(written(damaged, "junit"))
    (failed,) = (case for case in suites["heads"] if len(case))
    assert failed.attrib["name"] == f"{HEADS}: checksum"
    assert "SHA-256" in failed[0].attrib["message"]
    assert {name for name, suite in suites.items() if suite.attrib["failures"] != "0"} == {"heads", "dataset"}
    assert [case.attrib["name"] for case in suites["dataset"] if len(case)] == [r"left\x1b.tmp: stray file"]


def test_json_has_every_finding_with_its_part_and_check(damaged: Dataset) -> None:
    result = json.loads(written(damaged, "json"))
    assert (result["valid"], result["dataset"]) == (False, damaged.storage.place())
    assert result["findings"] == [
        {"part": f.part, "check": f.check, "message": f.message} for f in findings_in(damaged)
    ]


def test_json_of_an_intact_dataset_counts_the_parts_that_were_checked(folder: Path) -> None:
    dataset = Dataset.open(folder)
    result = json.loads(written(dataset, "json"))
    parts = sum(len(dataset.parts(table)) for table in dataset.tables)
    assert (result["valid"], result["findings"], result["parts"]) == (True, [], parts)


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_passes_control_characters_on(damaged: Dataset, form) -> None:
    assert "\x1b" not in written(damaged, form)


def test_facts_as_json_are_the_manifest_with_parts_counted(folder: Path) -> None:
    dataset = Dataset.open(folder)
    facts = json.loads(facts_as_json(dataset.manifest))
    assert {k: v for k, v in facts.items() if k != "tables"} == {
        k: v for k, v in dataset.manifest.items() if k != "tables"
    }
    for table, of_table in facts["tables"].items():
        parts = dataset.parts(table)
        rows = dataset.manifest["tables"][table]["rows"]
        assert of_table["rows"] == rows
        assert (of_table["parts"], of_table["bytes"]) == (len(parts), sum(part.bytes for part in parts))
