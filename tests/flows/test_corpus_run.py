"""`attlas run` on a corpus that needs reading options, with file names that are invalid UTF-8."""

import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tests.flows.conftest import Ended

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("test_server")]
NAME = os.fsdecode(b"caf\xe9\n\x1b[1m.csv")
READABLE = "caf\\xe9\n\x1b[1m.csv"


def test_reading_options_are_part_of_the_run(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / NAME).write_bytes("id;text\n1;naïve café\n2;\n3;über alles\n".encode("cp1252"))
    (tmp_path / "corpus" / "again").symlink_to(".")
    out = tmp_path / "out"
    command_line = ("run", "--model", "demo", "--max-length", 12, "--out", out, "--delimiter", ";")
    code, _, err = attlas(*command_line, "--corpus", tmp_path / "corpus", "--encoding", "cp1252")
    assert code == 0, err
    documents = pl.read_parquet(out / "documents" / "*.parquet")
    assert documents.select("source", "dropped_reason").rows() == [
        (f"{READABLE}:1", None),
        (f"{READABLE}:2", "empty"),
        (f"{READABLE}:3", None),
        ("again", "link to a folder that is read already"),
    ]
    for command in (("verify", out), ("report", out), ("query", out, "SELECT source FROM documents")):
        assert attlas(*command)[0] == 0
    assert "dropped: link to a folder that is read already" in attlas("info", out)[1]
    code, _, err = attlas(*command_line, "--corpus", tmp_path / "corpus", "--encoding", "latin-1")
    assert code == 2
    assert "encoding: there 'cp1252', asked 'latin-1'" in err
    named = (*command_line, "--corpus", tmp_path / "corpus" / NAME, "--encoding", "cp1252", "--limit", 1)
    assert attlas(*named, "--out", tmp_path / "named")[0] == 0
