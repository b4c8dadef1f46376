"""Redaction: the dataset becomes the one that a run in the lower mode writes, whenever it is killed."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.query import query
from attlas.analysis.verify import verify
from attlas.extract import redact as module
from attlas.extract.errors import Refusal
from attlas.extract.redact import MODES, redact
from attlas.extract.run import run
from attlas.extract.store import CARD, MANIFEST, LocalFolder
from tests.extract.runs import contents

CORPUS = ["The cat sat on the mat.", "A secret word: xyzzy, 42 times!", "The cat and the mat, and the cat again. " * 30]


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run in each mode, with several shards and every statistic."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    options = {"model": str(model), "corpus": str(folder / "corpus.txt"), "unit": "line", "statistics": "all"}
    for mode in MODES:
        run(**options, out=folder / mode, tokens=mode, max_length=32, shard_sequences=4)
    return {mode: folder / mode for mode in MODES}


def rows_of(root: Path) -> dict[str, list[object]]:
    """The rows of every table, part by part, in the order of the manifest."""
    dataset = Dataset.open(root)
    return {name: [pq.read_table(root / part.path) for part in dataset.parts(name)] for name in dataset.tables}


def manifest_of(root: Path) -> dict[str, object]:
    """The manifest without what names and checksums of parts decide."""
    manifest = json.loads((root / MANIFEST).read_text())
    for facts in manifest["tables"].values():
        facts["parts"] = [part["rows"] for part in facts["parts"]]
    return manifest


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_a_redacted_dataset_is_that_of_a_run_in_the_lower_mode(
    measured: dict[str, Path], tmp_path: Path, before, after
) -> None:
    root = Path(shutil.copytree(measured[before], tmp_path / "d"))
    if MODES.index(after) > MODES.index(before):
        with pytest.raises(Refusal, match=f"has {before}, and {after} would need the corpus"):
            redact(root, tokens=after)
        assert manifest_of(root) == manifest_of(measured[before])
        return
    (root / "report.html").write_text("xyzzy")
    redact(root, tokens=after)
    assert rows_of(root) == rows_of(measured[after])
    assert manifest_of(root) == manifest_of(measured[after])
    assert (root / CARD).read_text() == (measured[after] / CARD).read_text()
    assert verify(root) == []
    assert not (root / "report.html").exists()
    assert redact(root, tokens=after) == []


def test_no_word_of_the_corpus_is_left_in_any_file(measured: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(measured["text"], tmp_path / "d"))
    assert "xyzzy" in str(query(root, "SELECT text FROM sequences").to_pydict())
    redact(root, tokens="classes")
    assert {"token_ids", "text"}.isdisjoint(Dataset.open(root).part_schema("sequences").names)
    for file in (path for path in root.rglob("*") if path.is_file()):
        content = pq.read_table(file).to_pylist() if file.suffix == ".parquet" else file.read_text()
        assert "xyzzy" not in str(content), file


class Killed(BaseException):
    """What a process does no more after."""


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("after", ["classes", "none"])
def test_killed_at_any_write_it_is_old_or_new_and_the_same_call_finishes_it(
    measured: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after
) -> None:
    """Killed before and after every change to the folder; writing and deleting a file is atomic."""
    step = 0
    is_new = set()
    undisturbed = Path(shutil.copytree(measured["text"], tmp_path / after))
    redact(undisturbed, tokens=after)
    assert verify(undisturbed) == []
    whole = contents(undisturbed)
    while True:
        step += 1
        root = Path(shutil.copytree(measured["text"], tmp_path / f"{after}-{step}"))
        with monkeypatch.context() as patched:
            if not killed_at(step, patched, root, after):
                break
        now = rows_of(root)
        assert now in (rows_of(measured["text"]), rows_of(measured[after])), step
        is_new.add(now == rows_of(measured[after]))
        redact(root, tokens=after)
        assert contents(root) == whole, step
        shutil.rmtree(root)
    assert is_new == {False, True}
    assert step > 5


def killed_at(step: int, patched: pytest.MonkeyPatch, root: Path, after) -> bool:
    """Redact until so many changes have been made; whether there were so many."""
    left = step

    def counted(name: str) -> None:
        original = getattr(LocalFolder, name)

        def change(self: LocalFolder, key: str, *rest: bytes):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return original(self, key, *rest)

        patched.setattr(LocalFolder, name, change)

    for name in ("put", "writing", "delete"):
        counted(name)
    try:
        module.redact(root, tokens=after)
    except Killed:
        return True
    return False


def test_an_unfinished_run_and_an_unknown_mode_are_refused(measured: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="only a finished dataset is redacted"):
        redact(tmp_path, tokens="none")
    with pytest.raises(Refusal, match="tokens must be one of none, classes, ids, text; got 'nothing'"):
        redact(measured["text"], tokens="nothing")  # pyright: ignore[reportArgumentType]
