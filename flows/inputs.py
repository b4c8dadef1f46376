"""What a run depends on, as far as files tell: to know, without loading the model, that nothing has changed since the last run."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from attlas.extract.python_files import python_files_in
from attlas.extract.urls import is_url
from attlas.flows.config import BUILT_IN, Run


def inputs_digest(run: Run) -> str | None:
    """SHA-256 of the settings of a run but its output, of all installed packages, and of the size and time of every file of model and corpus.

    None if the run depends on what these don't tell: the state of a hub or an object store, or code of the user's own that builds the model.
    """
    model = Path(run.model)
    if run.corpus.startswith("hub:") or is_url(run.corpus) or (run.model != "demo" and not model.is_dir()):
        return None
    files = [*python_files_in(run.statistics), *_corpus_files(run), *(model.rglob("*") if run.model != "demo" else ())]
    facts = {
        "settings": run.model_dump(mode="json", exclude={"out", "card"}),
        "software": sorted(f"{package.name} {package.version}" for package in distributions()),
        "files": sorted(_states(files)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _corpus_files(run: Run) -> list[Path]:
    from attlas.extract.corpus.files import corpus_files

    return (
        []
        if run.corpus in BUILT_IN
        else [file.path for file in corpus_files(run.corpus_to_open).files if isinstance(file.path, Path)]
    )


def _states(files: list[Path]) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of modification."""
    for file in files:
        if file.is_file():
            status = file.stat()
            yield str(file), status.st_size, status.st_mtime_ns
