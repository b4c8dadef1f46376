"""What a run depends on, as far as files tell: to know, without loading the model, that nothing has changed since the last run."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from attlas.extract.python_files import python_files_in
from attlas.flows.config import BUILT_IN, Run

_State = tuple[str, int, str]  # name, size, and what changes whenever it is written


def inputs_digest(run: Run) -> str | None:
    """SHA-256 of the settings of a run but its output, of all installed packages, and of the state of every file of model and corpus.

    The state of a file is its size and time of modification, that of an object what its store says of it.

    None if the run depends on what these don't tell: the state of a hub, or code of the user's own that builds the model.
    """
    model = Path(run.model)
    if run.corpus.startswith("hub:") or (run.model != "demo" and not model.is_dir()):
        return None
    files = [*python_files_in(run.statistics), *(model.rglob("*") if run.model != "demo" else ())]
    facts = {
        "settings": run.model_dump(mode="json", exclude={"out", "card"}),
        "software": sorted(f"{package.name} {package.version}" for package in distributions()),
        "files": sorted([*_states(files), *_states_of_corpus(run)]),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _states_of_corpus(run: Run) -> Iterator[_State]:
    from attlas.extract.corpus.files import corpus_files

    if run.corpus in BUILT_IN:
        return
    for file in corpus_files(run.corpus_to_open).files:
        if isinstance(file.path, Path):
            yield from _states([file.path])
        else:
            yield file.path.key, file.size, file.path.state.version


def _states(files: list[Path]) -> Iterator[_State]:
    for file in files:
        if file.is_file():
            status = file.stat()
            yield str(file), status.st_size, str(status.st_mtime_ns)
