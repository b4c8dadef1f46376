"""What a run reads and what it writes stay apart, through symbolic links too."""

from collections.abc import Callable
from pathlib import Path

import pytest

from attlas.extract.errors import Refusal
from attlas.flows.checks import refuse_bad_paths
from attlas.flows.config import Run
from attlas.flows.overlaps import refuse_overlaps
from tests.flows.conftest import Ended

INSIDE = "must stay out of the corpus"


def apart(corpus: object, out: Path, **others: object) -> None:
    run_file = others.pop("run_file", None)
    run = Run.model_validate({"model": "demo", "corpus": str(corpus), "out": out, **others})
    refuse_overlaps(run, run_file=run_file)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("place", [".", "out", "deep/er/out", "new/../out", ".hidden"])
def test_an_output_inside_the_corpus_folder_is_refused(corpus: Path, place: str) -> None:
    with pytest.raises(Refusal, match=INSIDE if place != "." else "lies inside"):
        apart(corpus, corpus / place)


def test_an_output_is_inside_through_a_link_to_it_or_to_the_corpus(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "to-corpus").symlink_to(corpus)
    with pytest.raises(Refusal, match=INSIDE):
        apart(corpus, tmp_path / "to-corpus" / "out")
    with pytest.raises(Refusal, match=INSIDE):
        apart(tmp_path / "to-corpus", corpus / "out")


@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/data", "elsewhere/data/out"])
def test_an_output_is_inside_where_a_link_of_the_corpus_leads_to_it(corpus: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "elsewhere" / "data" / "out"
    out.mkdir(parents=True)
    (corpus / "inner").mkdir()
    (corpus / "inner" / "link").symlink_to(tmp_path / target)
    with pytest.raises(Refusal, match=INSIDE):
        apart(corpus, out)
    apart(corpus, tmp_path / "other")


def test_links_in_a_circle_end(corpus: Path, tmp_path: Path) -> None:
    (corpus / "again").symlink_to(corpus)
    apart(corpus, tmp_path / "out")
    with pytest.raises(Refusal, match=INSIDE):
        apart(corpus, corpus / "out")


@pytest.mark.parametrize("corpus_in", ["out", "out/corpus", "out/corpus/0.txt", "out/*/*.txt"])
def test_a_corpus_inside_the_output_is_refused(tmp_path: Path, corpus_in: str) -> None:
    (tmp_path / "out" / "corpus").mkdir(parents=True)
    (tmp_path / "out" / "corpus" / "0.txt").write_text("words")
    with pytest.raises(Refusal, match="a corpus must stay out of the dataset"):
        apart(tmp_path / corpus_in, tmp_path / "out")


@pytest.mark.parametrize(
    ("pattern", "out", "read"),
    [
        ("**/*.parquet", "out", True),
        ("*/heads/*.parquet", "out", True),
        ("*/*.md", "out", True),
        ("**/*", "a/b/out", True),
        ("a/*/out/*.json", "a/b/out", True),
        ("*.md", "out", False),
        ("**/*.txt", "out", False),
        ("*/*.txt", "out", False),
        ("b/**/*", "a/out", False),
    ],
)
def test_a_glob_is_refused_where_it_would_find_files_of_the_dataset(
    tmp_path: Path, pattern: str, out: str, read: bool
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if read:
        with pytest.raises(Refusal, match=INSIDE):
            apart(tmp_path / pattern, tmp_path / out)
    else:
        apart(tmp_path / pattern, tmp_path / out)


def test_a_glob_finds_the_dataset_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path)
    with pytest.raises(Refusal, match=INSIDE):
        apart(tmp_path / "corpus" / "**" / "*.md", tmp_path / "out")
    apart(tmp_path / "corpus" / "*.md", tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "what"), [("model", "model"), ("digest_key", "digest key"), ("run_file", "run file")]
)
def test_what_a_run_needs_stays_out_of_the_dataset(tmp_path: Path, option: str, what: str) -> None:
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    path = out / "model" if option == "model" else out / "file"
    if option != "model":
        path.write_text("a secret of thirty-two characters")
    (tmp_path / "link").symlink_to(path)
    for named in (path, tmp_path / "link"):
        with pytest.raises(Refusal, match=f"the {what} must stay out of the dataset"):
            apart("demo", out, **{option: named if option == "run_file" else str(named)})


def test_the_models_own_folder_and_its_code_are_no_output(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "code.py").write_text("")
    for model in (tmp_path / "model", f"{tmp_path}/model/code.py:build"):
        with pytest.raises(Refusal, match="the model must stay out of the dataset"):
            apart("demo", tmp_path / "model", model=str(model))


def test_neighbours_with_like_names_are_apart(corpus: Path, tmp_path: Path) -> None:
    apart(corpus, tmp_path / "corpus-out")
    apart(corpus / "0.txt", corpus / "out")
    apart("demo", tmp_path / "out")


def test_a_digest_key_in_the_corpus_would_be_read_and_is_refused(corpus: Path, tmp_path: Path) -> None:
    key = corpus / "key.txt"
    key.write_text("a secret of thirty-two characters")
    run = Run(model="demo", corpus=str(corpus), out=tmp_path / "out", digest_key=key)
    with pytest.raises(Refusal, match="the digest key must stay out of the corpus"):
        refuse_bad_paths(run)


def test_the_command_refuses_before_any_work(
    attlas: Callable[..., Ended], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus)
    code, _, err = attlas("run", "--model", "demo", "--corpus", ".", "--out", "data")
    assert code == 2 and INSIDE in err
    assert not (corpus / "data").exists()
