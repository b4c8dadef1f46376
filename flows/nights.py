"""The folder of a schedule: a dataset for each time, `latest`, what the last one was made from, and what nights are compared with."""

import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from attlas.extract.errors import Refusal
from attlas.extract.files import write_atomically
from attlas.extract.store import MANIFEST
from attlas.flows.config import Run, read_run
from attlas.flows.places import folder_of_schedule

LATEST = "latest"
_STATE = ".attlas-schedule.json"
_BASELINE = ".attlas-baseline.json"
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", re.ASCII)


def folder_name(time: datetime) -> str:
    """The time in UTC as a folder name; the order of names is that of times."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


@dataclass(frozen=True)
class Nights:
    """The folder of a schedule."""

    root: Path

    @property
    def finished(self) -> list[Path]:
        """The datasets that scheduled runs have finished, the oldest first."""
        found = self.root.iterdir() if self.root.is_dir() else iter(())
        return sorted(p for p in found if _NAME.fullmatch(p.name) and not p.is_symlink() and (p / MANIFEST).is_file())

    def unchanged_since(self, inputs: str | None) -> Path | None:
        """The dataset that was made last, if it was made from these inputs and is still there."""
        if inputs is None or not (self.root / _STATE).is_file():
            return None
        try:
            state = json.loads((self.root / _STATE).read_text("utf-8"))
            dataset = self.root / str(state["dataset"])
            is_same = state["inputs"] == inputs and dataset in self.finished
        except (ValueError, TypeError, KeyError, OSError):
            return None  # it is measured again
        return dataset if is_same else None

    def is_newest(self, dataset: Path) -> bool:
        """Whether no later night is finished."""
        return dataset == self.finished[-1]

    def add(self, dataset: Path, inputs: str | None) -> None:
        """Point `latest` to a finished dataset, unless a later one is there, and note what it was made from."""
        if not self.is_newest(dataset):
            return
        write_atomically(self.root / _STATE, json.dumps({"dataset": dataset.name, "inputs": inputs}).encode())
        latest = self.root / LATEST
        if latest.is_symlink() or not latest.exists():
            temporary = self.root / f".{LATEST}.{os.getpid()}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(dataset.name)
            temporary.replace(latest)

    @property
    def baseline(self) -> str | None:
        """The generation that nights are compared with, as DIR@NUMBER; None if none has been chosen."""
        try:
            chosen = json.loads((self.root / _BASELINE).read_text("utf-8"))["baseline"]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, OSError):
            chosen = None
        if not isinstance(chosen, str):
            raise Refusal(
                f"{self.root / _BASELINE} says which baseline nights are compared with; it is damaged; give --baseline again"
            )
        folder, _, generation = chosen.rpartition("@")
        return f"{self.root / folder}@{generation}"  # an absolute folder stays as it is

    def set_baseline(self, dataset: Path, generation: int) -> None:
        """Compare nights with this generation of a dataset from now on."""
        absolute = dataset.absolute()
        is_ours = absolute.parent == self.root.absolute()
        chosen = f"{absolute.name if is_ours else absolute}@{generation}"
        write_atomically(self.root / _BASELINE, json.dumps({"baseline": chosen}).encode())

    def keep(self, number: int | None) -> list[Path]:
        """Delete all but so many of the newest finished datasets, and the baseline; returns those that are gone. None: keep all."""
        baseline = None if number is None else self.baseline
        kept = None if baseline is None else Path(baseline.rpartition("@")[0])
        gone = [] if number is None else [dataset for dataset in self.finished[:-number] if dataset != kept]
        for dataset in gone:
            (dataset / MANIFEST).unlink()  # first, so that what is half deleted is no dataset
            shutil.rmtree(dataset)
        return gone


def run_at(run_file: Path, time: datetime) -> Run:
    """The run for a scheduled time, with its own folder OUT/<time>, which a retry uses again."""
    run = read_run(run_file, {})
    key = run.digest_key or digest_key_beside(run_file)
    return run.model_copy(update={"out": folder_of_schedule(run.out) / folder_name(time), "digest_key": key})


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
