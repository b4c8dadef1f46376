"""A series of datasets in order: training checkpoints by their step, or nights as they are given."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from attlas.analysis.comparability import name_some
from attlas.analysis.dataset import Dataset
from attlas.analysis.manifest import section
from attlas.analysis.summaries import places
from attlas.extract.store import Location, Refusal, Storage, Store, open_storage

_STEP = re.compile(r"(?:^|[^a-z])(?:step|checkpoint|ckpt|iter|iteration)[-_=]?(\d{1,18})(?!\d)", re.IGNORECASE)
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Member:
    """A dataset of a series. step: its training step, or its place in the series, from 0."""

    name: str
    step: int
    dataset: Dataset


@dataclass(frozen=True)
class Series:
    """Datasets of the same layers and heads, in order.

    has_steps: whether `step` is that of a training. notes: what is left out, and how it is ordered, as sentences.
    """

    members: tuple[Member, ...]
    has_steps: bool
    notes: tuple[str, ...]


def open_series(datasets: str | Sequence[Location | Dataset], *, min_documents: int = 1) -> Series:
    """Open and order datasets: a pattern such as `runs/*`, or locations, of which texts may be patterns, too.

    Every dataset that says its training step, in the name of its folder or in its model's revision, is put in the order of steps;
    if one does not, all stay in the order in which they are given. Unfinished datasets, and files, are left out. Raises Refusal.
    """
    given = [datasets] if isinstance(datasets, str) or not isinstance(datasets, Sequence) else list(datasets)
    opened, notes = [], []
    for location in (match for each in given for match in _matches(each)):
        reason = None if isinstance(location, Dataset) else _unfinished(location)
        if reason is None:
            opened.append(
                location if isinstance(location, Dataset) else Dataset.open(location, min_documents=min_documents)
            )
        else:
            notes.append(reason)
    if len(opened) < 2:
        left_out = f" ({' '.join(notes)})" if notes else ""
        raise Refusal(
            f"a trend is of two datasets or more; got {len(opened)}{left_out}; give their folders, or a pattern in quotes: 'runs/*'"
        )
    members = [
        Member(name, number, dataset) for number, (name, dataset) in enumerate(zip(_names(opened), opened, strict=True))
    ]
    ordered, has_steps = _in_order(members)
    _refuse_other_places(ordered)
    return Series(tuple(ordered), has_steps, tuple(notes))


def training_step(dataset: Dataset) -> int | None:
    """The training step that the name of a dataset's folder says, or the revision of its model: `step-0000100`, `checkpoint-100`."""
    texts = (_folder_name(dataset.storage), section(dataset.manifest, "model").get("revision") or "")
    return next((int(match[1]) for match in map(_STEP.search, texts) if match), None)


def _matches(location: Any) -> Iterator[Any]:
    """The paths that match a pattern, in natural order; anything else as it is."""
    if not isinstance(location, str) or not _WILDCARD.search(location):
        yield location
        return
    is_url = "://" in location
    names = _matching_urls(location) if is_url else glob.glob(location)  # noqa: PTH207 - the pattern may be absolute
    found = sorted(names, key=_natural_order)
    if not found:
        raise Refusal(f"a pattern names datasets; nothing matches {location!r}; check it")
    yield from found


def _matching_urls(pattern: str) -> list[str]:
    """The URLs of the folders that match a pattern in the last part of a URL."""
    above, _, last = pattern.rstrip("/").rpartition("/")
    return [f"{above}/{name}" for name in open_storage(above).names() or () if fnmatchcase(name, last)]


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Numbers in names by their size: `night-9` before `night-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unfinished(location: Location) -> str | None:
    """Why a location is left out: it is a file, or its run is unfinished; None for anything else."""
    store = Store.at(location)
    try:
        store.storage.names()
    except NotADirectoryError:
        return f"{_folder_name(store.storage)} is a file: left out."
    is_unfinished = store.has_work and store.manifest is None
    return f"{_folder_name(store.storage)} is unfinished: left out." if is_unfinished else None


def _folder_name(storage: Storage) -> str:
    return PurePath(storage.place()).name or storage.place()


def _names(datasets: Sequence[Dataset]) -> list[str]:
    """The last parts of their locations, as many as tell all of them apart."""
    paths = [PurePath(dataset.storage.place()).parts for dataset in datasets]
    for parts in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(map(_folder_name, (d.storage for d in datasets)), 1)]


def _in_order(members: Sequence[Member]) -> tuple[list[Member], bool]:
    """The members in the order of their training steps, if all say theirs. Raises Refusal for a step that is there twice."""
    steps = [training_step(member.dataset) for member in members]
    if any(step is None for step in steps):
        return list(members), False
    ordered = sorted(
        (replace(member, step=step) for member, step in zip(members, steps, strict=True) if step is not None),
        key=lambda member: member.step,
    )
    for one, other in pairwise(ordered):
        if one.step == other.step:
            raise Refusal(
                f"a training step is once in a series; {one.name} and {other.name} are both of step {one.step}; leave one out"
            )
    return ordered, True


def _refuse_other_places(members: Sequence[Member]) -> None:
    first = places(members[0].dataset, "heads")
    others = [member.name for member in members[1:] if not places(member.dataset, "heads").equals(first)]
    if others:
        raise Refusal(
            f"a series is followed head by head; {' and '.join(name_some(others))} has other layers or heads than {members[0].name}; "
            "leave it out, or compare two datasets by depth: attlas compare A B --match depth"
        )
