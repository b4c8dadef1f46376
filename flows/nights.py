"""The folder of a schedule: a dataset for each time, `latest`, and what the last one was made from."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from attlas.extract.files import write_atomically
from attlas.extract.store import MANIFEST

LATEST = "latest"
_STATE = ".attlas-schedule.json"
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

    def add(self, dataset: Path, inputs: str | None) -> None:
        """Point `latest` to a finished dataset, unless a later one is there, and note what it was made from."""
        if dataset != self.finished[-1]:
            return
        write_atomically(self.root / _STATE, json.dumps({"dataset": dataset.name, "inputs": inputs}).encode())
        latest = self.root / LATEST
        if latest.is_symlink() or not latest.exists():
            temporary = self.root / f".{LATEST}.{os.getpid()}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(dataset.name)
            temporary.replace(latest)

    def keep(self, number: int | None) -> list[Path]:
        """Delete all but so many of the newest finished datasets; returns those that are gone. None: keep all."""
        gone = [] if number is None else self.finished[:-number]
        for dataset in gone:
            (dataset / MANIFEST).unlink()  # first, so that what is half deleted is no dataset
            shutil.rmtree(dataset)
        return gone
