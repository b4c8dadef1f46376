from pathlib import Path

import polars as pl
import pytest

from attlas.analysis import attention_sinks, find_findings, head_kinds
from attlas.analysis.dataset import Dataset
from attlas.analysis.query import query
from tests.analysis.synthetic import write_dataset


def test_the_head_that_rests_is_named_with_its_share_and_interval(folder: Path) -> None:
    sinks = attention_sinks(Dataset.open(folder))
    assert sinks.filter("is_at_rest").select("layer", "head", "rests_on").rows() == [(0, 3, "first")]
    sql = "SELECT SUM(mass_first * query_rows) / SUM(query_rows) AS mass FROM heads WHERE layer = 0 AND head = 3"
    row = sinks.filter("is_at_rest").row(0, named=True)
    assert row["at_rest"] == pytest.approx(query(folder, sql)["mass"][0].as_py(), rel=1e-6)
    assert row["at_rest_low"] < row["at_rest"] < row["at_rest_high"]
    # the others are as they were: the same label as kinds and the same heads as findings
    kinds = head_kinds(Dataset.open(folder))
    assert sinks["is_at_rest"].to_list() == kinds["is_at_rest"].to_list()
    assert sinks["rest"].to_list() == kinds["rest"].to_list()
    assert find_findings(Dataset.open(folder)).filter(name="head at rest").height == 1


def test_whether_a_sink_writes_is_known_only_if_it_was_measured(folder: Path, tmp_path: Path) -> None:
    assert attention_sinks(Dataset.open(folder))["writes"].null_count() > 0
    measured = write_dataset(tmp_path / "d", lengths=(16, 34), statistics=("value_ratio_first",))
    sinks = attention_sinks(Dataset.open(measured))
    resting = sinks.filter("is_at_rest")
    assert resting["value_ratio_first"].null_count() == 0
    assert resting["writes"].to_list() == [ratio >= 1 for ratio in resting["value_ratio_first"]]
    assert not sinks.filter(~pl.col("is_at_rest"))["writes"].any()


def test_short_sequences_cannot_tell(tmp_path: Path) -> None:
    short = write_dataset(tmp_path / "d", lengths=(5, 9))
    sinks = attention_sinks(Dataset.open(short))
    assert (
        sinks["at_rest"].null_count() == 0 and sinks["is_at_rest"].is_null().all() and sinks["writes"].is_null().all()
    )
    assert find_findings(Dataset.open(short)).filter(name="head at rest").is_empty()
