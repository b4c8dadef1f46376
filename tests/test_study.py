"""data/STUDY.md works as it is written: its Python blocks run one after the other, and print what it shows but for digits."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent / "data" / "STUDY.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", re.S)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")


@pytest.mark.slow
def test_the_study_runs_block_by_block_and_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("statsmodels")
    blocks = BLOCK.findall(STUDY.read_text("utf-8"))
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names: dict = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optimizers
            exec(code, names)
        assert words(printed.getvalue()) == words(shown), code


def words(text: str) -> list[str]:
    """Each line without its numbers and the width of its columns, because both depend on the machine."""
    return [" ".join(re.sub(r"[─┬┴┼═╪╞╡]+", "─", NUMBER.sub("0", line)).split()) for line in text.splitlines()]
