"""The report in a real browser: it loads nothing, logs nothing, and its controls work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attlas.analysis.report import write_report
from tests.analysis.synthetic import write_dataset
from tests.chromium import BROWSER_TESTS, opened_page

pytestmark = BROWSER_TESTS


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    name = "<script>window.hacked = 1</script>"
    return Path(write_report(write_dataset(folder / "d", lengths=(16, 34), model_name=name)))


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    with opened_page(browser, report, scheme=request.param) as page:
        yield page


def test_it_opens_with_its_name_escaped(page: Any) -> None:
    assert page.locator("h1").inner_text() == "Where <script>window.hacked = 1</script> looks"
    assert page.evaluate("window.hacked") is None


def test_nothing_is_wider_than_the_window(page: Any) -> None:
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_chosen_head_is_marked_in_every_figure_until_escape(page: Any) -> None:
    page.locator(".plate[data-h='2']").click()
    marked = page.evaluate("[...document.querySelectorAll('.on')].map(mark => mark.dataset.h)")
    assert set(marked) == {"2"}
    assert len(marked) == page.locator("[data-h='2']").count() > 10
    page.keyboard.press("Escape")
    assert page.locator(".on").count() == 0


def test_the_table_sorts_by_number_and_filters_by_kind(page: Any) -> None:
    button = page.locator("#heads button[title=distance_tokens]")
    column = page.evaluate("document.querySelector('#heads button[title=distance_tokens]').closest('th').cellIndex")
    read = f"[...document.querySelectorAll('#heads tbody tr')].map(row => Number(row.cells[{column}].dataset.v))"
    button.click()
    assert page.evaluate(read) == sorted(page.evaluate(read))
    button.click()
    assert page.evaluate(read) == sorted(page.evaluate(read), reverse=True)
    page.locator("#filter").fill("previous")
    assert page.locator("#heads tbody tr:visible").count() == 1


def test_a_head_can_be_chosen_from_the_keyboard(page: Any) -> None:
    page.locator("#heads tbody button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".plate.on").count() == 1
