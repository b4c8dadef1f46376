"""Checks on names and paths, before a model is loaded or a server started."""

import re
from pathlib import Path

from attlas.extract.errors import Refusal
from attlas.extract.python_files import python_files_in
from attlas.extract.store import Store
from attlas.extract.urls import is_url
from attlas.flows.config import Run
from attlas.flows.overlaps import place_of, refuse_overlaps

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def refuse_bad_paths(run: Run, *, run_file: Path | None = None) -> None:
    """Raise Refusal for the first problem with the paths of a run."""
    # before the other checks, which would report an output folder in the wrong place less clearly
    refuse_overlaps(run, run_file=run_file)
    refuse_bad_corpus(run)
    refuse_missing_statistics(run.statistics)
    refuse_missing_model(run.model, trust_remote_code=run.trust_remote_code)
    if run.digest_key is not None:
        refuse_missing_key(run.digest_key)
    Store.at(run.out).refuse_foreign()


def refuse_bad_corpus(run: Run) -> None:
    """Open a local corpus as the run will. A hub corpus is checked by the run itself."""
    from attlas.extract.corpus import open_corpus_of

    if run.corpus.startswith("hub:"):
        return
    corpus = open_corpus_of(run.corpus_to_open, run)
    if run.digest_key is not None and not is_url(run.corpus):
        refuse_key_in_corpus(run.digest_key, run.corpus, [name for name, _ in corpus.files])


def refuse_missing_statistics(statistics: str) -> None:
    """Raise Refusal for a file with statistics of the user's own that does not exist. The run itself reads it."""
    for file in python_files_in(statistics):
        if not file.is_file():
            raise Refusal(f"statistics of your own are in a Python file; there is none at {file}; check the path")


def refuse_missing_model(model: str, *, trust_remote_code: bool = False) -> None:
    """Raise Refusal for a missing model, and for a folder or file that is not a model."""
    from attlas.extract.model.folder import check_model_name
    from attlas.extract.model.user_code import is_user_code

    if model == "demo":
        return
    if Path(model).is_dir() or is_user_code(model):
        check_model_name(model, trust_remote_code=trust_remote_code)
        return
    if Path(model).exists():
        raise Refusal(f"a model is a folder with config.json and safetensors; {model} is a file; give its folder")
    if not _HUB_NAME.fullmatch(model) or model.startswith("."):
        raise Refusal(f"a model is demo, a folder or a hub name; there is no folder {model}; check the path")


def refuse_key_in_corpus(key: Path, corpus: str, names: list[str]) -> None:
    """Raise Refusal if the digest key is one of the files of the corpus."""
    place, _ = place_of(corpus)
    folder = place if place is None or place.is_dir() else place.parent
    if folder is not None and key.resolve() in {(folder / name).resolve() for name in names if name.endswith(key.name)}:
        raise Refusal(f"the digest key must stay out of the corpus; {key} is one of its files; move it elsewhere")


def refuse_missing_key(key: Path) -> None:
    """Raise Refusal if the digest key does not exist."""
    if not key.is_file():
        raise Refusal(f"a digest key is a file; there is none at {key}; create one: head -c 32 /dev/urandom > {key}")
