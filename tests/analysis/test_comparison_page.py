"""The page of a comparison, as text and in a real browser: it loads nothing, logs nothing, and its maps can be asked."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from attlas.analysis.compare import compare
from attlas.analysis.report.comparison_page import render_comparison
from tests.analysis.synthetic import changed_copy, write_dataset
from tests.chromium import BROWSER_TESTS, opened_page

HOSTILE = "<script>window.hacked = 1</script>"
L1H2 = (pl.col("layer") == 1) & (pl.col("head") == 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One head's entropy changed; the model's name is hostile."""
    folder = tmp_path_factory.mktemp("comparison")
    base = write_dataset(folder / "a", documents=8, model_name=HOSTILE)
    shift = pl.when(L1H2).then(pl.col("entropy_nats") + 0.5).otherwise("entropy_nats").alias("entropy_nats")
    other = changed_copy(base, folder / "b", lambda rows: rows.with_columns(shift))
    (folder / "page.html").write_text(render_comparison(compare(base, other)))
    return folder / "page.html"


def test_the_page_is_small_has_a_strict_policy_and_escapes_names(file: Path) -> None:
    html = file.read_text()
    assert len(html) < 1_500_000
    assert "default-src 'none'" in html
    assert "unsafe-eval" not in html
    assert HOSTILE not in html
    assert "L1H2" in html


def test_a_comparison_by_depth_has_a_page_too(tmp_path: Path) -> None:
    a, b = (write_dataset(tmp_path / name, documents=4, layers=layers) for name, layers in (("a", 2), ("b", 3)))
    html = render_comparison(compare(a, b))
    assert (
        "Compared in bands of relative depth, over all heads, as two samples: the models have other layers or heads."
        in html
    )
    shutil.rmtree(b)


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Any]:
    with opened_page(browser, file, scheme=request.param) as page:
        page.locator(".chart.drawn").nth(1).wait_for()
        yield page


class TestInABrowser:
    pytestmark = BROWSER_TESTS

    def test_every_map_is_drawn_and_names_are_escaped(self, page: Any) -> None:
        assert page.locator("h1").inner_text() == f"{HOSTILE} on made up against {HOSTILE} on made up"
        assert page.locator(".chart.drawn").count() == page.locator(".chart").count() == 2
        assert page.evaluate("window.hacked") is None

    def test_the_changed_head_has_a_border_in_the_column_that_changed_alone(self, page: Any) -> None:
        heads = page.locator(".chart").first
        bordered = heads.locator("g.mark-rect path[stroke='var(--ink)']")
        assert heads.locator("select").input_value() == "entropy_nats"
        assert bordered.count() == 1
        assert "L1H2" in (bordered.first.get_attribute("aria-label") or "")
        heads.locator("select").select_option("mass_self")
        page.wait_for_timeout(300)
        assert bordered.count() == 0
