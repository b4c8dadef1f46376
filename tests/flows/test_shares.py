"""attlas run --shards and attlas finish."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attlas.extract.run import RunOptions
from tests.extract.runs import complete_run, contents
from tests.flows.conftest import Ended
from tests.flows.test_cli import refused

pytestmark = pytest.mark.usefixtures("prefect_environment")
FILES_BESIDE = {"report.html"}


@pytest.fixture
def run_file(corpus: Path, tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "demo"\ncorpus = "{corpus}"\nout = "out"\nmax_length = 12\nshard_sequences = 2\n[card]\nlanguage = "en"\n'
    )
    return file


def test_three_processes_at_once_and_finish_make_the_dataset_of_one_run(
    attlas: Callable[..., Ended], run_file: Path, tmp_path: Path, prefect_environment: dict[str, str]
) -> None:
    from attlas.flows.config import read_run

    command = [sys.executable, "-m", "attlas.flows.cli", "run", str(run_file), "--shards"]
    processes = [
        subprocess.Popen([*command, f"{k}/3"], env=prefect_environment, stdout=subprocess.PIPE, text=True)
        for k in (1, 2, 3)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert any(f"all of the run: attlas finish {tmp_path / 'out'}" in line for line in said)
    code, out, _ = attlas("finish", run_file)
    assert code == 0
    assert f"dataset  {tmp_path / 'out'}" in out
    alone = read_run(run_file, {"out": tmp_path / "alone"}).options()
    assert isinstance(alone, RunOptions)
    complete_run(alone)
    found = contents(tmp_path / "out")
    assert {name: found[name] for name in found.keys() - FILES_BESIDE} == contents(tmp_path / "alone")
    assert b"language:" in found["README.md"]
    assert found.keys() >= FILES_BESIDE

    code, out, _ = attlas("run", run_file, "--shards", "2/3")
    assert code == 0
    assert out == f"{tmp_path / 'out'} already contains this run, complete\n"
    assert contents(tmp_path / "out") == found


def test_a_share_that_is_none_is_refused_before_any_work(
    attlas: Callable[..., Ended], run_file: Path, tmp_path: Path
) -> None:
    refused(attlas("run", run_file, "--shards", "4/3"), "K/N with K from 1 to N; got '4/3'")
    assert not (tmp_path / "out").exists()


def test_finishing_what_is_no_run_is_refused(attlas: Callable[..., Ended], run_file: Path, tmp_path: Path) -> None:
    refused(attlas("finish", tmp_path / "nothing"), "none at", "nothing", "check the path")
    refused(attlas("finish", run_file), "none at", "out", "check the path")
    (tmp_path / "other").mkdir()
    refused(attlas("finish", tmp_path / "other"), "holds none; start it with attlas run --shards")
    assert not list((tmp_path / "other").iterdir())


def test_finishing_early_says_what_is_missing(attlas: Callable[..., Ended], run_file: Path, tmp_path: Path) -> None:
    code, out, err = attlas("run", run_file, "--shards", "2/2")
    assert (code, err) == (0, err)
    assert out.startswith("share 2/2: ")
    assert "of the run to go" in out
    code, _, err = attlas("finish", tmp_path / "out")
    assert code == 1
    assert "missing or damaged of " in err
    assert "run it again" in err
    assert not (tmp_path / "out" / "manifest.json").exists()
