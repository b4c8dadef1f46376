"""`attlas view`: it writes one page and says where, and bad input gives one line, exit code 2 and no file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.extract.checkpoints import TEXT, model_of, save
from tests.flows.conftest import Ended
from tests.flows.test_cli import refused

Attlas = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_becomes_a_page_in_this_folder(attlas: Attlas, tmp_path: Path) -> None:
    code, out, err = attlas("view", "demo", "The cat sat on the mat.", "--device", "cpu")
    assert (code, out, err) == (0, "view     view.html\n", "")
    page = (tmp_path / "view.html").read_text("utf-8")
    assert "demo (all-MiniLM-L6-v2)" in page and "The cat sat on the mat." in page
    # a page may replace a page, and nothing else unless it is named
    assert attlas("view", "demo", "Another.", "--device", "cpu")[0] == 0
    assert "Another." in (tmp_path / "view.html").read_text("utf-8")
    (tmp_path / "view.html").write_text("years of work")
    refused(attlas("view", "demo", "Another."), "view.html", "something else", "--out")
    assert (tmp_path / "view.html").read_text() == "years of work"


def test_a_file_becomes_the_same_page_as_its_text(attlas: Attlas, tmp_path: Path) -> None:
    model = save(model_of("bert"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    assert attlas("view", model, TEXT, "--out", "a.html")[0] == 0
    assert attlas("view", model, "--file", "text.txt", "--out", "b.html")[:2] == (0, "view     b.html\n")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo",), "got none"),
        (("demo", "words", "--file", "text.txt"), "got TEXT and --file"),
        (("demo", ""), "at least one token"),
        (("demo", "word " * 300), "has 302 tokens"),
        (("demo", "words", "--out", "folder"), "--out is a file that can be written; folder: Is a directory"),
        (("demo", "words", "--out", "nowhere/page.html"), "nowhere/page.html: No such file or directory"),
        (("demo", "--file", "nowhere.txt"), "there is none at nowhere.txt"),
        (("demo", "--image", "image.png"), "an image needs a model that reads pixel_values"),
        (("demo", "words", "--stacks", "both"), "--stacks must be one of encoder, all; got 'both'"),
        (("demo", "--image", "image.png", "--stacks", "all"), "no tokens for a decoder"),
        (("./nowhere", "words"), "there is no folder ./nowhere"),
        (("demo", "words", "--dtype", "int3"), "dtype must be one of"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    attlas: Attlas, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("words")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    before = written(tmp_path)
    refused(attlas("view", *arguments), words)
    assert written(tmp_path) == before
    assert written(tmp_path / "folder") == []
