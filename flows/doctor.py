"""`attlas doctor`: whether this machine can run, schedule and keep what it is asked to, and what to do if not."""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Literal

from attlas.extract.errors import Refusal, first_line
from attlas.extract.printable import printable
from attlas.flows.progress import count_of

State = Literal["ok", "note", "problem"]
FORMATS = ("text", "json")
_GIB = 1 << 30
_LITTLE_DISK, _LITTLE_MEMORY = 2 * _GIB, 2 * _GIB
_LATE = timedelta(minutes=2)
# versions with which Prefect's server looks healthy and starts no run, or does not start
_BREAKING = {"sqlalchemy": (2, 1), "fastapi": (0, 165)}
_OPTIONAL = {
    "obstore": "datasets in object stores",
    "prefect-dask": "attlas run --runner dask (pip install 'attlas[dask]')",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: how it is, and what to do, which is empty if nothing has to be done."""

    name: str
    state: State
    found: str
    todo: str = ""


def check_all(out: str | None) -> Iterator[Check]:
    """Look at everything. out: the folder or URL to write datasets to; the current folder by default."""
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        _software,
        _hardware,
        _folders,
        lambda: _output(out),
        _server,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a check that can't be made is an answer too
            yield Check("check", "problem", f"{type(error).__name__}: {first_line(error)}", "see attlas --debug doctor")


def write_checks(checks: list[Check], form: str, stream: IO[str]) -> None:
    """Write checks, for people or as JSON."""
    if form == "json":
        stream.write(json.dumps([asdict(check) for check in checks], ensure_ascii=False) + "\n")
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        todo = f"; {check.todo}" if check.todo else ""
        stream.write(f"{check.state:<8} {check.name:<{width}}  {printable(check.found + todo)}\n")


def _software() -> Iterator[Check]:
    version = importlib.metadata.version
    yield Check(
        "attlas", "ok", f"{version('attlas')}, transformers {version('transformers')}, prefect {version('prefect')}"
    )
    for name, broken in _BREAKING.items():
        installed = version(name)
        number = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
        if number >= broken:
            limit = ".".join(map(str, broken))
            todo = f"pip install '{name}<{limit}'"
            yield Check(
                name, "problem", f"{installed}: with {limit} and later, Prefect's server starts no scheduled run", todo
            )
        else:
            yield Check(name, "ok", f"{installed}, with which Prefect's server works")
    for name, use in _OPTIONAL.items():
        try:
            yield Check(name, "ok", version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "note", f"not installed; needed for {use}")


def _hardware() -> Iterator[Check]:
    from attlas.extract.machine import this_machine

    machine = this_machine()
    yield Check("torch", "ok", f"{machine.torch}, {machine.cores} threads")
    if machine.memory is not None:
        is_little = machine.memory < _LITTLE_MEMORY
        todo = "free some, or use a smaller --batch-tokens" if is_little else ""
        yield Check("memory", "problem" if is_little else "ok", f"{machine.memory / _GIB:.1f} GiB free", todo)
    for number, (name, free) in enumerate(machine.gpus):
        yield Check(f"gpu {number}", "ok", name + ("" if free is None else f", {free / _GIB:.1f} GiB free"))
    if not machine.gpus:
        yield Check("gpu", "note", "none that torch sees; the model runs on the CPU")
    if machine.engine is None:
        yield Check("engine", "problem", machine.engine_problem, "install what it names")
    else:
        ready = "ready" if machine.is_compiled else "will be compiled at the first run, in about half a minute"
        yield Check("engine", "ok", f"{machine.engine}, {ready}")


def _folders() -> Iterator[Check]:
    from attlas.flows.environment import cache_folder, prepare_environment

    cache = cache_folder()
    note = prepare_environment()
    if note is not None:
        yield Check("home", "problem", *note.split(": ", 1))
    if cache is None:
        yield Check("cache", "problem", "its folder can't be written", "set XDG_CACHE_HOME to a folder that can be")
    else:
        yield Check("cache", "ok", str(cache))


def _output(out: str | None) -> Iterator[Check]:
    if out is not None and "://" in out:
        yield from _object_store(out)
        return
    folder = Path(out or ".")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Check("output", "problem", f"{existing} can't be written", "give another folder as --out")
        return
    free = shutil.disk_usage(existing).free
    is_little = free < _LITTLE_DISK
    todo = "free some: a shard that can't be written ends the run" if is_little else ""
    yield Check("output", "problem" if is_little else "ok", f"{existing}: {free / _GIB:.1f} GiB free", todo)


def _object_store(address: str) -> Iterator[Check]:
    import secrets

    from attlas.extract.store import open_storage

    key = f"attlas-doctor-{secrets.token_hex(8)}"
    try:
        storage = open_storage(address)
        is_first, is_second = storage.put_if_absent(key, b"1"), storage.put_if_absent(key, b"2")
        content = storage.get(key)
        storage.delete(key)
    except (OSError, Refusal) as error:
        yield Check("output", "problem", first_line(error), "check the address, the network and the credentials")
        return
    if is_first and not is_second and content == b"1":
        yield Check("output", "ok", f"{address}: can be written, and creates an object only once")
    else:
        found = f"{address} overwrites an object that was to be created only once (If-None-Match)"
        yield Check("output", "problem", found, "use another store")


def _server() -> Iterator[Check]:
    from attlas.flows.api import refuse_unreachable_server
    from attlas.flows.environment import refuse_bad_settings

    try:
        refuse_bad_settings()
        from prefect.settings import get_current_settings

        url = get_current_settings().api.url
        if not url:
            found = "PREFECT_API_URL is not set: attlas run uses a temporary server"
            yield Check("server", "note", f"{found}, and attlas serve needs a permanent one (prefect server start)")
            return
        refuse_unreachable_server()
    except Refusal as refusal:
        yield Check("server", "problem", str(refusal))
        return
    yield Check("server", "ok", "it answers")
    yield _scheduler()


def _scheduler() -> Check:
    """A server may answer and never start a run: then a deployment with a schedule has no runs to come, or late ones."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    scheduled = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    with get_client(sync_client=True) as client:
        deployments = [
            found for found in client.read_deployments() if not found.paused and any(s.active for s in found.schedules)
        ]
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=scheduled), limit=200)
    now = datetime.now(UTC)
    late = [run for run in runs if run.next_scheduled_start_time and run.next_scheduled_start_time < now - _LATE]
    without = [d.name for d in deployments if all(run.deployment_id != d.id for run in runs)]
    if without:
        found = f"{', '.join(without)} has a schedule and no run to come: the server's scheduler does not work"
        return Check(
            "scheduler",
            "problem",
            found,
            "read the server's log; check sqlalchemy above, where the server is installed",
        )
    if late:
        todo = "start attlas serve, or a worker of its work pool"
        return Check("scheduler", "problem", f"{count_of(len(late), 'scheduled run')} late: nobody starts them", todo)
    number = len(deployments)
    return Check(
        "scheduler", "ok", f"{count_of(number, 'deployment')} with a schedule" if number else "nothing is scheduled"
    )
