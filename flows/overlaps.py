"""Where a run reads and where it writes: neither may lie in the other's place, or it could never be resumed."""

import glob
import os
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath

from attlas.extract.errors import Refusal
from attlas.extract.python_files import python_files_in
from attlas.extract.urls import is_url
from attlas.flows.config import BUILT_IN, Run


def refuse_overlaps(run: Run, *, run_file: Path | None = None) -> None:
    """Refuse an output folder from which the run would read, or that would be read as its corpus."""
    if isinstance(run.out, str):
        if is_url(run.corpus):
            _refuse_corpus_at_url(run, PurePosixPath(run.out))
        return
    out = run.out.resolve()
    model = Path(run.model.rpartition(":")[0] if ".py:" in run.model else run.model)
    own = [("file of statistics", file) for file in python_files_in(run.statistics)]
    for what, path in (("model", model), ("run file", run_file), ("digest key", run.digest_key), *own):
        if path is not None and path.exists() and path.resolve().is_relative_to(out):
            raise Refusal(f"the {what} must stay out of the dataset; {path} lies inside {run.out}; move it elsewhere")
    if run.corpus not in BUILT_IN and not run.corpus.startswith("hub:") and not is_url(run.corpus):
        _refuse_corpus(run, out)


def _refuse_corpus(run: Run, out: Path) -> None:
    place, pattern = place_of(run.corpus)
    if place is None:
        return
    if place.resolve().is_relative_to(out):
        raise _corpus_in_output(run)
    if not place.is_dir():
        return
    ways = _ways(place, out, depth=_depth(pattern))
    if any(pattern is None or _matches(pattern, way) for way in ways):
        raise _output_in_corpus(run)


def _refuse_corpus_at_url(run: Run, out: PurePosixPath) -> None:
    """The same where corpus and output are URLs. A prefix has no links, so their names tell."""
    corpus = PurePosixPath(run.corpus)
    base = PurePosixPath(*takewhile(lambda part: not glob.has_magic(part), corpus.parts))
    if base.is_relative_to(out):
        raise _corpus_in_output(run)
    pattern = None if base == corpus else corpus.relative_to(base).as_posix()
    if out.is_relative_to(base) and (pattern is None or _matches(pattern, out.relative_to(base))):
        raise _output_in_corpus(run)


def _corpus_in_output(run: Run) -> Refusal:
    return Refusal(
        f"a corpus must stay out of the dataset; {run.corpus} lies inside {run.out}; give --out another folder"
    )


def _output_in_corpus(run: Run) -> Refusal:
    return Refusal(
        f"the output must stay out of the corpus, which would grow by it; {run.out} would be read as part of "
        f"{run.corpus}; give --out another folder"
    )


def place_of(corpus: str) -> tuple[Path | None, str | None]:
    """The file or folder of a corpus; of a glob its folder, and the pattern within that."""
    path = Path(corpus).expanduser()
    if path.exists():
        return path, None
    if not glob.has_magic(corpus):
        return None, None
    base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    return base, path.relative_to(base).as_posix()


def _depth(pattern: str | None) -> int | None:
    """How many folders deep a pattern reaches; None for any depth."""
    return None if pattern is None or "**" in pattern else pattern.count("/")


def _ways(base: Path, out: Path, *, depth: int | None) -> Iterator[Path]:
    """The paths below `base` at which `out` is found: its own, and those through symbolic links."""
    if out.is_relative_to(base.resolve()):
        yield out.relative_to(base.resolve())
    seen = {base.resolve()}
    for folder, inner, _ in os.walk(base, followlinks=True):
        below = Path(folder).relative_to(base)
        links = [Path(folder, name) for name in inner if Path(folder, name).is_symlink()]
        for link in links:
            target = link.resolve()
            if out.is_relative_to(target):
                yield below / link.name / out.relative_to(target)
        if depth is not None and len(below.parts) >= depth:
            inner.clear()
        new = {name: Path(folder, name).resolve() for name in inner if not name.startswith(".")}
        inner[:] = [name for name, target in new.items() if target not in seen]
        seen.update(new.values())


def _matches(pattern: str, way: PurePath) -> bool:
    """Whether the pattern would find a file of a dataset there. Tried on such files, since no rule says all that globs do."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in _written():
            file = Path(scratch, way, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        found = glob.glob(pattern, root_dir=scratch, recursive=True)  # noqa: PTH207 - as the corpus is read
        return any(Path(scratch, name).is_file() for name in found)


def _written() -> list[str]:
    """A file of each kind that a run writes, by its path in the dataset."""
    from attlas.extract.store.layout import CARD, MANIFEST, REPORT, RUN, part_key, record_key
    from attlas.extract.tables import TABLES

    return [MANIFEST, CARD, REPORT, RUN, record_key(0), *(part_key(table, 0) for table in TABLES)]
