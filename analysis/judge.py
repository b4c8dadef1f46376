"""Everything that the rules of defects and findings say of a dataset, in one frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

import polars as pl

from attlas.analysis.damage import refuse_if_damaged
from attlas.analysis.dataset import Dataset
from attlas.analysis.defects import DEFECTS, find_defects
from attlas.analysis.evidence import Evidence
from attlas.analysis.findings import FINDINGS, find_findings
from attlas.analysis.result import Format, write_result
from attlas.analysis.rules import rules_table

# for people; programs get every column
SHOWN = ("type", "name", "severity", "place", "value", "low", "high", "evidence")


@dataclass(frozen=True)
class Judgement:
    """`found`: the defects and the findings, a row each; `rules`: how many each rule found, or why it was not checked.

    Both have the column `type`, which is defect or finding.
    """

    found: pl.DataFrame
    rules: pl.DataFrame

    def count(self, type_: str) -> int:
        """The number of defects, or of findings."""
        return int((self.found["type"] == type_).sum())

    @property
    def not_checked(self) -> list[tuple[str, str]]:
        """The rules that were not checked, each with the reason."""
        return self.rules.filter(pl.col("not_checked").is_not_null()).select("name", "not_checked").rows()


def judge(dataset: Dataset, evidence: Evidence | None = None) -> Judgement:
    """Apply all rules. Raises Refusal for a damaged dataset. evidence: if it is at hand."""
    with refuse_if_damaged(dataset):
        known = Evidence(dataset) if evidence is None else evidence
        defects, findings = find_defects(dataset, evidence=known), find_findings(dataset, evidence=known)
        rules = [rules_table(DEFECTS, known, defects), rules_table(FINDINGS, known, findings)]
    types = pl.lit("defect").alias("type"), pl.lit("finding").alias("type")
    found, checked = (
        pl.concat([frame.select(type_, pl.all()) for type_, frame in zip(types, frames, strict=True)])
        for frames in ([defects, findings], rules)
    )
    return Judgement(found, checked)


def write_judgement(judgement: Judgement, format: Format, stream: IO[Any]) -> None:
    """Write the defects and findings: the columns SHOWN as a table for people, all of them as csv, json or parquet."""
    found = judgement.found.select(SHOWN) if format == "table" else judgement.found
    write_result(found.to_arrow(), format, stream, to_shorten="")
