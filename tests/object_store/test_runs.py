"""Whole runs into a real object store, through faults and kills, give the bytes of a run into a folder."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, measure_shards, plan_run
from attlas.extract.store import CARD, MANIFEST, REPORT, LocalFolder, open_storage
from tests.extract.runs import complete_run
from tests.flows.conftest import started_prefect_server
from tests.object_store.conftest import contents
from tests.object_store.proxy import FAULTS, Proxy
from tests.object_store.server import KEY, SECRET

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("Every shard of this run is two short sequences, and there are four shards or so. " * 4)
    return path


def options(model: Path, corpus: Path, out: "Path | str") -> RunOptions:
    return RunOptions(
        model=str(model), corpus=str(corpus), out=out, max_length=12, shard_sequences=2, device="cpu", engine="cpu"
    )


@pytest.fixture(scope="module")
def local(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    out = tmp_path_factory.mktemp("local") / "out"
    complete_run(options(model, corpus, out))
    return contents(LocalFolder(out))


def test_a_run_through_faults_that_is_continued_gives_the_bytes_of_a_local_run(
    proxy: Proxy, url: str, model: Path, corpus: Path, local: dict[str, bytes | None]
) -> None:
    proxy.rate, proxy.list_delay_s = 0.15, 600
    proxy.faults = [fault for fault in FAULTS if "silence" not in fault]
    planned = plan_run(options(model, corpus, url))
    assert planned.plan is not None and planned.plan.shards >= 4
    measure_shard(planned.open_worker(), 1)
    planned = plan_run(options(model, corpus, url))
    assert 1 not in planned.remaining
    measure_shards(planned.open_worker(), planned.remaining)
    assert finish(url) == url
    assert proxy.injected.total() >= 20
    assert verify(url) == []
    proxy.list_delay_s = 0
    assert contents(open_storage(url)) == local


@pytest.mark.slow
def test_a_run_through_silence_gives_the_bytes_of_a_local_run(
    proxy: Proxy, url: str, model: Path, corpus: Path, local: dict[str, bytes | None]
) -> None:
    proxy.rate, proxy.seed = 0.1, 7
    complete_run(options(model, corpus, url))
    assert proxy.injected["silence before"] and proxy.injected["silence after"]
    proxy.rate = 0
    assert contents(open_storage(url)) == local


def command(model: Path, corpus: Path, url: str, *more: str) -> list[str]:
    measured = ("--max-length", "12", "--shard-sequences", "2", "--device", "cpu", "--engine", "cpu")
    named = ("--model", str(model), "--corpus", str(corpus), "--out", url)
    return [sys.executable, "-m", "attlas.flows.cli", "run", *named, *measured, *more]


# what a process is killed at, in the order of a run; whichever of two shards has its record first
MOMENTS = ("PUT .*_work/plan", "PUT .*/heads/shard-0000", "PUT .*records/0000", "PUT .*records/0000")


@pytest.mark.slow
def test_a_process_killed_at_any_moment_is_continued_by_the_same_command(
    proxy: Proxy, url: str, model: Path, corpus: Path, local: dict[str, bytes | None]
) -> None:
    for moment in MOMENTS:
        with subprocess.Popen(
            command(model, corpus, url, "--shards", "1/1"), cwd=ROOT, stderr=subprocess.PIPE, text=True
        ) as process:

            def kill(request: str, moment: str = moment, pid: int = process.pid) -> None:
                if re.search(moment, request):
                    os.kill(pid, signal.SIGKILL)

            proxy.on_request = kill
            _, error = process.communicate(timeout=300)
            assert process.returncode == -signal.SIGKILL, (moment, error)
        proxy.on_request = lambda _: None
        assert open_storage(url).get(MANIFEST) is None
    ended = subprocess.run(
        command(model, corpus, url, "--shards", "1/1"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert f"all of the run: attlas finish {url}" in ended.stdout
    finish(url)
    assert contents(open_storage(url)) == local


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server that keeps its log in a database, in a home of its own; the environment that refers to it."""
    home = str(tmp_path_factory.mktemp("prefect"))
    with started_prefect_server({**os.environ, "PREFECT_HOME": home, "PREFECT_LOGGING_LEVEL": "DEBUG"}) as environment:
        yield environment


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.exhaustive), "2"])
def test_a_run_with_prefect_writes_there_and_reveals_no_secret(
    proxy: Proxy,
    url: str,
    model: Path,
    corpus: Path,
    local: dict[str, bytes | None],
    prefect: dict[str, str],
    workers: str,
) -> None:
    proxy.rate, proxy.faults = 0.05, ("500 before", "503 before", "reset in the middle")
    arguments = command(model, corpus, url, "--workers", workers)
    ended = subprocess.run(
        [*arguments[:3], "--debug", *arguments[3:]],
        env={**prefect, **os.environ, "AWS_TIMEOUT": "20s"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    proxy.rate = 0
    assert ended.returncode == 0, ended.stderr
    assert f"dataset  {url}" in ended.stdout and f"report   {url}/report.html" in ended.stdout
    found = contents(open_storage(url))
    assert found.keys() - local.keys() == {REPORT}
    assert {key: found[key] for key in local} == local
    database = Path(prefect["PREFECT_HOME"], "prefect.db")
    logged = b"".join(path.read_bytes() for path in database.parent.glob("prefect.db*"))
    assert url.encode() in logged
    written = [logged, *(found[key] or b"" for key in (MANIFEST, CARD, REPORT)), ended.stdout.encode()]
    for secret in (KEY.encode(), SECRET.encode()):
        assert not any(secret in content for content in (*written, ended.stderr.encode()))
