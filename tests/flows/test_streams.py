"""Standard output and error with any character, closed streams and closed pipes, in real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT

ATTLAS = [sys.executable, "-m", "attlas.flows.cli"]


def shell(command: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a shell command in which `attlas` is this checkout's."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'attlas() {{ "$PYTHON" -m attlas.flows.cli "$@"; }}; {command}'],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_character_is_printed_in_every_encoding(encoding: str) -> None:
    ended = shell("attlas stats entropy_nats", PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr) == (0, b"")
    # click assumes that ASCII means a misconfigured terminal, and writes UTF-8
    sigma = "Σ" if encoding in ("ascii", "utf-8") else r"\u03a3"
    assert sigma in ended.stdout.decode("utf-8" if encoding == "ascii" else encoding)


def test_a_message_is_printed_in_every_encoding() -> None:
    ended = shell("attlas info 'nowhere-→-\udc80'", PYTHONIOENCODING="cp1252")
    assert ended.returncode == 2
    assert rb"nowhere-\u2192-" in ended.stderr and b"Traceback" not in ended.stderr


def test_a_closed_pipe_ends_the_command_like_any_unix_filter() -> None:
    with subprocess.Popen([*ATTLAS, "stats"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE
    assert shell("attlas stats | head -1 >/dev/null").returncode in (0, 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", ["attlas stats > /dev/full", "attlas stats >&-", "attlas --version > /dev/full"])
def test_an_unwritable_output_is_a_failure(command: str) -> None:
    ended = shell(command)
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"attlas: failed: OSError: ") and b"Exception ignored" not in ended.stderr


@pytest.mark.slow
def test_a_closed_standard_error_does_not_change_output_or_exit_code() -> None:
    assert shell("attlas stats entropy_nats 2>&-").stdout == shell("attlas stats entropy_nats").stdout
    assert shell("attlas info nowhere 2>&-").returncode == 2
    assert shell("attlas info nowhere 0<&- >&- 2>&-").returncode == 2


@pytest.mark.parametrize("closed", ["ascii", "full", "closed", "broken"])
def test_write_errors_after_the_work_do_not_fail_the_command(closed: str) -> None:
    code = (
        "from attlas.flows.streams import *; make_streams_safe(); ignore_closed_pipe()\n"
        "with report_write_errors():\n    print('Σ', flush=True)\n"
        "sys.exit(flush_output() is not None)"
    )
    redirection = {"ascii": "", "full": "> /dev/full", "closed": ">&-", "broken": "> >(true)"}[closed]
    # wait until the reader has gone away
    wait = "sleep 0.2;" if closed == "broken" else ""
    ended = shell(f'{{ {wait} "$PYTHON" -c "$CODE"; }} {redirection}', CODE=code, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0
    reported = b"standard output can't be written" in ended.stderr
    assert reported == (closed in ("full", "closed"))
    assert b"Traceback" not in ended.stderr and b"Exception ignored" not in ended.stderr


@pytest.mark.slow
def test_csv_and_json_are_always_utf8(dataset: Path) -> None:
    sql = "SELECT 'é→漢' AS x"
    for form, wanted in (("csv", "x\né→漢\n"), ("json", None)):
        ended = shell(f'attlas query {dataset} "{sql}" --format {form}', PYTHONIOENCODING="cp1252")
        assert ended.returncode == 0, ended.stderr
        output = ended.stdout.decode()
        assert output == wanted or (wanted is None and json.loads(output) == [{"x": "é→漢"}])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from attlas.extract.options import RunOptions
    from tests.extract.runs import complete_run

    folder = tmp_path_factory.mktemp("streams")
    (folder / "corpus.txt").write_text("One fox jumps over one dog.")
    complete_run(RunOptions(model="demo", corpus=str(folder / "corpus.txt"), out=folder / "out", max_length=32))
    return folder / "out"
