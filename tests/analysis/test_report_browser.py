"""The report in a real browser: it loads nothing, logs nothing, and its controls work."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attlas.analysis.report import write_report
from tests.analysis.synthetic import write_dataset

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="needs Debian's chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return Path(write_report(write_dataset(folder / "d", model_name="<script>window.hacked = 1</script>")))


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1200, "height": 900})
    page = context.new_page()
    events: dict[str, list[str]] = {"requests": [], "console": [], "errors": []}
    page.on("request", lambda request_: events["requests"].append(request_.url))
    page.on("requestfailed", lambda request_: events["errors"].append(request_.url))
    page.on("console", lambda message: events["console"].append(message.text))
    page.on("pageerror", lambda error: events["errors"].append(str(error)))
    page.goto(report.as_uri(), wait_until="load")
    yield page
    # in every test the page logged nothing and loaded nothing
    assert [url for url in events["requests"] if not url.startswith("data:")] == [report.as_uri()]
    assert (events["console"], events["errors"]) == ([], [])
    context.close()


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
