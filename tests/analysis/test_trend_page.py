"""The page of a trend: self-contained, escaped, small, with one copy of Vega and a strict policy."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import altair as alt
import polars as pl
import pytest

from attlas.analysis.report.charts import chart_fragment, content_security_policy, runtime
from attlas.analysis.report.trend_page import render_trend
from attlas.analysis.series import Series
from attlas.analysis.trend import VALUE, Trend, trend
from attlas.flows.cli import exit_code
from tests.analysis.synthetic import write_dataset

HOSTILE = "step-1<script>window.hacked = 1<"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_dataset(folder / "step-0", documents=4, model_name="<script>window.hacked = 1</script>")
    for name in (HOSTILE, "step-2"):
        shutil.copytree(folder / "step-0", folder / name)
    return folder


@pytest.fixture(scope="module")
def found(runs: Path) -> Trend:
    return trend([runs / name for name in ("step-0", HOSTILE, "step-2")])


@pytest.fixture(scope="module")
def page(found: Trend) -> str:
    return render_trend(found)


def scripts(page: str) -> list[str]:
    """The scripts of a page that run."""
    return re.findall(r"<script>(.*?)</script>", page, re.DOTALL)


def test_the_policy_lets_only_the_runtime_run(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    (script,) = scripts(page)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy[1]
    assert "default-src 'none'" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert "'unsafe-inline'" not in policy[1].replace("style-src 'unsafe-inline'", "")


def test_there_is_one_runtime_for_all_charts(page: str) -> None:
    assert page.count('<figure class="chart"') == 2  # heads, and sites
    assert page.count("vegaEmbed") == runtime().count("vegaEmbed")
    assert "BSD 3-Clause" in page


def test_names_from_the_data_are_escaped(page: str) -> None:
    assert "<script>window" not in page
    assert "&lt;script&gt;window.hacked = 1" in page
    texts = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert len(texts) == 2
    assert all("<" not in text for text in texts)
    words = json.loads(texts[0])["data"]["rows"]["values"][1]["words"]
    assert words == ["step-0", HOSTILE, "step-2"]


def test_a_chart_takes_little_more_than_its_numbers() -> None:
    frame = pl.DataFrame({"x": [0.123456789, 2.0, None, float("inf")], "word": ["a", "b", "a", None]})
    fragment = chart_fragment(alt.Chart(alt.NamedData("rows")).mark_line(), {"rows": frame}, label='a "chart"')
    assert 'aria-label="a &#34;chart&#34;"' in fragment
    content = json.loads(fragment.partition('application/json">')[2].partition("</script>")[0])
    assert content["data"]["rows"] == {
        "names": ["x", "word"],
        "values": [[0.1234568, 2, None, None], {"words": ["a", "b"], "codes": [0, 1, 0, None]}],
    }
    assert content["spec"]["config"]["view"]["stroke"] == "var(--line)"


def test_the_runtime_is_the_same_each_time() -> None:
    assert runtime() == runtime()
    assert content_security_policy() == content_security_policy()


def large(found: Trend, *, layers: int, heads: int, steps: int) -> Trend:
    """The same numbers for more heads and steps, each with all its digits."""
    rows = found.rows.filter(pl.col("head").is_not_null(), step=0, layer=0, head=0).drop("step", "layer", "head")
    places = pl.DataFrame({"layer": range(layers)}).join(pl.DataFrame({"head": range(heads)}), how="cross")
    rows = rows.join(places, how="cross").join(pl.DataFrame({"step": range(0, 1000 * steps, 1000)}), how="cross")
    noise = pl.Series(range(rows.height)) * 1e-7 + 1.2345678
    rows = rows.with_columns(
        pl.col("estimate", "low", "high") * noise, difference=noise, q=noise, change=pl.lit("changed")
    )
    first = found.series.members[0]
    members = tuple(replace(first, step=1000 * number) for number in range(steps))
    return replace(
        found,
        rows=rows.select(pl.col(name).cast(kind) for name, kind in VALUE.items()),
        columns=tuple(rows["column"].unique(maintain_order=True)),
        series=Series(members, has_steps=True, notes=()),
    )


def test_a_page_of_144_heads_and_20_steps_has_at_most_3_mb(found: Trend) -> None:
    big = large(found, layers=12, heads=12, steps=20)
    assert big.rows.height == 144 * 20 * 5
    assert len(render_trend(big).encode()) < 3e6


def test_the_command_writes_the_page(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "trend.html"
    assert (
        exit_code(["trend", str(runs / "step-0"), str(runs / "step-2"), "--format", "html", "--output", str(page)]) == 0
    )
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "Nothing changed beyond its margin." in text
    assert "No entropy collapse, no large logits." in text
