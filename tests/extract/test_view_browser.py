"""The page of one input in a real browser, small and large: what it shows is what Python computed, and it works by keyboard."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from attlas.extract.view import View, view, view_named
from tests.chromium import BROWSER_TESTS, opened_page
from tests.extract.test_images import PREPROCESSOR, vision_model
from tests.extract.test_view import HOSTILE, weights_of

pytestmark = BROWSER_TESTS

TEXT = "Attention heads look around, unbelievably often; </script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def shown() -> View:
    return view_named("demo", TEXT, device="cpu")


@pytest.fixture(scope="module")
def file(shown: View, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return View(shown.content, model=HOSTILE, given=shown.given).save(tmp_path_factory.mktemp("view") / "page.html")


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Any]:
    with opened_page(browser, file, scheme=request.param) as page:
        wait_until_drawn(page)
        yield page


def wait_until_drawn(page: Any) -> None:
    page.wait_for_selector("body[data-ready]", timeout=60_000)


def wait_for_head(page: Any, name: str) -> None:
    page.wait_for_function("name => document.body.dataset.shown === name", arg=name)


def point_at(page: Any, query: int, key: int) -> str:
    """The tooltip of a weight of the pattern."""
    page.locator("#matrix").scroll_into_view_if_needed()
    x, y = page.evaluate(
        """([query, key]) => {
          const box = matrix.surface.getBoundingClientRect();
          return [box.left + matrix.left + (key + 0.5) * matrix.cell, box.top + matrix.top + (query + 0.5) * matrix.cell];
        }""",
        [query, key],
    )
    page.mouse.move(x, y)
    return page.locator("#tip").inner_text()


def weight_text(weight: float, digits: int) -> str:
    """A weight as the page prints it."""
    if weight == 0:
        return "0"
    if weight >= 1e-4:
        decade = int(f"{weight:e}".partition("e")[2])
        return f"{weight:.{digits - 1 - decade}f}"
    mantissa, _, decade = f"{weight:.1e}".partition("e")
    return f"{mantissa}e{int(decade)}"


def test_it_opens_with_its_texts_escaped(page: Any) -> None:
    assert page.locator("h1").inner_text().startswith("</script><img src=x onerror=alert(1)>")
    assert "<img src=x onerror=alert(1)>" in page.locator(".lead").inner_text()
    assert page.locator("img").count() == 0
    assert page.locator("#failure").is_hidden()


def test_pointing_at_a_weight_gives_it_exactly(page: Any, shown: View) -> None:
    labels = shown.content.layers[0].queries.labels
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    wait_for_head(page, "L1H1")
    pattern = weights_of(shown, 1, 1)
    for query, key in ((0, 0), (3, 1), (7, 12), (len(labels) - 1, 2)):
        tip = point_at(page, query, key).splitlines()
        assert tip == [
            f"“{labels[query]}” ({query}) → “{labels[key]}” ({key})",
            weight_text(pattern[query, key], shown.content.digits),
        ]


def test_the_keyboard_moves_between_heads(page: Any) -> None:
    wait_for_head(page, "L0H0")
    for key, name in (
        ("ArrowRight", "L0H1"),
        ("ArrowDown", "L1H1"),
        ("End", "L1H11"),
        ("ArrowRight", "L1H11"),
        ("ArrowUp", "L0H11"),
        ("Home", "L0H0"),
        ("ArrowUp", "L0H0"),
    ):
        page.keyboard.press(key)
        wait_for_head(page, name)
    assert page.locator("#head-name").inner_text() == "L0H0"
    # keys pressed while a head is being decoded are not lost
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    wait_for_head(page, "L5H0")
    assert page.locator("#layer").input_value() == "5"
    assert page.evaluate("location.hash") == "#encoder.L5H0"


def test_the_keyboard_reads_single_weights(page: Any, shown: View) -> None:
    pattern = weights_of(shown, 0, 0)
    for key in ("Shift+ArrowDown", "Shift+ArrowDown", "Shift+ArrowRight"):
        page.keyboard.press(key)
    expected = weight_text(pattern[1, 1], shown.content.digits)
    page.wait_for_function(
        "text => document.querySelector('#announcement').textContent.endsWith(`, ${text}`)", arg=expected
    )
    page.wait_for_function("text => document.querySelector('#token-facts').textContent.endsWith(text)", arg=expected)
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('#edges-note').textContent === 'of the head'")


def test_heads_are_chosen_by_click_and_by_controls(page: Any) -> None:
    x, y = page.evaluate("[GRID_LEFT + 3.5 * grids[0].step, GRID_TOP + 2.5 * grids[0].step]")
    page.locator("#grids .surface").click(position={"x": x, "y": y})
    wait_for_head(page, "L2H3")
    page.locator("#layer").select_option("4")
    wait_for_head(page, "L4H3")
    page.locator("#head").select_option("7")
    wait_for_head(page, "L4H7")


def test_the_list_has_the_strongest_edges(page: Any, shown: View) -> None:
    pattern = weights_of(shown, 0, 0)
    strongest = np.sort(pattern.ravel())[::-1]
    listed = page.locator("#edges .weight").all_inner_texts()
    assert len(listed) >= 8
    assert listed == [weight_text(weight, 4) for weight in strongest[: len(listed)]]


def test_a_token_tells_its_entropy_and_what_it_receives(page: Any, shown: View) -> None:
    layer = shown.content.layers[0]
    page.locator("#lines").scroll_into_view_if_needed()
    for x, words in (("lines.left / 2", layer.entropy[0, 0, 4]), ("lines.width - 20", layer.received[0, 0, 4])):
        place = page.evaluate(
            f"""(() => {{ const box = lines.panel.getBoundingClientRect();
            return [box.left + {x}, box.top + 5 + 4.5 * lines.row - lines.panel.scrollTop]; }})()"""
        )
        page.mouse.move(*place)
        assert f"{float(f'{words:.4g}'):g}" in page.locator("#tip").inner_text()


def test_the_stream_gives_exact_norms(page: Any, shown: View) -> None:
    site = shown.content.sites[2]
    page.locator("#stream").scroll_into_view_if_needed()
    place = page.evaluate(
        """(() => { const box = document.querySelector('#stream').getBoundingClientRect();
        return [box.left + stream.left + 3.5 * stream.cell, box.top + STREAM_TOP + 2.5 * stream.row]; })()"""
    )
    page.mouse.move(*place)
    tip = page.locator("#tip").inner_text().splitlines()
    assert tip[0] == f"“{site.axis.labels[3]}” (3) after L0 mlp"
    assert tip[1] == f"norm {float(f'{site.norms[3]:.4g}'):g}"


def assert_fits(page: Any, width: int) -> None:
    """In a window of this width nothing is wider, once the page has been laid out anew, which takes a busy machine longer."""
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(200)
    page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_is_wider_than_the_window(page: Any) -> None:
    for width in (1600, 1200, 700, 390):
        assert_fits(page, width)


def test_everything_drawn_has_a_name_for_screen_readers(page: Any) -> None:
    unnamed = page.evaluate(
        """[...document.querySelectorAll('[role=img], select, input, button')]
        .filter((e) => !e.closest('[hidden]') && !e.ariaLabel && !e.textContent && !e.labels?.length).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "layer"


def test_the_scale_changes_colours_and_no_number(page: Any) -> None:
    before = point_at(page, 2, 3)
    colours = "matrix.surface.firstElementChild.toDataURL()"
    drawn = page.evaluate(colours)
    page.keyboard.press("s")
    assert page.locator("#scale").input_value() == "log"
    assert page.evaluate(colours) != drawn
    assert point_at(page, 2, 3) == before


def test_a_notebooks_frame_shows_it(browser: Any, shown: View, tmp_path: Path) -> None:
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8>{shown._repr_html_()}", "utf-8")
    with opened_page(browser, tmp_path / "notebook.html", scheme="light") as page:
        frame = page.frame_locator("iframe")
        frame.locator("body[data-ready]").wait_for()
        frame.locator("#matrix").click(position={"x": 200, "y": 200})
        page.keyboard.press("ArrowRight")
        frame.locator("body[data-shown=L0H1]").wait_for()


# large inputs


@pytest.fixture(scope="module")
def long_input(tmp_path_factory: pytest.TempPathFactory) -> tuple[View, Path]:
    """512 tokens in 144 heads, in the shape of BERT-base."""
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=96, intermediate_size=96, vocab_size=500, attn_implementation="sdpa")
    shown = view(sharpened(transformers.BertModel(config)), input_ids=torch.randint(0, 500, (1, 512)))
    return shown, shown.save(tmp_path_factory.mktemp("long") / "page.html")


@pytest.fixture(scope="module")
def many_heads(tmp_path_factory: pytest.TempPathFactory) -> tuple[View, Path]:
    """128 tokens in 30 layers of 32 heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=500,
        attn_implementation="sdpa",
    )
    shown = view(sharpened(transformers.LlamaModel(config)), input_ids=torch.randint(0, 500, (1, 128)))
    return shown, shown.save(tmp_path_factory.mktemp("many") / "page.html")


def sharpened(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model.eval()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("size", "last"), [("long_input", "L11H11"), ("many_heads", "L29H31")])
def test_large_inputs_are_shown_exactly(
    request: pytest.FixtureRequest, browser: Any, size: str, last: str, scheme: str
) -> None:
    shown, path = request.getfixturevalue(size)
    with opened_page(browser, path, scheme=scheme, width=1440) as page:
        wait_until_drawn(page)
        page.evaluate("choose(heads.at(-1))")
        wait_for_head(page, last)
        pattern = weights_of(shown, len(shown.content.layers) - 1, shown.content.layers[0].heads - 1)
        last_token = len(pattern) - 1
        for query, key in ((last_token, 0), (last_token // 2, last_token // 3), (last_token, last_token)):
            tip = point_at(page, query, key).splitlines()
            assert tip[1] == weight_text(pattern[query, key], shown.content.digits)
        for width in (1440, 390):
            assert_fits(page, width)


# images


def test_what_a_patch_attends_to_is_laid_over_the_image(browser: Any, tmp_path: Path) -> None:
    vision_model("vit").save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    Image.new("RGB", (60, 40), (200, 100, 50)).save(tmp_path / "image.png")
    shown = view_named(str(tmp_path / "vit"), image=tmp_path / "image.png", device="cpu")
    pattern = weights_of(shown, 0, 0)
    with opened_page(browser, shown.save(tmp_path / "page.html"), scheme="light") as page:
        wait_until_drawn(page)
        page.locator("#picture").click(position={"x": 5, "y": 5})
        place = page.evaluate(
            """(() => { const box = document.querySelector('#picture').getBoundingClientRect();
            return [box.left + 2.5 * picture.w, box.top + 1.5 * picture.h]; })()"""
        )
        page.mouse.move(*place)
        assert page.locator("#tip").inner_text().splitlines() == [
            "row 0, column 0 (1) → row 1, column 2 (7)",
            weight_text(pattern[1, 7], 4),
        ]
        page.locator("#extras button").click()  # the class token
        page.wait_for_function("() => document.querySelector('#edges-note').textContent === 'of class (0)'")
        page.locator("#show-lines").click()
        assert page.locator("#picture").is_hidden() and page.locator("#lines").is_visible()
