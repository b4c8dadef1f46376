"""Which run a dataset belongs to: a storage is claimed by one run and never by another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attlas.extract.errors import Damaged, Refusal
from attlas.extract.store.interface import Storage
from attlas.extract.store.layout import LOCK, MANIFEST, RUN, TEMPORARY, WORK, name_of
from attlas.extract.store.manifest import read_manifest
from attlas.extract.store.sealed import get_sealed, sealed


def held_run(storage: Storage) -> dict[str, Any] | None:
    """The parameters of the run in a storage, finished or not. Refuses if they are damaged beyond recovery."""
    try:
        unfinished = get_sealed(storage, RUN)
    except Damaged as error:
        if read_manifest(storage) is None:
            raise Refusal(
                f"{storage.place(RUN)} says which run a folder holds, and it is damaged: {error}; "
                f"give --out another folder, or remove {storage.place()} to measure anew"
            ) from error
        unfinished = None
    # the manifest last: a run that ends writes it before its working folder goes
    return unfinished or (read_manifest(storage) or {}).get("run")


def refuse_foreign(storage: Storage) -> None:
    """Refuse a file in the folder's place, and a folder that holds something other than a run."""
    try:
        names = storage.names() or ()
    except NotADirectoryError as error:
        raise Refusal(f"the output must be a folder; {storage.place()} is a file; give --out another name") from error
    if not names or _is_only_an_unfinished_claim(storage, names):
        return
    try:
        is_a_run, why = held_run(storage) is not None, ", ".join(names[:3])
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
    return inner is not None and all(name == name_of(LOCK) or name.endswith(TEMPORARY) for name in inner)


def claim(storage: Storage, run: Mapping[str, Any]) -> bool:
    """Claim a storage for a run; True if it was free, False if this run has claimed it before.

    Refuses a storage that holds another run or something else. Of several concurrent runs, one succeeds.
    """
    refuse_foreign(storage)
    is_new = held_run(storage) is None and storage.put_if_absent(RUN, sealed(run))
    refuse_another(storage, run)
    return is_new


def refuse_another(storage: Storage, run: Mapping[str, Any]) -> None:
    """Refuse a storage that holds a different run, naming the differences."""
    held = held_run(storage)
    differences = [] if held is None else _differences(held, json.loads(json.dumps(run)))
    if differences:
        where = MANIFEST if read_manifest(storage) is not None else RUN
        raise Refusal(
            f"{storage.place()} holds a different run, says its {where} ({'; '.join(differences)}); "
            "give --out another folder, or the same options"
        )


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    names = sorted(held.keys() | asked.keys())
    return [f"{n}: there {held.get(n)!r}, asked {asked.get(n)!r}" for n in names if held.get(n) != asked.get(n)]
