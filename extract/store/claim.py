"""Which run a dataset belongs to: a storage is claimed by one run and never by another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attlas.extract.errors import AnotherRun, Damaged, Refusal
from attlas.extract.store.generations import complete_commit, generation_of, keep_generation
from attlas.extract.store.interface import Storage
from attlas.extract.store.layout import LOCK, MANIFEST, PLAN, RUN, TEMPORARY, WORK, name_of
from attlas.extract.store.manifest import read_manifest
from attlas.extract.store.sealed import get_sealed, seal

_LISTED = 4  # differences that a message lists
_GENERATION = "generation"  # of an unfinished run, if it is not the first


@dataclass(frozen=True)
class Identity:
    """What a dataset is made from.

    recipe: how it is measured: model, tokenizer, settings, tables. corpus: the state of the corpus, `name` and `files`, with
    their sizes.
    """

    recipe: Mapping[str, Any]
    corpus: Mapping[str, Any]


def held_identity(storage: Storage) -> Identity | None:
    """The identity of the run in a storage, finished or not. Refuses if it is damaged beyond recovery."""
    try:
        unfinished = get_sealed(storage, RUN)
    except Damaged as error:
        if read_manifest(storage) is None:
            raise Refusal(
                f"{storage.place(RUN)} says which run a folder holds, and it is damaged: {error}; "
                f"give --out another folder, or remove {storage.place()} to measure again"
            ) from error
        unfinished = None
    if unfinished is not None:
        # before 0.4, recipe and corpus were one
        return Identity(
            unfinished.get("recipe", unfinished), unfinished.get("corpus", {}) if "recipe" in unfinished else {}
        )
    # the manifest last: a finishing run writes it before its work area is deleted
    manifest = read_manifest(storage)
    return None if manifest is None else Identity(manifest["run"], _corpus_of(manifest))


def refuse_foreign(storage: Storage) -> None:
    """Refuse a file in the folder's place, and a folder that holds something other than a run."""
    try:
        names = storage.names() or ()
    except NotADirectoryError as error:
        raise Refusal(f"the output must be a folder; {storage.place()} is a file; give --out another name") from error
    if not names or _is_only_an_unfinished_claim(storage, names):
        return
    try:
        is_a_run, why = held_identity(storage) is not None, ", ".join(names[:3])
    except Refusal as refusal:
        is_a_run, why = False, str(refusal)
    if not is_a_run:
        raise Refusal(
            f"the output folder must be new, empty or hold the same run; {storage.place()} holds something else "
            f"({why}) and no run, of which {MANIFEST} or {RUN} would tell; give --out another folder"
        )


def _is_only_an_unfinished_claim(storage: Storage, names: Sequence[str]) -> bool:
    """Whether there is only what a run leaves if it is killed while claiming: a lock or a temporary file in _work."""
    if list(names) != [WORK]:
        return False
    try:
        inner = storage.names(WORK)
    except NotADirectoryError:
        return False
    # an object store may list the folder before what is in it
    return all(name == name_of(LOCK) or name.endswith(TEMPORARY) for name in inner or ())


def claim(storage: Storage, identity: Identity) -> bool:
    """Claim a storage for a run; True if it was free, False if this run has claimed it before.

    A finished dataset of the same run on another state of its corpus is claimed for its next generation. Refuses a storage that holds
    another run or something else. Of several concurrent runs, one succeeds.
    """
    refuse_foreign(storage)
    is_new = held_identity(storage) is None and storage.put_if_absent(RUN, seal(asdict(identity)))
    refuse_another(storage, identity)
    complete_commit(storage)
    manifest = read_manifest(storage)
    if manifest is not None and not is_of_corpus(manifest, identity):
        _begin_generation(storage, identity, manifest)
    return is_new


def _begin_generation(storage: Storage, identity: Identity, manifest: Mapping[str, Any]) -> None:
    """Claim a finished dataset for its next generation; the plan of another state of the corpus is deleted."""
    wanted = json.loads(json.dumps({**asdict(identity), _GENERATION: generation_of(manifest) + 1}))
    if _unfinished(storage) != wanted:
        storage.delete(PLAN)
        storage.put(RUN, seal(wanted))
    keep_generation(storage, manifest)


def generation_begun(storage: Storage) -> int:
    """The generation that an unfinished run is to become; 0 if there is none."""
    unfinished = _unfinished(storage)
    return 0 if unfinished is None else unfinished.get(_GENERATION, 1)


def is_of_corpus(manifest: Mapping[str, Any], identity: Identity) -> bool:
    """Whether a finished dataset was made from this state of the corpus, as far as the names and sizes of its files tell."""
    return not list(_differences(_facts(_corpus_of(manifest)), _facts(identity.corpus)))


def refuse_another(storage: Storage, identity: Identity) -> None:
    """Refuse a storage that holds a different run, naming the differences. A finished dataset may be of another state of the corpus."""
    held = held_identity(storage)
    if held is None:
        return
    recipe = list(_differences(held.recipe, identity.recipe))
    corpus = list(_differences(_facts(held.corpus), _facts(identity.corpus)))
    is_finished = read_manifest(storage) is not None
    if is_finished and held.corpus.get("name") == identity.corpus.get("name"):
        corpus = []
    if not recipe and not corpus:
        return
    where = MANIFEST if is_finished else RUN
    what = "a different run" if recipe or is_finished else "this run on another state of its corpus"
    listed = [*recipe, *(f"corpus {difference}" for difference in corpus)]
    more = f"; and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    raise AnotherRun(
        f"{storage.place()} holds {what}, says its {where} ({'; '.join(listed[:_LISTED])}{more}); "
        f"give --out another folder, or the same {'options' if recipe else 'corpus'}"
    )


def _corpus_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: manifest["corpus"].get(name) for name in ("name", "files")}


def _unfinished(storage: Storage) -> dict[str, Any] | None:
    """What the work area says of its run; None if it says nothing that can be trusted."""
    try:
        return get_sealed(storage, RUN)
    except Damaged:
        return None


def recipe_differences(planned: Identity, recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe has otherwise than the planned one, for a message."""
    return list(_differences(planned.recipe, recipe))


def _facts(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """The name of a corpus and the size of each of its files."""
    files = corpus.get("files") or {}
    return {"name": corpus.get("name")} | {f"file {name}": size for name, size in files.items()}


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    held, asked = (json.loads(json.dumps(facts)) for facts in (held, asked))
    for name in sorted(held.keys() | asked.keys()):
        if held.get(name) != asked.get(name):
            yield f"{name}: there {held.get(name)!r}, asked {asked.get(name)!r}"
