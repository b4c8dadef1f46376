"""Files of a dataset, read and edited by tests without the code under test."""

import hashlib
import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if there is no file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
