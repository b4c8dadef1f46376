"""The page of a trend in a real browser: it loads nothing, logs nothing, draws every chart, and its controls work."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from attlas.analysis.report.trend_page import render_trend
from attlas.analysis.trend import trend
from tests.analysis.synthetic import changed_copy, write_dataset
from tests.chromium import BROWSER_TESTS, opened_page

pytestmark = BROWSER_TESTS
L1H2 = (pl.col("layer") == 1) & (pl.col("head") == 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head collapses at the last step; the names of the first dataset and of the model are hostile."""
    folder = tmp_path_factory.mktemp("trend-browser")
    base = write_dataset(folder / "step-0", documents=8, model_name="<script>window.hacked = 1</script>")

    def collapse(rows: pl.DataFrame) -> pl.DataFrame:
        return rows.with_columns(
            pl.when(L1H2).then(pl.col(name) * 0.01).otherwise(name).alias(name)
            for name in ("entropy_nats", "entropy_normalized")
        )

    changed_copy(base, folder / "step-100", lambda rows: rows)
    changed_copy(base, folder / "step-200", collapse)
    shutil.move(base, folder / "step-0 <img src=x onerror=window.hacked=1>")
    page = folder / "trend.html"
    page.write_text(render_trend(trend(f"{folder}/step-*")))
    return page


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Any]:
    with opened_page(browser, file, scheme=request.param) as page:
        page.locator(".chart.drawn").nth(1).wait_for()
        yield page


def test_every_chart_is_drawn_and_names_are_escaped(page: Any) -> None:
    assert page.locator("h1").inner_text() == "How <script>window.hacked = 1</script> changes"
    assert page.locator(".chart.drawn").count() == page.locator(".chart").count() == 2
    assert page.locator(".chart").first.locator("g.mark-line path").count() == 8
    assert page.evaluate("window.hacked") is None


def test_changes_and_alerts_are_marked(page: Any) -> None:
    chart = page.locator(".chart").first
    marked = chart.locator(
        "g.mark-symbol path[aria-roledescription='circle'], g.mark-symbol path[aria-roledescription='point']"
    )
    assert marked.count() >= 1
    accents = [path.get_attribute("fill") for path in chart.locator("g.mark-symbol path").all()]
    assert accents.count("var(--accent)") == 0
    chart.locator("select").select_option("entropy_normalized")
    chart.locator("g.mark-symbol path[fill='var(--accent)']").wait_for()  # the collapse
    assert "entropy collapse" in page.locator("#alerts").inner_text()


def test_colours_follow_the_scheme(page: Any) -> None:
    line = page.evaluate("getComputedStyle(document.querySelector('.chart g.mark-line path')).stroke")
    scheme = "dark" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
    assert line == {"light": "rgb(47, 115, 168)", "dark": "rgb(108, 178, 232)"}[scheme]


def test_a_column_is_chosen_from_the_keyboard(page: Any) -> None:
    select = page.locator(".chart select").first
    before = page.locator(".chart").first.locator("g.mark-line path").first.get_attribute("d")
    select.focus()
    page.keyboard.press("ArrowDown")
    assert select.input_value() == "entropy_normalized"
    page.wait_for_timeout(200)
    assert page.locator(".chart").first.locator("g.mark-line path").first.get_attribute("d") != before


def test_pointing_at_a_line_shows_its_numbers(page: Any) -> None:
    chart = page.locator(".chart").first
    page.emulate_media(reduced_motion="reduce")  # else the page scrolls smoothly, away from under the pointer
    chart.scroll_into_view_if_needed()
    box = chart.locator("g.mark-rule.role-mark line").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    text = tip.inner_text()
    assert re.search(r"where\s+L0H0", text)
    assert "step-0 <img src=x onerror=window.hacked=1>" in text
    assert re.search(r"mean\s+0\.\d+", text)
    assert page.evaluate("window.hacked") is None


def test_nothing_is_wider_than_the_window(page: Any) -> None:
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
