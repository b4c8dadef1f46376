"""The place of a schedule: a dataset for each time, `latest`, what the last one was made from, and what nights are compared with.

It is a folder or an object store. In a folder, `latest` is a symbolic link; in an object store, an object that holds the name.
"""

import json
import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from attlas.extract.errors import Damaged, Refusal
from attlas.extract.store import MANIFEST, Storage, generation_of, open_dataset, open_storage
from attlas.flows.config import Run, read_run
from attlas.flows.places import Place, absolute, inside, name_of_place, place_around, place_named

LATEST = "latest"
_STATE = ".attlas-schedule.json"
_BASELINE = ".attlas-baseline.json"
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", re.ASCII)


def folder_name(time: datetime) -> str:
    """The time in UTC as a folder name; the order of names is that of times."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


@dataclass(frozen=True)
class Generation:
    """One generation of a dataset, which stays the same."""

    dataset: Place
    number: int

    @classmethod
    def now(cls, location: Place | str) -> "Generation":
        """The one that a dataset has now, or the one that `DIR@NUMBER` names. Raises Refusal if there is none."""
        storage, manifest = open_dataset(location)
        return cls(place_named(storage.place()), generation_of(manifest))

    @property
    def name(self) -> str:
        """Without where the dataset is."""
        return f"{name_of_place(self.dataset)}@{self.number}"

    def __str__(self) -> str:
        return f"{self.dataset}@{self.number}"


@dataclass(frozen=True)
class Nights:
    """The place of a schedule."""

    root: Place

    @classmethod
    def of(cls, run: Run) -> "Nights":
        """The place that the dataset of a night is in."""
        return cls(place_around(run.out))

    @cached_property
    def storage(self) -> Storage:
        return open_storage(self.root)

    @property
    def finished(self) -> list[Place]:
        """The datasets that scheduled runs have finished, the oldest first."""
        return [inside(self.root, name) for name in self._names() if self._is_finished(name)]

    @property
    def newest(self) -> Place | None:
        """The last of them; in an object store this asks less."""
        return next((inside(self.root, name) for name in reversed(self._names()) if self._is_finished(name)), None)

    def _later_than(self, name: str) -> list[str]:
        """The names of finished datasets after this one."""
        return [other for other in self._names() if other > name and self._is_finished(other)]

    def _names(self) -> list[str]:
        """The names of datasets, finished or not, the oldest first."""
        return [name for name in self.storage.names() or () if _NAME.fullmatch(name)]

    def _is_finished(self, name: str) -> bool:
        place = inside(self.root, name)
        is_link = isinstance(place, Path) and place.is_symlink()
        return not is_link and self.storage.size(f"{name}/{MANIFEST}") is not None

    def unchanged_since(self, inputs: str | None) -> Place | None:
        """The dataset that was made last, if it was made from these inputs and is still there."""
        state = self._state
        name = str(state.get("dataset"))
        is_same = inputs is not None and state.get("inputs") == inputs
        return inside(self.root, name) if is_same and _NAME.fullmatch(name) and self._is_finished(name) else None

    @property
    def _state(self) -> dict[str, Any]:
        """What is noted of the last nights; empty if that is damaged, and then things are done once more."""
        try:
            state = json.loads(self.storage.get(_STATE) or b"")
        except (ValueError, Damaged):
            return {}
        return state if isinstance(state, dict) else {}

    def _note(self, **facts: str | None) -> None:
        self.storage.put(_STATE, json.dumps(self._state | facts).encode())

    def is_compared(self, generation: Generation) -> bool:
        """Whether this is the generation that was compared last."""
        return self._state.get("compared") == generation.name

    def note_compared(self, generation: Generation) -> None:
        """Note that a generation has been compared, and its alerts are written."""
        self._note(compared=generation.name)

    def is_newest(self, dataset: Place) -> bool:
        """Whether no later night is finished."""
        return not self._later_than(name_of_place(dataset))

    @property
    def last_success(self) -> str:
        """Text that changes with each night that has succeeded."""
        state = self._state
        return json.dumps([state.get("dataset"), state.get("inputs")])

    def problems(self) -> list[str]:
        """What is wrong with the nights here, in sentences."""
        ahead = self._later_than(folder_name(datetime.now(UTC)))
        if not ahead:
            return []
        return [
            f"{ahead[-1]} is yet to come, by the clock of this machine, and until then every night counts as late: it is not the latest, "
            f"and nobody is told; set the clock, or rename or delete {inside(self.root, ahead[-1])}"
        ]

    def add(self, dataset: Place, inputs: str | None) -> None:
        """Point `latest` to a finished dataset, unless a later one is there, and note what it was made from."""
        if not self.is_newest(dataset):
            return
        name = name_of_place(dataset)
        self._note(dataset=name, inputs=inputs)
        if isinstance(self.root, Path):
            _link_latest(self.root / LATEST, name)
        else:
            self.storage.put(LATEST, f"{name}\n".encode())

    @property
    def baseline(self) -> Generation | None:
        """What nights are compared with; None if nothing has been chosen. Raises Refusal."""
        try:
            content = self.storage.get(_BASELINE)
            if content is None:
                return None
            place, _, number = json.loads(content)["baseline"].rpartition("@")
            # what is in the place of the schedule is known by its name alone
            return Generation(place_named(place) if "/" in place else inside(self.root, place), int(number))
        except (ValueError, TypeError, KeyError, AttributeError, Damaged):
            raise Refusal(
                f"{inside(self.root, _BASELINE)} says which baseline nights are compared with; it is damaged; give --baseline again"
            ) from None

    def set_baseline(self, chosen: Generation) -> None:
        """Compare nights with this generation of a dataset from now on."""
        dataset = absolute(chosen.dataset)
        is_ours = dataset == inside(absolute(self.root), name_of_place(dataset))
        noted = chosen.name if is_ours else str(Generation(dataset, chosen.number))
        self.storage.put(_BASELINE, json.dumps({"baseline": noted}).encode())

    def keep(self, number: int | None) -> list[Place]:
        """Delete all but so many of the newest finished datasets, and the baseline; returns those that are gone. None: keep all."""
        baseline = None if number is None else self.baseline
        kept = None if baseline is None else baseline.dataset
        gone = [] if number is None else [dataset for dataset in self.finished[:-number] if dataset != kept]
        for dataset in gone:
            name = name_of_place(dataset)
            self.storage.delete(f"{name}/{MANIFEST}")  # first, so that what is half deleted is no dataset
            self.storage.clear(name)
            if any(self.storage.list(name)):
                raise OSError(f"{dataset} can't be deleted")
        return gone


def _link_latest(latest: Path, name: str) -> None:
    """Make `latest` a link to a dataset beside it, at once. A file that is no link is someone else's."""
    if latest.exists() and not latest.is_symlink():
        return
    temporary = latest.with_name(f".{latest.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(latest)


def run_at(run_file: Path, time: datetime) -> Run:
    """The run for a scheduled time, with its own place OUT/<time>, which a retry uses again."""
    run = read_run(run_file, {})
    key = run.digest_key or digest_key_beside(run_file)
    return run.model_copy(update={"out": inside(run.out, folder_name(time)), "digest_key": key})


def digest_key_beside(run_file: Path) -> Path:
    """The digest key beside a run file, created on first use and readable by its owner only."""
    key = run_file.with_suffix(".digest-key")
    try:
        descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return key
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return key
