"""Runs during which the clock jumps, or the Prefect server goes away: the dataset is the same, and the run ends soon."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from tests.flows.conftest import part_bytes, started_prefect_server
from tests.flows.test_interrupted import command, prose, records, started, undisturbed
from tests.waiting import free_port, wait_until

__all__ = ["prose", "undisturbed"]
pytestmark = pytest.mark.slow
# the clock of a process that loads this goes two days back as soon as a file exists
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t shift(void) { return access(getenv("CLOCK_GOES_BACK"), F_OK) ? 0 : 2 * 24 * 3600; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec -= shift();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    if (!failed) now->tv_sec -= shift();
    return failed;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_clock_that_jumps_back_during_a_run_changes_nothing(
    prefect_environment: dict[str, str],
    prose: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "clock.c").write_text(CLOCK)
    library, jump, out = tmp_path / "clock.so", tmp_path / "jump", tmp_path / "out"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    changed = prefect_environment | {"LD_PRELOAD": str(library), "CLOCK_GOES_BACK": str(jump)}
    with started(command(out, prose), changed) as run:
        wait_until(lambda: records(out) >= 1, seconds=300)
        jump.touch()
        shown = subprocess.run(["date", "+%s"], env=changed, capture_output=True, text=True, check=True).stdout
        _, errors = run.communicate(timeout=300)
    assert time.time() - int(shown) > 100_000  # the clock has gone back
    assert run.returncode == 0, errors
    assert "Traceback" not in errors
    assert part_bytes(out) == part_bytes(undisturbed)
    assert verify(out) == []


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_that_goes_away_during_a_run_harms_no_dataset_and_floods_nobody(
    prefect_environment: dict[str, str], prose: Path, tmp_path: Path, comes_back: bool
) -> None:
    out, port = tmp_path / "out", free_port()
    own = prefect_environment | {"PREFECT_HOME": str(tmp_path / "prefect")}
    if not comes_back:  # by default it is hoped for during two minutes
        own["PREFECT_CLIENT_MAX_RETRIES"] = "1"
    with started_prefect_server(own, port) as environment:
        run = subprocess.Popen(
            command(out, prose), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            wait_until(lambda: records(out) >= 2, seconds=300)
        except BaseException:
            run.kill()
            raise
    began = time.monotonic()
    try:
        if comes_back:
            time.sleep(5)
            with started_prefect_server(own, port):
                _, errors = run.communicate(timeout=300)
        else:
            _, errors = run.communicate(timeout=300)
    finally:
        run.kill()
    took = time.monotonic() - began
    assert run.returncode == 0, errors
    assert verify(out) == []
    assert took < 120, errors
    assert len(errors.splitlines()) < 40 and "Traceback" not in errors
    assert comes_back or "does not answer any more" in errors
    assert errors.count("loading the model") == 1
