"""The report in a real browser: it loads nothing, logs nothing, and its controls work."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import head_means
from attlas.analysis.report import write_report
from tests.analysis.synthetic import enlarged, write_dataset
from tests.chromium import BROWSER_TESTS, opened_page

pytestmark = BROWSER_TESTS
NAME = "<script>window.hacked = 1</script>"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("browser") / "d", lengths=(16, 34), model_name=NAME)


@pytest.fixture(scope="module")
def report(dataset: Path) -> Path:
    return Path(write_report(dataset))


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    with opened_page(browser, report, scheme=request.param) as page:
        page.wait_for_selector("body.ready.drawn")
        yield page


def fills(page: Any) -> list[str]:
    """The colours of the map's cells."""
    return page.evaluate(
        "[...document.querySelectorAll('#map .chart svg .mark-rect.role-mark path')].map(cell => cell.getAttribute('fill'))"
    )


def saved(page: Any, selector: str) -> bytes:
    with page.expect_download() as download:
        page.locator(selector).first.click()
    return Path(download.value.path()).read_bytes()


def test_it_opens_with_its_name_escaped_and_all_charts_drawn(page: Any) -> None:
    assert page.locator("h1").inner_text() == NAME
    assert page.evaluate("window.hacked") is None
    assert page.locator(".chart").count() == page.locator(".chart.drawn").count() > 10


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Any, report: Path, width: int) -> None:
    with opened_page(browser, report, scheme="light", width=width) as page:
        page.wait_for_selector("body.ready.drawn")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_picker_changes_the_map_its_scale_its_meaning_and_its_code(page: Any) -> None:
    before = fills(page)
    assert len([fill for fill in before if fill.startswith("var(--r")]) == 8  # a cell for each head
    page.locator("#column").select_option("mass_first")
    page.wait_for_function(
        "before => [...document.querySelectorAll('#map .chart svg .mark-rect.role-mark path')].map(c => c.getAttribute('fill')).join() !== before",
        arg=",".join(before),
    )
    assert "first token" in page.locator("#meaning").inner_text()
    assert page.locator("#low").inner_text() == "0"
    code = page.locator("#map .code code")
    assert '["mass_first"]' in code.nth(1).text_content() or '["mass_first"]' in code.first.text_content()
    assert "SUM(mass_first * query_rows)" in page.locator("#map .code").text_content()
    page.locator("#column").select_option("offset_tokens")
    page.wait_for_function(
        "[...document.querySelectorAll('#map .chart svg .mark-rect.role-mark path')].some(c => c.getAttribute('fill').startsWith('var(--d'))"
    )
    assert "−" in page.locator("#low").inner_text()


def test_a_chosen_head_is_shown_by_every_list_and_chart_until_escape(page: Any, dataset: Path) -> None:
    def circled() -> int:
        return page.evaluate(
            'document.querySelectorAll(\'#rest path[stroke="var(--accent)"], #kinds path[stroke="var(--accent)"]\').length'
        )

    assert circled() == 0
    page.locator("#heads tbody tr[data-head='2'] button").click()
    page.wait_for_function("document.querySelectorAll('#kinds path[stroke=\"var(--accent)\"]').length > 1")
    assert page.locator("#head h3").inner_text() == "L0H2"
    means = head_means(Dataset.open(dataset)).filter(layer=0, head=2)
    shown = page.locator("#head dt:has-text('distance_tokens') + dd").inner_text()
    assert shown.startswith(f"{means['distance_tokens'][0]:.1f}"[:2])
    assert page.locator("#heads tr.on").count() == 1
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelectorAll('#kinds path[stroke=\"var(--accent)\"]').length === 0")
    assert page.locator(".on").count() == 0


def test_a_click_and_the_arrow_keys_choose_heads_on_the_map(page: Any) -> None:
    cell = page.locator("#map .chart svg .mark-rect.role-mark path").first
    cell.click()
    assert page.locator("#head h3").inner_text() == "L0H0"
    page.locator("#map .scroll-x").first.focus()
    for key, label in (("ArrowRight", "L0H1"), ("ArrowDown", "L1H1"), ("ArrowDown", "L1H1"), ("ArrowLeft", "L1H0")):
        page.keyboard.press(key)
        assert page.locator("#head h3").inner_text() == label
    page.locator("#head [data-column='mass_self']").click()
    assert page.locator("#column").input_value() == "mass_self"


def test_the_table_sorts_by_number_and_filters_by_kind(page: Any) -> None:
    def values() -> list[float]:
        texts = page.evaluate(
            "[...document.querySelectorAll('#heads tbody tr')].map(row => row.cells[5].firstChild.data)"
        )
        return [float(text.replace("−", "-")) for text in texts]

    button = "#heads button[data-sort=entropy_nats]"
    page.locator(button).click()
    assert values() == sorted(values()) and len(set(values())) > 4
    assert page.evaluate("document.activeElement.dataset.sort") == "entropy_nats"
    page.keyboard.press("Enter")
    assert values() == sorted(values(), reverse=True)
    page.locator("#filter").fill("previous")
    assert page.locator("#heads tbody tr").count() == 1 and page.locator("#counted").inner_text() == "1 of 1 heads"
    page.locator("#filter").fill("")
    page.locator("#all-columns").click()
    assert page.locator("#heads thead th").count() > 30


def test_all_heads_are_saved_as_csv_with_every_column(page: Any, dataset: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(saved(page, "#save-heads").decode())))
    means = head_means(Dataset.open(dataset)).sort("stack", "layer", "head")
    assert [float(row["entropy_nats"]) for row in rows] == pytest.approx(means["entropy_nats"].to_list(), rel=1e-6)
    assert {"mass_first_half", "kind", "label"} <= rows[0].keys()


def test_the_data_and_the_picture_of_a_chart_are_saved(page: Any) -> None:
    frame = pl.read_csv(saved(page, "#distance [data-save=csv]"))
    assert frame.height > 50 and {"label", "bin", "ratio", "opportunity"} <= set(frame.columns)
    for selector in ("#entropy [data-save=png]", "#similarity [data-save=png]"):
        picture = saved(page, selector)
        assert picture.startswith(b"\x89PNG\r\n") and len(picture) > 3_000


def test_a_name_that_a_spreadsheet_would_run_is_saved_as_text(page: Any) -> None:
    assert page.evaluate("charts.csvOf([{ name: '=1+1', value: -1.5 }])") == "name,value\r\n'=1+1,-1.5\r\n"


def test_the_theme_changes_and_charts_with_it(page: Any) -> None:
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = paper()
    page.locator("#theme").click()
    assert paper() != before
    page.locator("#theme").click()
    assert paper() == before


def test_a_point_tells_its_numbers(page: Any) -> None:
    page.locator("#map .chart svg .mark-rect.role-mark path").nth(3).hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    text = page.locator("#vg-tooltip-element").inner_text()
    assert "L0H3" in text and "mean" in text and "±" in text


@pytest.mark.parametrize(("layers", "heads", "megabytes"), [(6, 12, 3), (30, 9, 3), (80, 64, 10)])
def test_a_page_of_any_size_is_drawn_and_answers(
    browser: Any, tmp_path: Path, layers: int, heads: int, megabytes: int
) -> None:
    small = write_dataset(tmp_path / "small", lengths=(16, 34), summaries=False)
    page_file = Path(write_report(enlarged(small, tmp_path / "large", layers=layers, heads=heads)))
    assert page_file.stat().st_size < megabytes * 1e6
    with opened_page(browser, page_file, scheme="light") as page:
        page.wait_for_selector("body.ready.drawn", timeout=120_000)
        assert page.locator(".chart").count() == page.locator(".chart.drawn").count()
        assert page.locator("#map .chart svg .mark-rect.role-mark path").count() >= layers * heads
        page.locator("#filter").fill(f"L{layers - 1}H{heads - 1}")
        page.locator("#heads tbody button").click()
        assert page.locator("#head h3").inner_text() == f"L{layers - 1}H{heads - 1}"
        # its layer is the one that the chart of distances shows
        page.wait_for_function(
            f"charts.figures.find(f => f.part).view.data('rows').every(row => row.layer === {layers - 1})"
        )
        page.locator("#column").select_option("mass_previous")
        page.wait_for_function("document.querySelector('#meaning').textContent.includes('token before')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200
